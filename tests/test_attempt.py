"""One start of a run: of two claims one fails, a wish to stop is heard, every ending has its name."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from data_prep.shards import DataError
from harness.attempt import (
    DivergedError,
    Ending,
    RunBusyError,
    StoppedError,
    StopWish,
    claim_attempt,
    write_outcome,
)
from harness.config import ConfigError


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_a_live_attempt_keeps_others_out(tmp_path: Path) -> None:
    first = claim_attempt(tmp_path)
    with pytest.raises(RunBusyError, match="attempt=1, still runs"):
        claim_attempt(tmp_path)
    write_outcome(first, "failed", "x", None)
    assert claim_attempt(tmp_path).name == "2"


def test_of_two_claims_at_once_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.attempt.list_attempts", lambda run_dir: [])  # both look before either claims
    claim_attempt(tmp_path)
    with pytest.raises(RunBusyError, match="started this moment by another process"):
        claim_attempt(tmp_path)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_the_first_signal_is_a_wish_and_the_second_is_not_ours(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    wish = StopWish(tmp_path)
    with wish.listening():
        assert not wish.look()
        os.kill(os.getpid(), number)
        assert wish.look()
        assert wish.reason == f"signal {number.name}"
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_the_stop_file_and_a_lost_parent_are_heard(tmp_path: Path) -> None:
    (tmp_path / "stop_requested").touch()
    wish = StopWish(tmp_path)
    assert wish.look()
    assert wish.reason == "stop file"
    assert (tmp_path / "heartbeat-0").exists()
    orphan = StopWish(tmp_path / "other", parent_pid=1)
    (tmp_path / "other").mkdir()
    assert orphan.look() == (os.getppid() != 1)
