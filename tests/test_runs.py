"""The layout on disk: plans are frozen and checked, states derived, attempts merged, code identified."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, tiny_experiment

from harness.attempt import claim_attempt, write_attempt
from harness.config import ConfigError
from harness.ending import write_outcome
from harness.plan import plan_experiment
from harness.runs import (
    describe_code,
    find_cell_dir,
    iter_metrics,
    list_pending_cells,
    load_plan,
    load_run,
    run_state,
    snapshot_code,
    write_json,
    write_plan,
)


def first_run(experiment_dir: Path) -> Path:
    return experiment_dir / load_plan(experiment_dir).runs[0].run_id


def test_a_written_plan_reads_back(data_dir: Path, tmp_path: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    experiment_dir = write_plan(plan, tmp_path)
    assert load_plan(experiment_dir) == plan
    for run in plan.runs:
        assert load_run(experiment_dir / run.run_id) == run
        for cell in run.cells:
            assert json.loads((find_cell_dir(experiment_dir / run.run_id, cell) / "cell.json").read_text())["tokens"]


def test_a_folder_of_another_run_is_refused(tiny_dir: Path, data_dir: Path) -> None:
    run_dir = first_run(tiny_dir)
    moved = run_dir.rename(run_dir.with_name("l9-h9-d9-s0-0123456789"))
    with pytest.raises(ConfigError, match="does not match its folder or its content"):
        load_run(moved)
    moved.rename(run_dir)
    record = json.loads((run_dir / "run.json").read_text())
    record["what"]["optim"]["lr"] = 0.5
    (run_dir / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="another plan or was edited"):
        load_run(run_dir)
    with pytest.raises(ConfigError):
        write_plan(plan_experiment(tiny_experiment(data_dir)), tiny_dir.parent)
    assert json.loads((run_dir / "run.json").read_text())["what"]["optim"]["lr"] == 0.5, "nothing was overwritten"


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_spoilt_plan_is_named(tiny_dir: Path, text: str) -> None:
    (tiny_dir / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"plan\.json"):
        load_plan(tiny_dir)
    with pytest.raises(ConfigError, match="there is no plan"):
        load_plan(tiny_dir / "nowhere")


def test_states_are_derived_from_records(tiny_dir: Path) -> None:
    run_dir = first_run(tiny_dir)
    run = load_run(run_dir)
    assert run_state(run_dir, run).state == "planned"
    attempt = claim_attempt(run_dir)
    assert run_state(run_dir, run).state == "running"
    write_outcome(attempt, "preempted", "signal SIGTERM", 7)
    assert (run_state(run_dir, run).state, run_state(run_dir, run).step) == ("preempted", 7)
    dead = claim_attempt(run_dir)
    record = json.loads((dead / "attempt.json").read_text())
    write_json(dead / "attempt.json", {**record, "pid": 2**22 + 1})
    assert run_state(run_dir, run).state == "failed"
    assert "without an outcome" in run_state(run_dir, run).reason
    for cell in run.cells:
        write_json(find_cell_dir(run_dir, cell) / "summary.json", {})
    assert run_state(run_dir, run).state == "done"
    assert list_pending_cells(run_dir, run) == []


def test_a_reused_pid_is_not_mistaken_for_the_attempt(tiny_dir: Path) -> None:
    run_dir = first_run(tiny_dir)
    attempt = claim_attempt(run_dir)
    record = json.loads((attempt / "attempt.json").read_text())
    assert record["pid"] == os.getpid()
    write_json(attempt / "attempt.json", {**record, "pid_start": "1"})
    assert run_state(run_dir, load_run(run_dir)).state == "failed"


def test_a_silent_attempt_on_another_host_goes_stale(tiny_dir: Path) -> None:
    run_dir = first_run(tiny_dir)
    attempt = claim_attempt(run_dir)
    record = json.loads((attempt / "attempt.json").read_text())
    write_json(attempt / "attempt.json", {**record, "host": "elsewhere"})
    (attempt / "heartbeat-0").touch()
    assert run_state(run_dir, load_run(run_dir)).state == "running"
    os.utime(attempt / "heartbeat-0", (1, 1))
    assert run_state(run_dir, load_run(run_dir)).state == "failed"


def row(step: int, loss: float, cell_id: str | None = None) -> str:
    return json.dumps({"kind": "train", "cell_id": cell_id, "step": step, "train_loss": loss})


def test_metrics_merge_attempts_and_drop_a_torn_line(tmp_path: Path) -> None:
    lines = {
        1: [row(1, 3.0), row(2, 2.0), row(3, 1.0)[:20]],
        2: [row(2, 2.5), row(3, 1.5), row(3, 1.4, "cell")],
        10: [],
    }
    for attempt, content in lines.items():
        folder = tmp_path / "attempts" / str(attempt)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(content))
    rows = [(r["step"], r["cell_id"], r["train_loss"]) for r in iter_metrics(tmp_path)]
    assert rows == [(1, None, 3.0), (2, None, 2.5), (3, None, 1.5), (3, "cell", 1.4)]


def test_a_snapshot_is_the_code_and_cannot_be_edited(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for package in ("model", "data_prep", "harness"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = describe_code(root)
    assert before.commit is None
    snapshot = snapshot_code(tmp_path / "experiment", root)
    assert snapshot.name == before.code_hash == describe_code(snapshot).code_hash
    assert snapshot_code(tmp_path / "experiment", root) == snapshot
    (root / "harness" / "train.py").write_text("pass\n")
    assert describe_code(root).code_hash != before.code_hash
    (snapshot / "harness" / "train.py").write_text("pass\n")
    with pytest.raises(ConfigError, match="the snapshot was edited"):
        describe_code(snapshot)


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_attempt_facts_stand_beside_the_identity(tmp_path: Path) -> None:
    write_attempt(tmp_path, {"device": "cpu"})
    record = json.loads((tmp_path / "attempt.json").read_text())
    assert (record["device"], record["pid"]) == ("cpu", os.getpid())
