"""The wish to stop, and the places where tests break in.

SIGTERM and Ctrl-C ask: the batch at work is finished, the state on disk is resumable. A second Ctrl-C interrupts at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FAULT_VARIABLE = "HARNESS_DATA_FAULT"  # "name" or "name@n": kill this process group at the n-th passing (from 0)

_passed: dict[str, int] = {}


class StoppedError(Exception):
    """Work ended early because somebody asked for it; nothing is broken."""


class StopWish:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.parent = os.getppid()

    def check(self) -> None:
        """Raises: StoppedError when stopping was asked for, or the process that started this one is gone."""
        if self.asked or os.getppid() != self.parent:
            raise StoppedError


@contextmanager
def listening() -> Iterator[StopWish]:
    """Take SIGTERM and SIGINT as a wish to stop; outside the main thread signals are left alone."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if wish.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fault_point(name: str) -> None:
    """Kill this process and its group here when a test asked for it; otherwise do nothing."""
    asked = os.environ.get(FAULT_VARIABLE)
    if asked is None:
        return
    place, _, count = asked.partition("@")
    if place == name:
        passed = _passed.get(name, 0)
        _passed[name] = passed + 1
        if passed == int(count or 0):
            os.killpg(0, signal.SIGKILL)
