"""One row for every planned cell; nothing that did not do what was planned gets past; nothing armed leaves in a CSV."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fake_experiment import GRID, TOKENS, change_summary, find_summaries, write_experiment

from harness.config import ConfigError
from harness.runs import load_plan, write_json
from results.table import COLUMNS, disarm, load_cells, load_curves, measure_cost, measure_union, select_curve, write_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return write_experiment(tmp_path_factory.mktemp("table"), data_dir)


@pytest.fixture
def fake(finished: Path, tmp_path: Path) -> Path:
    """A finished experiment that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "fake"))


def reason_of(experiment_dir: Path, cell_id: str) -> str:
    cells = load_cells(experiment_dir).set_index("cell_id")
    assert cells.loc[cell_id, "excluded"] == bool(cells.loc[cell_id, "exclusion_reason"])
    return str(cells.loc[cell_id, "exclusion_reason"])


def test_every_planned_cell_has_a_row_and_a_calm_one_is_kept(fake: Path) -> None:
    cells = load_cells(fake)
    assert len(cells) == 22
    assert set(cells["state"]) == {"done"}
    assert not cells["excluded"].any()
    assert cells["cell_id"].is_unique
    assert (cells["tokens"] == cells["planned_tokens"]).all()
    assert set(cells["role"]) == {"grid", "repeat"}


def test_columns_are_those_of_the_format(fake: Path) -> None:
    text = (ROOT / "results/FORMAT.md").read_text()
    section = text.split("## table.csv")[1].split("\n## ")[0]
    written = [
        name for line in section.splitlines() if line.startswith("| `") for name in re.findall("`(.+?)`", line.split("|")[1])
    ]
    assert written == list(COLUMNS)
    assert list(load_cells(fake)) == written


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": TOKENS[0] - 128}, "tokens off the plan: "),
        ({"steps": 1}, "steps off the plan: 1 of"),
        ({"tokens": None}, "tokens off the plan: not recorded of"),
        ({"skipped_steps": 2}, "skipped steps: 2"),
        ({"skipped_steps": None}, "skipped steps: not recorded"),
        ({"val_loss": None}, "val_loss is missing"),
        ({"val_loss": "much"}, "val_loss is missing"),
        ({"val_loss": 0.0}, "val_loss is 0: not a finite number above 0"),
        ({"metric_id": "other"}, "another metric: other, while most cells have"),
        ({"cell_id": "another"}, "not done: failed (summary.json is that of another cell)"),
    ],
)
def test_a_cell_that_did_not_do_what_was_planned_is_left_out(fake: Path, changes: dict[str, object], reason: str) -> None:
    cell_id = change_summary(find_summaries(fake)[0], **changes)
    assert reason_of(fake, cell_id).startswith(reason)
    assert load_cells(fake)["excluded"].sum() == 1


def test_infinite_loss_is_left_out(fake: Path) -> None:
    path = find_summaries(fake)[0]
    path.write_text(re.sub(r'"val_loss": [0-9.]+', '"val_loss": Infinity', path.read_text()))
    assert reason_of(fake, path.parent.name) == "val_loss is inf: not a finite number above 0"


def test_a_tenth_of_a_percent_is_still_the_plan(fake: Path) -> None:
    path = max(find_summaries(fake), key=lambda p: json.loads(p.read_text())["tokens"])
    planned = json.loads(path.read_text())["planned_tokens"]
    assert reason_of(fake, change_summary(path, tokens=planned - planned // 1001)) == ""
    assert reason_of(fake, change_summary(path, tokens=planned - planned // 900)) != ""


def test_an_unreadable_summary_is_one_row_and_not_the_end(fake: Path) -> None:
    path = find_summaries(fake)[0]
    path.write_text("{")
    assert "cannot be read" in reason_of(fake, path.parent.name)


@pytest.mark.parametrize(("state", "reason"), [("diverged", "diverged (at step 7)"), ("oom", "not done: oom (at step 7)")])
def test_a_cell_without_a_summary_has_the_state_of_its_run(fake: Path, state: str, reason: str) -> None:
    path = find_summaries(fake)[0]
    path.unlink()
    outcome = {"state": state, "reason": "at step 7", "step": 7, "finished_utc": "2026-01-01T00:10:00+00:00", "error": None}
    write_json(path.parents[2] / "attempts/1/outcome.json", outcome)
    assert reason_of(fake, path.parent.name) == reason
    row = load_cells(fake).set_index("cell_id").loc[path.parent.name]
    assert row["state"] == state
    assert pd.isna(row["tokens"])
    assert pd.isna(row["val_loss"])
    assert row["planned_tokens"] > 0


def test_held_out_cells_are_planned_and_never_fitted(tmp_path: Path, data_dir: Path) -> None:
    fake = write_experiment(tmp_path, data_dir, grid=GRID | {"hold_out": {"sizes": "largest"}})
    cells = load_cells(fake)
    held = cells[cells["role"] == "held_out"]
    assert len(held) == 4
    assert held["exclusion_reason"].str.startswith("held out").all()
    assert cells["excluded"].sum() == 4


def test_a_tie_of_metrics_goes_to_the_plan(fake: Path) -> None:
    paths = find_summaries(fake)
    for path in paths[:11]:
        change_summary(path, metric_id="other")
    cells = load_cells(fake)
    assert cells["excluded"].sum() == 11
    assert (cells.loc[cells["excluded"], "metric_id"] == "other").all()


def test_without_a_plan_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no plan"):
        load_cells(tmp_path)


def test_written_table_reads_back_the_same(fake: Path, tmp_path: Path) -> None:
    find_summaries(fake)[0].unlink()
    cells = load_cells(fake)
    csv, parquet = write_table(cells, tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), cells)
    again = pd.read_csv(csv)
    assert list(again) == list(cells)
    np.testing.assert_array_equal(again["val_loss"], cells["val_loss"])
    before = csv.read_bytes()
    write_table(load_cells(fake), tmp_path / "out")
    assert csv.read_bytes() == before


def test_texts_cannot_start_formulas(fake: Path, tmp_path: Path) -> None:
    change_summary(find_summaries(fake)[0], device_name='=HYPERLINK("http://x")')
    csv, _ = write_table(load_cells(fake), tmp_path)
    for line in csv.read_text().splitlines():
        assert not re.search(r'(^|,)"?[=+@\t]', line), line
    assert "'=HYPERLINK" in csv.read_text()
    assert [disarm(text) for text in ("-1", "\tx", "", "l2-h2", "@a")] == ["'-1", "'\tx", "", "l2-h2", "'@a"]


def test_curves_join_the_trunk_to_each_branch(fake: Path) -> None:
    curves, cells = load_curves(fake), load_cells(fake)
    cell = cells[cells["planned_tokens"] == TOKENS[1]].iloc[0]
    curve = select_curve(curves, cell["run_id"], cell["cell_id"], cell["branch_step"])
    assert curve["step"].is_monotonic_increasing
    assert curve["step"].iloc[-1] == cell["planned_steps"]
    assert (curve.loc[curve["cell_id"].isna(), "step"] <= cell["branch_step"]).all()
    assert curve["cell_id"].dropna().unique().tolist() == [cell["cell_id"]]
    assert set(curve["kind"]) == {"train", "eval"}


def test_spent_flops_count_a_shared_trunk_once(fake: Path) -> None:
    plan = load_plan(fake)
    cost = measure_cost(fake, load_cells(fake), load_curves(fake))
    assert cost.flops == pytest.approx(sum(run.flops for run in plan.runs))
    assert cost.flops < sum(cell.flops for cell in plan.cells)


def test_unfinished_work_is_spent_as_far_as_it_was_logged(fake: Path) -> None:
    run = load_plan(fake).runs[0]
    before = measure_cost(fake, load_cells(fake), load_curves(fake)).flops
    last = max(run.cells, key=lambda cell: cell.n_steps)
    (fake / run.run_id / "cells" / last.cell_id / "summary.json").unlink()
    metrics = fake / run.run_id / "attempts/1/metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["cell_id"] != last.cell_id))
    logged = max(row["step"] for row in rows if row["cell_id"] is None)
    lost_steps = run.n_trunk_steps - logged + last.n_cooldown_steps
    expected = before - lost_steps * run.tokens_per_step * run.cells[0].flops_per_token
    assert measure_cost(fake, load_cells(fake), load_curves(fake)).flops == pytest.approx(expected)


def test_wall_time_counts_runs_side_by_side_once_and_pauses_not_at_all(fake: Path) -> None:
    assert measure_union([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
    cost = measure_cost(fake, load_cells(fake), load_curves(fake))
    assert (cost.wall_s, cost.n_attempts, cost.n_unended) == (600.0, 7, 0)
    next(fake.glob("*/attempts/1/outcome.json")).unlink()
    assert measure_cost(fake, load_cells(fake), load_curves(fake)).n_unended == 1
