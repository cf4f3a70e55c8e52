"""The report sets the plan's doubts and forecast beside what came; a cell from scratch is compared, never fitted."""

from pathlib import Path

from conftest import tiny_experiment
from fake_experiment import GRID, change_summary, find_summaries, write_experiment

from harness.cost import Machine, forecast_plan
from harness.plan import plan_experiment
from harness.runs import load_plan
from results.hindsight import compare_forecast, compare_scratch, list_doubts
from results.table import load_cells


def test_the_forecast_stands_beside_the_clock(data_dir: Path, tmp_path: Path) -> None:
    experiment_dir = write_experiment(tmp_path, data_dir)
    plan = load_plan(experiment_dir)
    assert compare_forecast(plan, load_cells(experiment_dir)) == ["No forecast was stored with the plan."]
    plan = forecast_plan(plan, Machine())
    assert plan.forecast is not None
    expected = {cell.cell_id: cell.train_s for cell in plan.forecast.cells}
    for path in find_summaries(experiment_dir):
        change_summary(path, train_s=1.5 * expected[path.parent.name])
    _, actual = compare_forecast(plan, load_cells(experiment_dir))
    assert "22 finished cells: geometric mean 1.50, from 1.50 to 1.50" in actual


def test_doubts_are_told_by_rule_and_field(data_dir: Path) -> None:
    doubts = list_doubts(plan_experiment(tiny_experiment(data_dir, grid=GRID)))
    assert any(doubt.startswith("few_trunks (grid.sizes): ") for doubt in doubts)


def test_a_cell_from_scratch_is_set_beside_its_branch(data_dir: Path, tmp_path: Path) -> None:
    grid = {**GRID, "repeats": None, "scratch": {"cells": "cheapest", "n": 2, "schedule": "linear"}}
    experiment_dir = write_experiment(tmp_path, data_dir, grid=grid)
    cells = load_cells(experiment_dir)
    scratch = cells[cells["role"] == "scratch"]
    assert (scratch["exclusion_reason"] == "from scratch: trained to be compared with its branch, never fitted").all()
    for path in find_summaries(experiment_dir):
        if path.parent.name in set(scratch["cell_id"]):
            branch = cells[(cells["role"] == "grid") & (cells["size"] == "l1-h2-d8")].set_index("planned_tokens")["val_loss"]
            planned = int(scratch.set_index("cell_id").loc[path.parent.name, "planned_tokens"])
            change_summary(path, val_loss=float(branch[planned]) + 0.01)
    lines = list(compare_scratch(load_cells(experiment_dir)))
    assert len(lines) == 2
    assert all("from scratch under linear" in line and "+0.0100 against its branch" in line for line in lines)
