"""One start of a run: claim it, hold its lease, say that each rank lives, hear a wish to stop. No torch.

The attempt's number is the epoch of the lease: the highest one holds the run. A claim sweeps away what earlier attempts
were about to publish, and every publishing looks at the lease after its files were staged and before its rename; so a
stale attempt finds either a higher number or nothing left to rename.
"""

import faulthandler
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from harness.config import ConfigError
from harness.ending import Ending, LostLeaseError, utc_now
from harness.runs import is_attempt_live, is_process_alive, list_attempts, read_process_start, write_json

HEARTBEAT_S = 1.0
HEARTBEAT_BYTES = 512  # one write of a fixed size: no reader sees half of it, and a full disk cannot refuse it
PATIENCE = 3  # times hang_after_s, for what is not a step: starting, evaluating, saving
SAME_WISH_S = 2.0  # a signal to the whole group arrives twice under torchrun, whose agent passes it on
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
ATTEMPT_VARIABLE = "HARNESS_ATTEMPT"  # marks every process of an attempt, so that all of them can be found


class RunBusyError(ConfigError):
    """Another attempt of the run is alive."""


def claim_attempt(run_dir: Path, take_over: bool = False) -> Path:
    """Create the next attempt's folder, exclusively; of two claims at once one fails.

    With `take_over`, also over an attempt that seems alive: for a caller who knows that it must end, such as a scheduler that
    gave its node up. That attempt notices at its next step or save.

    Raises:
        RunBusyError: an attempt of this run is alive.
        OSError: the disk refuses; nothing is claimed.
    """
    attempts = list_attempts(run_dir)
    if attempts and not take_over and not (attempts[-1] / "outcome.json").exists() and is_attempt_live(attempts[-1]):
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
    try:
        write_attempt(attempt_dir, {"started_by": "claim"})
    except OSError:
        shutil.rmtree(attempt_dir, ignore_errors=True)
        raise
    for staging in list_staging(run_dir):
        shutil.rmtree(staging, ignore_errors=True)
    return attempt_dir


def list_staging(run_dir: Path) -> list[Path]:
    """Return the folders in which attempts prepare what they publish."""
    return [path for place in ("checkpoints", "cells/*", "cells/*/checkpoints") for path in run_dir.glob(f"{place}/.staging-*")]


def holds_lease(attempt_dir: Path) -> bool:
    """Say whether no later attempt has been claimed."""
    return not any(int(other.name) > int(attempt_dir.name) for other in list_attempts(attempt_dir.parent.parent))


def check_lease(attempt_dir: Path) -> None:
    """Refuse to go on where a later attempt has taken the run over.

    Raises:
        LostLeaseError: it has.
    """
    if not holds_lease(attempt_dir):
        raise LostLeaseError(f"{attempt_dir}: a later attempt has taken this run over; this one publishes nothing more")


def write_attempt(attempt_dir: Path, facts: dict[str, Any]) -> None:
    """Record which process runs the attempt, with `facts` about code, versions and device."""
    identity = {"pid": os.getpid(), "pid_start": read_process_start(os.getpid()), "host": os.uname().nodename}
    write_json(attempt_dir / "attempt.json", {**identity, "started_utc": utc_now(), **facts})


class Heart:
    """A rank's sign of life: a small file that says where it is, and its stacks once it has been silent for too long."""

    def __init__(self, attempt_dir: Path, rank: int, hang_after_s: float) -> None:
        self.hang_after_s, self.phase, self.last_beat = hang_after_s, "", 0.0
        self.own_s: list[float] = []  # of the steps since the last beat
        self.mean_own_s = 0.0
        self.pid_start, self.stacks_path = read_process_start(os.getpid()), attempt_dir / f"stacks-{rank}"
        self.descriptor = os.open(attempt_dir / f"heartbeat-{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        self.stacks = self.stacks_path.open("w")

    def beat(self, phase: str, step: int, own_s: float | None = None) -> None:
        """Say where this rank is, at most once a second within a phase, and its mean time in a step before it meets others."""
        now = time.monotonic()
        if own_s is not None:
            self.own_s.append(own_s)
        if phase == self.phase and now - self.last_beat < HEARTBEAT_S:
            return
        self.phase, self.last_beat = phase, now
        if self.own_s:
            self.mean_own_s, self.own_s = sum(self.own_s) / len(self.own_s), []
        who = {"pid": os.getpid(), "pid_start": self.pid_start, "host": os.uname().nodename}
        beat = {**who, "phase": phase, "step": step, "own_s": round(self.mean_own_s, 4)}
        os.pwrite(self.descriptor, json.dumps(beat).encode().ljust(HEARTBEAT_BYTES), 0)
        faulthandler.dump_traceback_later(find_patience_s(phase, self.hang_after_s), file=self.stacks)

    def stop(self) -> None:
        """Beat no more; keep the stacks where there are any."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self.descriptor)
        self.stacks.close()
        if self.stacks_path.stat().st_size == 0:
            self.stacks_path.unlink()


def find_patience_s(phase: str, hang_after_s: float) -> float:
    """Return how long a rank may be silent in a phase."""
    return hang_after_s * (1 if phase == "step" else PATIENCE)


@dataclass
class StopWish:
    """Whether somebody wants this attempt to end cleanly: by a signal, by the stop file, by the death of who started it.

    A second signal ends the process at once, wherever it is. Only rank 0 has the attempt's folder and looks for the file.
    """

    attempt_dir: Path | None = None
    parent_pid: int | None = None  # watched where given, on this host
    reason: str | None = None
    last_look: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self.parent_start = read_process_start(self.parent_pid) if self.parent_pid is not None else None
        self.agent_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into a wish, for as long as the context lasts.

        A thread counts them: it also hears while the main thread waits inside a collective, where no Python handler runs.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.hear) for number in numbers}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        counter = threading.Thread(target=count_signals, args=(reader,), daemon=True)
        counter.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
            counter.join()
            os.close(reader)

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal."""
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def look(self) -> bool:
        """Say whether a stop is wished; looks around at most once a second."""
        now = time.monotonic()
        if self.reason is None and now - self.last_look >= HEARTBEAT_S:
            self.last_look = now
            self.reason = self.look_around()
        return self.reason is not None

    def look_around(self) -> str | None:
        """Return why to stop, None where nothing asks for it."""
        if self.agent_pid is not None and os.getppid() != self.agent_pid:
            return "torchrun's agent is gone"
        if self.parent_pid is not None and not is_process_alive(self.parent_pid, self.parent_start):
            return "the process that started this run is gone"
        if self.attempt_dir is None:
            return None
        if (self.attempt_dir / "stop_requested").exists():
            return "stop file"
        return None if holds_lease(self.attempt_dir) else "a later attempt has taken this run over"


def count_signals(reader: int) -> None:
    """End the process at the second stop signal that comes over a wakeup pipe; return when the pipe closes."""
    first = None
    while received := os.read(reader, 1):
        if received[0] in STOP_SIGNALS:
            first = first or time.monotonic()
            if time.monotonic() - first > SAME_WISH_S:
                os._exit(128 + received[0])


@dataclass(frozen=True)
class Attempt:
    """What one rank needs of the attempt that it is part of."""

    folder: Path
    heart: Heart
    stop: StopWish
    ending: Ending

    @property
    def number(self) -> int:
        """The attempt's number: its lease's epoch."""
        return int(self.folder.name)

    @classmethod
    @contextmanager
    def joined(cls, folder: Path, rank: int, world_size: int, hang_after_s: float, parent_pid: int | None) -> Iterator[Self]:
        """Take part in an attempt: hear wishes to stop, and beat until the context ends."""
        heart = Heart(folder, rank, hang_after_s)
        stop = StopWish(folder if rank == 0 else None, parent_pid)
        try:
            with stop.listening():
                yield cls(folder, heart, stop, Ending(folder, rank, world_size))
        finally:
            heart.stop()
