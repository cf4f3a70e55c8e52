"""Every ending has its name, and what several ranks saw adds up to one cause."""

import errno
import json
from pathlib import Path

import pytest

from data_prep.shards import DataError
from harness import ending as ending_module
from harness.config import ConfigError
from harness.ending import DivergedError, Ending, LostLeaseError, StoppedError, make_outcome, settle_outcome
from harness.runs import write_json


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class DistBackendError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (None, "done", 0),
        (StoppedError("signal SIGTERM"), "preempted", 0),
        (DivergedError("loss nan"), "diverged", 1),
        (ConfigError("optim.lr=0, x"), "failed", 2),
        (DataError("shard gone"), "failed", 2),
        (MemoryError(), "oom", 1),
        (OutOfMemoryError("CUDA out of memory"), "oom", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", 1),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk_full", 1),
        (OSError(errno.EIO, "I/O error"), "failed", 1),
        (ZeroDivisionError("division"), "failed", 1),
    ],
)
def test_every_ending_has_its_record(tmp_path: Path, error: Exception | None, state: str, status: int) -> None:
    with Ending(tmp_path) as ending:
        ending.watch(lambda: 7)
        if error is not None:
            raise error
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["state"], outcome["step"], ending.status) == (state, 7, status)
    assert "\n" not in outcome["reason"]
    assert (outcome["error"] is None) == (error is None)


def test_a_full_disk_is_known_under_the_error_that_torch_raises_over_it(tmp_path: Path) -> None:
    with Ending(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 29760 vs 29712")  # noqa: B904 - as torch.save does
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["state"] == "disk_full"
    assert "No space left on device; the last checkpoint stands" in outcome["reason"]


def test_an_exit_from_outside_leaves_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), Ending(tmp_path):
        raise SystemExit(3)
    assert not (tmp_path / "outcome.json").exists()


def end_ranks(folder: Path, errors: dict[int, Exception], world_size: int) -> dict[str, object]:
    """Let ranks end with errors, the highest first, and return the outcome."""
    for rank in sorted(errors, reverse=True):
        with Ending(folder, rank, world_size) as ending:
            ending.watch(lambda: 7)
            raise errors[rank]
    path = folder / "outcome.json"
    return json.loads(path.read_text()) if path.exists() else settle_outcome(folder, world_size, "exit status 1")


GONE = DistBackendError("Connection closed by peer")


@pytest.mark.parametrize(
    ("errors", "state", "cause", "rank"),
    [
        ({0: GONE, 1: OutOfMemoryError("CUDA out of memory")}, "oom", None, 1),
        ({0: RuntimeError("[../gloo/transport/tcp/pair.cc:547] closed"), 1: DataError("shard gone")}, "failed", "data", 1),
        ({0: ZeroDivisionError("x"), 1: GONE}, "failed", "exception", 0),
        ({0: GONE, 1: GONE, 3: GONE}, "failed", "killed", 2),
        ({1: GONE}, "failed", "killed", 0),
        ({0: OSError(errno.ENOSPC, "full"), 1: OSError(errno.ENOSPC, "full")}, "disk_full", None, 0),
        ({0: DivergedError("x"), 1: DivergedError("x")}, "diverged", None, 0),
        ({0: StoppedError("x"), 1: StoppedError("x")}, "preempted", "stop", 0),
        ({0: LostLeaseError("x"), 1: LostLeaseError("x")}, "failed", "lease", 0),
    ],
)
def test_the_first_cause_is_found_behind_lost_peers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors: dict[int, Exception],
    state: str,
    cause: str | None,
    rank: int,
) -> None:
    monkeypatch.setattr(ending_module, "OTHERS_MAY_STILL_WRITE_S", 0.1)
    outcome = end_ranks(tmp_path, errors, world_size=max(errors) + 1 if len(errors) > 1 else 2)
    assert (outcome["state"], outcome["cause"], outcome["rank"]) == (state, cause, rank)


def test_room_is_kept_for_the_outcome(tmp_path: Path) -> None:
    with Ending(tmp_path):
        assert (tmp_path / ending_module.RESERVE).stat().st_size >= 2**15
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


def test_no_record_at_all_is_told_as_it_looks_from_outside(tmp_path: Path) -> None:
    outcome = settle_outcome(tmp_path, 2, "exit status 9: no output")
    assert (outcome["state"], outcome["reason"]) == ("failed", "exit status 9: no output")


def test_ranks_that_all_went_at_once_are_named_by_their_heartbeats(tmp_path: Path) -> None:
    for rank in (0, 1):
        beat = {"pid": 7, "host": "h", "phase": "save", "step": 5}
        (tmp_path / f"heartbeat-{rank}").write_text(json.dumps(beat))
    outcome = settle_outcome(tmp_path, 2, "exit status 1")
    assert outcome["reason"].startswith("rank 0 (pid 7 on h, in save), rank 1 (pid 7 on h, in save) died")
    assert outcome["step"] == 5


def test_memory_goes_before_other_errors(tmp_path: Path) -> None:
    for rank, error in enumerate([ZeroDivisionError("x"), OutOfMemoryError("y")]):
        kind = ending_module.classify_ending(error)
        record = make_outcome(kind.state, str(error), 1, error, kind.cause, rank)
        write_json(tmp_path / f"outcome-{rank}.json", record)
    assert settle_outcome(tmp_path, 2, "")["state"] == "oom"
