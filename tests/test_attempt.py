"""One start of a run: of two claims one fails, the later holds the lease, ranks show where they are, a wish is heard."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from harness.attempt import Heart, RunBusyError, StopWish, claim_attempt, holds_lease
from harness.ending import read_heartbeat, write_outcome


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


def test_a_later_claim_takes_the_lease_and_sweeps_what_was_staged(tmp_path: Path) -> None:
    first = claim_attempt(tmp_path)
    staging = [tmp_path / place / ".staging-x" for place in ("checkpoints", "cells/c", "cells/c/checkpoints")]
    for folder in staging:
        folder.mkdir(parents=True)
    second = claim_attempt(tmp_path, take_over=True)
    assert (holds_lease(first), holds_lease(second)) == (False, True)
    assert not any(folder.exists() for folder in staging)
    wish = StopWish(first)
    assert wish.look()
    assert wish.reason == "a later attempt has taken this run over"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_a_wish_however_often_it_arrives_at_once(tmp_path: Path, number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    before = signal.getsignal(number)
    wish = StopWish(claim_attempt(tmp_path))
    with wish.listening():
        assert not wish.look()
        os.kill(os.getpid(), number)  # to the group, and again from torchrun's agent
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.look()
        assert wish.reason == f"signal {number.name}"
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_wherever_it_is(tmp_path: Path) -> None:
    """Also inside a call that never returns to Python: a lock stands for a collective whose peer is gone."""
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from harness import attempt\n"
        "attempt.SAME_WISH_S = 0.2\n"
        "with attempt.StopWish().listening():\n"
        "    print('ready', flush=True)\n"
        "    lock = threading.Lock(); lock.acquire()\n"
        "    import ctypes; ctypes.CDLL(None).pause(); ctypes.CDLL(None).pause(); ctypes.CDLL(None).sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first is a wish"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()


def test_the_stop_file_and_a_lost_parent_are_heard(tmp_path: Path) -> None:
    attempt_dir = claim_attempt(tmp_path)
    (attempt_dir / "stop_requested").touch()
    wish = StopWish(attempt_dir)
    assert wish.look()
    assert wish.reason == "stop file"
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    assert StopWish(parent_pid=gone.pid).look()
    assert not StopWish(parent_pid=os.getpid()).look()


def test_a_rank_says_where_it_is_and_where_it_hangs(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 3, hang_after_s=0.2)
    heart.beat("step", 7)
    heart.beat("step", 8)
    beat = read_heartbeat(tmp_path / "heartbeat-3")
    assert beat is not None
    assert (beat["pid"], beat["phase"], beat["step"]) == (os.getpid(), "step", 7), "once a second within a phase"
    heart.beat("save", 8)
    assert (read_heartbeat(tmp_path / "heartbeat-3") or {})["phase"] == "save"
    time.sleep(1.0)
    heart.stop()
    assert "test_a_rank_says_where_it_is" in (tmp_path / "stacks-3").read_text()


def test_a_rank_that_never_hung_leaves_no_stacks(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, hang_after_s=60)
    heart.beat("start", 0)
    heart.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat-0"]
