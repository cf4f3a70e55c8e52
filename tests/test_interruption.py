"""The check that a killed and stopped run ends as a calm one: it holds, and it sees what is planted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment

from harness.config import Experiment
from harness.interruption import CASES, Case, compare, render_markdown, shorten, verify_resume
from harness.parity import has_failed
from harness.plan import plan_experiment
from harness.runs import list_attempts, read_json


@pytest.fixture(scope="module")
def checked(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One real check on one rank: its folder and its table."""
    folder = tmp_path_factory.mktemp("resume")
    return folder, verify_resume(tiny_experiment(data_dir), folder, n_steps=12, cases=[Case("torch", 0, 1)])


def find_runs(folder: Path) -> tuple[Path, Path]:
    calm, broken = (next((folder / "torch-1" / way).glob("*/*/run.json")).parent for way in ("calm", "interrupted"))
    return calm, broken


def test_a_run_that_was_killed_and_stopped_ends_to_the_bit_as_a_calm_one(checked: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (row,) = checked
    assert row["verdict"] == "holds"
    assert row["n_equal"] == row["n_rows"] >= 12
    _, broken = find_runs(folder)
    states = [read_json(attempt / "outcome.json")["state"] for attempt in list_attempts(broken)[1:]]
    assert not (list_attempts(broken)[0] / "outcome.json").exists(), "the first was killed"
    assert states == ["preempted", "done"]
    assert "| torch | 1 | 5 | 9 | equal |" in render_markdown([row])
    assert not has_failed([row])


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [("train_loss", 1.0, "FAILS: other numbers"), ("receipt", "0" * 32, "FAILS: other samples"), ("step", 99, "FAILS")],
)
def test_a_planted_difference_is_seen(
    checked: tuple[Path, list[dict[str, Any]]], tmp_path: Path, key: str, value: Any, verdict: str
) -> None:
    calm, broken = find_runs(checked[0])
    copy = tmp_path / broken.name
    shutil.copytree(broken, copy)
    metrics = list_attempts(copy)[-1] / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(row for row in rows if row["kind"] == "train")[key] = value
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = compare(calm, copy)
    assert row["verdict"].startswith(verdict)
    assert has_failed([row])


def test_other_weights_and_a_run_that_did_not_finish_are_seen(checked: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    calm, broken = find_runs(checked[0])
    copy = tmp_path / broken.name
    shutil.copytree(broken, copy)
    (path,) = copy.glob("cells/*/summary.json")
    path.write_text(path.read_text().replace(read_json(path)["weights_sha256"], "0" * 64))
    assert compare(calm, copy)["verdict"] == "FAILS: other numbers"
    path.unlink()
    assert "did not finish" in compare(calm, copy)["verdict"]


def test_the_short_cell_is_the_plans_own_size_and_rate(data_dir: Path) -> None:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "steps": [40]}
    experiment: Experiment = tiny_experiment(data_dir, optim={"lr": 7e-3, "global_batch_size": 7}, grid=grid)
    for case in CASES:
        (run,) = plan_experiment(shorten(experiment, case, 30)).runs
        assert (run.what.optim.lr, run.what.optim.global_batch_size) == (7e-3, 8)
        assert (run.cells[0].d_model, run.cells[0].n_steps) == (8, 30)
        assert run.how.engine.world_size == case.world_size


def test_an_engine_that_cannot_train_the_cell_is_said_so(data_dir: Path, tmp_path: Path) -> None:
    experiment = tiny_experiment(data_dir, precision="bf16_native", engine={"kind": "deepspeed", "device": "cpu"})
    (row,) = verify_resume(experiment, tmp_path, 12, cases=[Case("torch", 0, 1)])
    assert row["verdict"].startswith("not possible")
