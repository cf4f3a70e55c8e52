"""The local launcher: what a job is given, what is told when one dies, and who waits for whom."""

import os
import time
from pathlib import Path

import pytest

from harness.attempt import claim_attempt
from harness.ending import write_outcome
from harness.runs import find_cell_dir, list_attempts, load_plan, read_json, write_json
from launch.cluster import Cluster
from launch.local import Local, fill_slots, reap, submit
from launch.supervise import RELAUNCHES


@pytest.fixture
def local(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    """An experiment with one slot, whose jobs print their environment instead of training."""
    plan = load_plan(tiny_dir)
    package = tmp_path / "code" / "harness"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text("import os, sys; print(sys.argv[1:]); print(dict(os.environ))")
    return Local(tiny_dir, plan, tmp_path / "code", [None], 3, list(plan.runs))


def finish(local: Local) -> str:
    """Wait for the one job, take it off its slot, and return what its first attempt printed."""
    (job,) = local.jobs.values()
    deadline = time.monotonic() + 60
    while local.jobs and time.monotonic() < deadline:
        reap(local)
        time.sleep(0.05)
    assert local.jobs == {}
    return (job.run_dir / "attempts/1/log").read_text()


def test_a_job_gets_its_attempt_its_threads_and_no_secret(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "CANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    fill_slots(local)
    assert len(local.jobs) == 1, "one slot"
    log = finish(local)
    assert "CANARY" not in log
    assert "'OMP_NUM_THREADS': '3'" in log
    assert f"'--parent-pid', '{os.getpid()}'" in log
    assert "attempts/1" in log


def test_a_gpu_slot_shows_its_job_one_gpu(local: Local) -> None:
    local.slots = ["5"]
    fill_slots(local)
    assert "'CUDA_VISIBLE_DEVICES': '5'" in finish(local)


def test_a_run_that_another_process_trains_waits_at_the_end_of_the_queue(local: Local) -> None:
    first, second = local.plan.runs
    claim_attempt(local.experiment_dir / first.run_id)
    fill_slots(local)
    assert [job.run.run_id for job in local.jobs.values()] == [second.run_id]
    assert [run.run_id for run in local.queue] == [first.run_id]
    finish(local)
    for cell in first.cells:  # the other process finishes it
        write_json(find_cell_dir(local.experiment_dir / first.run_id, cell) / "summary.json", {})
    fill_slots(local)
    assert (local.jobs, local.queue) == ({}, [])


def test_a_job_that_dies_without_a_record_is_told_and_tried_again_in_vain(local: Local) -> None:
    run_dir = local.experiment_dir / local.plan.runs[-1].run_id
    local.queue = [local.plan.runs[-1]]
    (local.code_dir / "harness/train.py").write_text("import no_such_module")
    fill_slots(local)
    finish(local)
    attempts = list_attempts(run_dir)
    assert len(attempts) == 1 + RELAUNCHES
    assert all("no_such_module" in read_json(attempt / "outcome.json")["reason"] for attempt in attempts)


def test_a_diverged_run_is_a_result_and_not_tried_again(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(tiny_dir)
    for run in plan.runs:
        write_outcome(claim_attempt(tiny_dir / run.run_id), "diverged", "loss nan at step 3, not finite", 2)
    assert submit(plan, tiny_dir, Cluster(scheduler="local")) == 1
    assert all(len(list_attempts(tiny_dir / run.run_id)) == 1 for run in plan.runs)
    printed = capsys.readouterr()
    assert "0 of 4 cells done, 4 diverged" in printed.out
    assert printed.err.count("diverged: loss nan at step 3, not finite") == 2
