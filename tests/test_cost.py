"""A plan's cost: shared trunks once, runs packed onto devices, a named cluster's figures, a probe in place of the roofline."""

from pathlib import Path

import pytest
from conftest import tiny_experiment

from harness.config import ConfigError
from harness.cost import Machine, Measured, forecast_plan, key_of, load_machine, pack_runs
from harness.plan import plan_experiment
from harness.records import Forecast, Plan


def forecast(plan: Plan, machine: Machine | None = None, seconds: float | None = None) -> Forecast:
    measured = {key_of(run): Measured(seconds, seconds) for run in plan.runs} if seconds is not None else None
    found = forecast_plan(plan, machine or Machine(), measured).forecast
    assert found is not None
    return found


def test_a_trunk_is_paid_once_and_evaluations_too(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir, eval={}))
    found = forecast(plan, seconds=0.5)  # one second a step
    assert found.basis == "probe"
    pass_s = plan.data.val_tokens / 128 / 3
    assert [cell.train_s for cell in found.cells] == [8, 16, 8, 16]
    for first, second in (found.cells[:2], found.cells[2:]):
        assert first.device_s == pytest.approx(8 + pass_s)
        assert second.device_s == pytest.approx(12 - 6 + 4 + pass_s), "from the first branch to the second, and its cooldown"
    assert found.device_hours == pytest.approx(sum(cell.device_s for cell in found.cells) / 3600)
    every = forecast(plan_experiment(tiny_experiment(data_dir, eval={"every_tokens": 128 * 4})), seconds=0.5)
    assert every.cells[0].device_s == pytest.approx(8 + 3 * pass_s)


def test_runs_are_packed_longest_first() -> None:
    assert pack_runs([3.0, 1.0, 2.0, 2.0], 2) == 4.0
    assert pack_runs([3.0, 1.0], 8) == 3.0


def test_more_devices_take_less_time_and_no_fewer_hours(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    one, two = forecast(plan, Machine()), forecast(plan, Machine(n_devices=2, price_per_device_hour=3.0))
    assert two.wall_s < one.wall_s
    assert (two.device_hours, one.price) == (one.device_hours, None)
    assert two.price == pytest.approx(3 * one.device_hours)


def test_disk_holds_checkpoints_and_weights(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    found = forecast(plan)
    n = [run.cells[0].n_params for run in plan.runs]
    assert found.disk_bytes == 2 * 12 * sum(n) + 3 * 12 * max(n) + 2 * 4 * sum(n)


def test_a_micro_batch_that_does_not_fit_is_replaced_by_the_largest_that_does(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    roomy = forecast(plan).sizes[1]
    assert (roomy.fits, roomy.micro_batch_size) == (True, 8)
    state = sum(roomy.memory[key] for key in ("weights", "optimizer", "buffers"))
    part = (roomy.memory["activations"] + roomy.memory["logits"]) / 8
    # Room for three sequences and the gradients of earlier micro-steps: two divide the batch of eight.
    tight = Machine(memory_gib=(state + roomy.memory["gradients"] + 3.2 * part) / 0.92 / 2**30)
    found = forecast(plan, tight).sizes[1]
    assert (found.fits, found.micro_batch_size, found.n_micro_steps) == (False, 2, 4)
    assert found.memory["peak"] <= 0.92 * tight.accelerator.memory_bytes
    assert forecast(plan, Machine(memory_gib=1e-9)).sizes[0].stages[3].micro_batch_size is None


def test_a_cluster_has_its_machine_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('scheduler = "local"\n[machine]\ndevice = "A100"\nn_devices = 16\nprice_per_device_hour = 2\n')
    machine = load_machine(str(path))
    assert (machine.accelerator.name, machine.n_devices, machine.links.intra_bytes_per_s) == ("A100", 16, 300e9)
    assert load_machine("local").device == "CPU"
    path.write_text('[machine]\ndevise = "A100"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: machine\.unknown key devise; did you mean device\?"):
        load_machine(str(path))
    with pytest.raises(ConfigError, match=r"machine\.device='abacus', is not in the table of devices; use one of B200"):
        _ = Machine(device="abacus").accelerator


def test_an_older_plan_without_a_forecast_still_loads(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    document = plan.model_dump(mode="json", exclude={"forecast", "findings"})
    assert Plan.model_validate(document).forecast is None
    stored = forecast_plan(plan, Machine())
    assert Plan.model_validate(stored.model_dump(mode="json")) == stored
