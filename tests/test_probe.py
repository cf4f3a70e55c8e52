"""A probe's step is the trainer's step, and a forecast made of it says so."""

from pathlib import Path

import pytest
import torch
from conftest import plan_into, read_summaries, tiny_experiment

from harness.cost import Machine, forecast_plan, key_of
from harness.plan import plan_experiment
from harness.probe import probe_sizes
from harness.runs import load_run
from harness.train import run_attempt


def test_every_size_is_probed_once(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    found = probe_sizes(plan)
    assert set(found) == {key_of(run) for run in plan.runs}
    assert all(measured.update_s > 0 and 0 < measured.micro_step_s < 1 for measured in found.values())
    forecast = forecast_plan(plan, Machine(), found).forecast
    assert forecast is not None
    assert forecast.basis == "probe"


@pytest.mark.slow
def test_a_probe_foretells_the_training(data_dir: Path, tmp_path: Path) -> None:
    """The best of three tries each, and a wide bound: other work on the machine slows one or the other (BENCHMARKS: +11%)."""
    grid = {"sizes": [{"n_layer": 4, "n_head": 4, "d_model": 128}], "steps": [120]}
    sections = {
        "grid": grid,
        "schedule": {"kind": "constant"},
        "data": {"dir": str(data_dir), "seq_len": 64, "max_epochs": 100.0},
    }
    sections |= {"optim": {"lr": 1e-3, "global_batch_size": 16}, "eval": {}, "track": {"log_every_steps": 20}}
    torch.set_num_threads(1)
    expected, actual = [], []
    for attempt in range(3):
        plan = plan_experiment(tiny_experiment(data_dir, **sections))
        forecast = forecast_plan(plan, Machine(), probe_sizes(plan)).forecast
        assert forecast is not None
        expected.append(forecast.cells[0].train_s)
        run_dir = plan_into(tmp_path / str(attempt), data_dir, **sections)
        assert run_attempt(run_dir, None, None) == 0
        actual.append(read_summaries(run_dir)[0]["train_s"])
        assert load_run(run_dir).cells[0].n_steps == 120
    print("probe over training:", min(expected) / min(actual))
    assert min(expected) == pytest.approx(min(actual), rel=0.5)
