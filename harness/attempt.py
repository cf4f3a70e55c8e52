"""One start of a run: claim it, say that it lives, hear a wish to stop, write how it ended. No torch."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

from data_prep.shards import DataError
from harness.config import ConfigError
from harness.runs import State, is_attempt_live, list_attempts, read_process_start, write_json

HEARTBEAT_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class RunBusyError(ConfigError):
    """Another attempt of the run is alive."""


def claim_attempt(run_dir: Path) -> Path:
    """Create the next attempt's folder, exclusively; of two claims at once one fails.

    Raises:
        RunBusyError: an attempt of this run is alive.
    """
    attempts = list_attempts(run_dir)
    if attempts and not (attempts[-1] / "outcome.json").exists() and is_attempt_live(attempts[-1]):
        raise RunBusyError(
            f"{run_dir}: attempt={attempts[-1].name}, still runs; wait for it, or stop it with "
            f"touch {attempts[-1]}/stop_requested"
        )
    number = int(attempts[-1].name) + 1 if attempts else 1
    attempt_dir = run_dir / "attempts" / str(number)
    attempt_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        attempt_dir.mkdir()
    except FileExistsError:
        raise RunBusyError(
            f"{run_dir}: attempt={number}, was started this moment by another process; leave it to that one"
        ) from None
    write_attempt(attempt_dir, {"started_by": "claim"})
    return attempt_dir


def write_attempt(attempt_dir: Path, facts: dict[str, Any]) -> None:
    """Record which process runs the attempt, with `facts` about code, versions and device."""
    identity = {"pid": os.getpid(), "pid_start": read_process_start(os.getpid()), "host": os.uname().nodename}
    write_json(attempt_dir / "attempt.json", {**identity, "started_utc": utc_now(), **facts})


def utc_now() -> str:
    """Return the time for people to read; durations and order never come from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class StopWish:
    """Whether somebody wants this attempt to end cleanly: by a signal, by the stop file, or by the death of its parent.

    A second signal ends the process at once. Ranks above 0 have no attempt folder and only hear signals.
    """

    attempt_dir: Path | None = None
    parent_pid: int | None = None  # watched where given
    reason: str | None = None
    last_look: float = field(default=0.0, repr=False)

    @property
    def attempt_number(self) -> int:
        """The attempt's number, 0 on ranks above 0."""
        return int(self.attempt_dir.name) if self.attempt_dir is not None else 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into a wish, for as long as the context lasts."""
        before = {number: signal.signal(number, self.hear) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal; let the next one end the process."""
        self.reason = f"signal {signal.Signals(number).name}"
        for known in STOP_SIGNALS:
            signal.signal(known, signal.SIG_DFL)

    def look(self) -> bool:
        """Say whether a stop is wished; looks at the file at most once a second, and beats the heart."""
        now = time.monotonic()
        if self.reason is None and self.attempt_dir is not None and now - self.last_look >= HEARTBEAT_S:
            self.last_look = now
            (self.attempt_dir / "heartbeat-0").touch()
            if (self.attempt_dir / "stop_requested").exists():
                self.reason = "stop file"
            elif self.parent_pid is not None and os.getppid() != self.parent_pid:
                self.reason = "the process that started this run is gone"
        return self.reason is not None


class StoppedError(Exception):
    """Somebody wished the attempt to end; a checkpoint was written."""


class DivergedError(Exception):
    """The loss or the gradient is not finite; the update was not made."""


class Ending:
    """Turns the way a block ends into an outcome record and an exit status; only an interrupt goes on as an exception."""

    def __init__(self, attempt_dir: Path | None) -> None:
        self.attempt_dir, self.status = attempt_dir, 0
        self.read_step: Callable[[], int | None] = lambda: None

    def watch(self, read_step: Callable[[], int]) -> None:
        """Have the outcome carry the step that `read_step` returns."""
        self.read_step = read_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False  # SystemExit, KeyboardInterrupt: the process is being ended from outside
        state, self.status = classify_ending(error)
        reason = describe_error(error)
        if state == "failed" and self.status == 1:
            traceback.print_exception(error)
        if self.attempt_dir is not None:
            print(f"{state}: {reason}" if reason else state, file=sys.stderr if self.status else sys.stdout, flush=True)
            write_outcome(self.attempt_dir, state, reason, self.read_step(), error)
        self.read_step = lambda: None  # it may hold the whole training, which the ranks must let go before they part
        return True


def classify_ending(error: Exception | None) -> tuple[State, int]:
    """Return the state and exit status that an exception stands for (none: done)."""
    if error is None:
        return "done", 0
    if isinstance(error, StoppedError):
        return "preempted", 0
    if isinstance(error, DivergedError):
        return "diverged", 1
    if isinstance(error, ConfigError | DataError):
        return "failed", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, known without importing torch
        return "oom", 1
    return ("disk_full" if find_disk_full(error) else "failed"), 1


def find_disk_full(error: BaseException | None) -> OSError | None:
    """Return the refusal of a full disk or quota behind an error; torch.save raises its own over it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def describe_error(error: Exception | None) -> str:
    """Say an ending in one line; a bare message where the error is one of ours."""
    if error is None:
        return ""
    if full := find_disk_full(error):
        return f"{full}; the last checkpoint stands: make room and start again"
    text = " ".join(str(error).split())[:500]
    return (
        text if isinstance(error, StoppedError | DivergedError | ConfigError | DataError) else f"{type(error).__name__}: {text}"
    )


def write_outcome(attempt_dir: Path, state: State, reason: str, step: int | None, error: BaseException | None = None) -> None:
    """Record how the attempt ended; the last thing that it writes."""
    trace = "".join(traceback.format_exception(error)).splitlines()[-20:] if error is not None else None
    outcome = {"state": state, "reason": reason, "step": step, "finished_utc": utc_now(), "error": trace}
    write_json(attempt_dir / "outcome.json", outcome)
