"""How an attempt ended: errors into states, and from what each rank recorded the one cause. No torch."""

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from data_prep.shards import DataError
from harness.config import ConfigError
from harness.runs import State, read_json, write_json

# Why a state was reached, where the state does not say: whether to start again depends on it.
# peer: another rank went first; killed: died without a record; lease: a later attempt has taken over.
Cause = Literal["stop", "config", "data", "lease", "exception", "peer", "killed", "hang"]
PEER_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
OTHERS_MAY_STILL_WRITE_S = 2.0
RESERVE, RESERVE_BYTES = ".reserve", 2**15  # room for the outcome on a disk that gets full


class StoppedError(Exception):
    """Somebody wished the attempt to end; a checkpoint was written."""


class DivergedError(Exception):
    """Loss or gradient was not finite too often; those updates were not made."""


class LostLeaseError(Exception):
    """A later attempt has taken the run over; this one must not publish."""


OURS = (StoppedError, DivergedError, LostLeaseError, ConfigError, DataError)  # their message is the reason


@dataclass(frozen=True)
class Kind:
    """What an error stands for: the run's state, the cause, and the exit status."""

    state: State
    cause: Cause | None
    status: int


class Ending:
    """Turns the way a block ends into an outcome record and an exit status; only an interrupt goes on as an exception.

    Every rank has one. What all ranks agreed on is recorded by rank 0; a failure by each rank that saw one, and from
    these rank 0, or whoever watches, settles what came first.
    """

    def __init__(self, attempt_dir: Path | None, rank: int = 0, world_size: int = 1) -> None:
        self.attempt_dir, self.rank, self.world_size, self.status = attempt_dir, rank, world_size, 0
        self.read_step: Callable[[], int | None] = lambda: None

    def watch(self, read_step: Callable[[], int]) -> None:
        """Have the outcome carry the step that `read_step` returns."""
        self.read_step = read_step

    def __enter__(self) -> Self:
        if self.attempt_dir is not None and self.rank == 0:
            with contextlib.suppress(OSError):  # full from the start: training will tell
                (self.attempt_dir / RESERVE).write_bytes(bytes(RESERVE_BYTES))
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False  # SystemExit, KeyboardInterrupt: the process is being ended from outside
        kind = classify_ending(error)
        self.status = kind.status
        with contextlib.suppress(OSError):  # nor can this be told where the log lies on the disk that is full
            if self.attempt_dir is not None:
                release_reserve(self.attempt_dir)
                self.record(self.attempt_dir, kind, error)
            if kind.cause == "exception":
                traceback.print_exception(error)
        self.read_step = lambda: None  # it may hold the whole training, which the ranks must let go before they part
        return True

    def record(self, attempt_dir: Path, kind: Kind, error: Exception | None) -> None:
        """Write this rank's part of the outcome; on rank 0, the outcome."""
        outcome = make_outcome(kind.state, describe_error(error), self.read_step(), error, kind.cause, self.rank)
        if self.world_size > 1 and kind.state not in ("done", "preempted", "diverged"):
            write_json(attempt_dir / f"outcome-{self.rank}.json", outcome)
            if self.rank == 0 and kind.cause == "peer":
                wait_for_records(attempt_dir, self.world_size)
                outcome = settle_outcome(attempt_dir, self.world_size, outcome["reason"])
        if self.rank == 0:
            write_json(attempt_dir / "outcome.json", outcome)
            line = f"{outcome['state']}: {outcome['reason']}".rstrip(": ")
            print(line, file=sys.stderr if self.status else sys.stdout, flush=True)


def release_reserve(attempt_dir: Path) -> None:
    """Make the room that was kept for the outcome."""
    (attempt_dir / RESERVE).unlink(missing_ok=True)


def classify_ending(error: Exception | None) -> Kind:
    """Return what an error stands for (none: done)."""
    if error is None:
        return Kind("done", None, 0)
    if isinstance(error, StoppedError):
        return Kind("preempted", "stop", 0)
    if isinstance(error, DivergedError):
        return Kind("diverged", None, 1)
    if isinstance(error, LostLeaseError):
        return Kind("failed", "lease", 1)
    if isinstance(error, ConfigError | DataError):
        return Kind("failed", "data" if isinstance(error, DataError) else "config", 2)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, known without importing torch
        return Kind("oom", None, 1)
    if find_disk_full(error):
        return Kind("disk_full", None, 1)
    return Kind("failed", "peer" if is_peer_error(error) else "exception", 1)


def is_peer_error(error: Exception) -> bool:
    """Say whether an error only tells that another rank is gone; gloo raises plain RuntimeErrors that name its files."""
    return type(error).__name__ in PEER_ERRORS or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


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
    return text if isinstance(error, OURS) else f"{type(error).__name__}: {text}"


def make_outcome(
    state: State, reason: str, step: int | None, error: BaseException | None, cause: Cause | None, rank: int | None
) -> dict[str, Any]:
    """Return an outcome record (harness/FORMAT.md)."""
    trace = "".join(traceback.format_exception(error)).splitlines()[-20:] if error is not None else None
    return {
        "state": state,
        "cause": cause,
        "reason": reason,
        "step": step,
        "rank": rank,
        "host": os.uname().nodename,
        "finished_utc": utc_now(),
        "error": trace,
    }


def write_outcome(attempt_dir: Path, state: State, reason: str, step: int | None, cause: Cause | None = None) -> dict[str, Any]:
    """Record how an attempt ended, by one who watched it; the last thing that is written of it."""
    outcome = make_outcome(state, reason, step, None, cause, None)
    write_json(attempt_dir / "outcome.json", outcome)
    return outcome


def wait_for_records(attempt_dir: Path, world_size: int) -> None:
    """Give the other ranks a moment to record what they saw."""
    deadline = time.monotonic() + OTHERS_MAY_STILL_WRITE_S
    while time.monotonic() < deadline:
        records = read_rank_outcomes(attempt_dir)
        if len(records) == world_size or any(record["cause"] != "peer" for record in records.values()):
            return
        time.sleep(0.05)


def read_rank_outcomes(attempt_dir: Path) -> dict[int, dict[str, Any]]:
    """Return what each rank that failed recorded."""
    return {int(p.stem.rpartition("-")[2]): read_json(p) for p in attempt_dir.glob("outcome-*.json")}


def settle_outcome(attempt_dir: Path, world_size: int, otherwise: str) -> dict[str, Any]:
    """Return the outcome that the ranks' records add up to: of the lowest rank whose error was its own, else that one is lost.

    A run out of memory or disk goes before other errors, since it says what to change.
    """
    records = read_rank_outcomes(attempt_dir)
    own = [record for _, record in sorted(records.items()) if record["cause"] != "peer"]
    if own:
        return next((record for record in own if record["state"] in ("oom", "disk_full")), own[0])
    beats = [read_heartbeat(attempt_dir / f"heartbeat-{rank}") for rank in range(world_size)]
    seen = max((beat["step"] for beat in beats if beat), default=None)
    silent = [rank for rank in range(world_size) if rank not in records and (records or beats[rank])]
    if world_size > 1 and silent:
        where = ", ".join(describe_rank(attempt_dir, rank) for rank in silent)
        in_save = any(beat["phase"] == "save" for rank, beat in enumerate(beats) if beat and rank in silent)
        advice = " (where it was asked to stop: a save needs more time than that)" if in_save else ""
        return make_outcome("failed", f"{where} died without a record: killed{advice}", seen, None, "killed", silent[0])
    return make_outcome("failed", otherwise, seen, None, "killed", None)


def describe_rank(attempt_dir: Path, rank: int) -> str:
    """Name a rank with its process and host, as far as its heartbeat tells."""
    beat = read_heartbeat(attempt_dir / f"heartbeat-{rank}")
    return f"rank {rank}" + (f" (pid {beat['pid']} on {beat['host']}, in {beat['phase']})" if beat else "")


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """Return what a rank last said of itself, None where it said nothing."""
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def utc_now() -> str:
    """Return the time for people to read; durations and order never come from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
