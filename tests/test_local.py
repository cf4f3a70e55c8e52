"""The local launcher: what a job is given, what is told when one dies, and who waits for whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.attempt import claim_attempt
from harness.ending import write_outcome
from harness.runs import find_cell_dir, list_attempts, load_plan, write_json
from launch.cluster import Cluster
from launch.local import Job, Local, describe_death, fill_slots, reap, submit


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
    """Wait for the one job, take it off its slot, and return what it printed."""
    (job,) = local.jobs
    job.process.wait(timeout=30)
    reap(local)
    assert local.jobs == []
    return (job.attempt_dir / "log").read_text()


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
    assert [job.run.run_id for job in local.jobs] == [second.run_id]
    assert [run.run_id for run in local.queue] == [first.run_id]
    finish(local)
    for cell in first.cells:  # the other process finishes it
        write_json(find_cell_dir(local.experiment_dir / first.run_id, cell) / "summary.json", {})
    fill_slots(local)
    assert (local.jobs, local.queue) == ([], [])


def die(code: str, attempt_dir: Path, local: Local) -> Job:
    with (attempt_dir / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=log)
    process.wait(timeout=30)
    return Job(local.plan.runs[0], attempt_dir, process, 0)


def test_a_death_without_a_record_is_told(local: Local, tmp_path: Path) -> None:
    killed = die("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path, local)
    assert describe_death(killed) == "killed by SIGKILL"
    assert describe_death(die("import no_such_module", tmp_path, local)).startswith("exit status 1: ModuleNotFoundError")
    assert describe_death(die("raise SystemExit(3)", tmp_path, local)) == "exit status 3: no output"


def test_a_diverged_run_is_a_result_and_not_tried_again(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(tiny_dir)
    for run in plan.runs:
        write_outcome(claim_attempt(tiny_dir / run.run_id), "diverged", "loss nan at step 3, not finite", 2)
    assert submit(plan, tiny_dir, Cluster(scheduler="local")) == 1
    assert all(len(list_attempts(tiny_dir / run.run_id)) == 1 for run in plan.runs)
    printed = capsys.readouterr()
    assert "0 of 4 cells done, 4 diverged" in printed.out
    assert printed.err.count("diverged: loss nan at step 3, not finite") == 2
