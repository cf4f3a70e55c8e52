"""The places where tests break in: each is named in the code, and does nothing unless a test has set an injector."""

from collections.abc import Callable

injector: Callable[[str], None] | None = None


def fault_point(name: str) -> None:
    """Let a test kill, delay or fail this process here."""
    if injector is not None:
        injector(name)
