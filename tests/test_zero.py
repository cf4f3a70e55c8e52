"""DeepSpeed's configuration follows from the run, and what cannot work is refused before anything starts."""

import json

import pytest
from conftest import tiny_experiment
from test_end_to_end import write_toml
from typer.testing import CliRunner

from harness.__main__ import app
from harness.config import ConfigError, EngineSection
from harness.outlook import describe_findings
from harness.plan import plan_experiment
from harness.zero import FITS_BYTES, STATE_BYTES, list_cautions, render_zero_config, show_zero_configs

OPTIM = {"lr": 1e-3, "global_batch_size": 24}
DEEPSPEED = {"kind": "deepspeed", "device": "cpu"}
MUP = {"preset": "nanogpt", "parametrization": "mup", "base_d_model": 4}


GRID = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "steps": [8, 16]}


def plan(data_dir, **sections):
    return plan_experiment(tiny_experiment(data_dir, grid=GRID, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"precision": "bf16_native"}, 'does not go with engine.kind="torch"'),
        ({"precision": "bf16_native", "engine": {**DEEPSPEED, "zero_stage": 0}}, "does not go with engine.zero_stage=0"),
        ({"optim": {**OPTIM, "kind": "muon"}, "engine": DEEPSPEED}, 'optim.kind="muon", needs whole matrices'),
        ({"optim": {**OPTIM, "kind": "muon"}, "model": MUP}, "has no mup factors"),
        ({"engine": {"offload_optimizer": True}}, "belongs to ZeRO"),
        ({"engine": {**DEEPSPEED, "zero_stage": 0, "offload_optimizer": True}}, "belongs to ZeRO"),
        ({"optim": OPTIM, "engine": {"world_size": 5}}, "is not a multiple of world_size=5; use 25"),
        ({"optim": OPTIM, "engine": {"micro_batch_size": 4, "world_size": 4}}, "micro_batch_size x world_size = 4 x 4 = 16; use"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(data_dir, sections, message) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(data_dir, **sections)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_how_is_in_no_id_and_precision_is(data_dir) -> None:
    torch, zero = plan(data_dir), plan(data_dir, engine={**DEEPSPEED, "zero_stage": 3, "world_size": 2, "compile": True})
    assert [cell.cell_id for cell in torch.cells] == [cell.cell_id for cell in zero.cells]
    native = plan(data_dir, precision="bf16_native", engine=DEEPSPEED)
    assert not {run.run_id for run in native.runs} & {run.run_id for run in torch.runs}
    assert native.data.metric_id != torch.data.metric_id


@pytest.mark.parametrize(("world_size", "micro_batch_size", "n_micro_steps"), [(1, None, 1), (2, 3, 4), (4, 6, 1)])
def test_batch_numbers_agree(data_dir, world_size, micro_batch_size, n_micro_steps) -> None:
    run = plan(data_dir, optim=OPTIM).runs[0]
    config = render_zero_config(run.what, EngineSection(micro_batch_size=micro_batch_size), world_size)
    assert config["train_batch_size"] == 24
    assert config["gradient_accumulation_steps"] == n_micro_steps
    assert config["train_micro_batch_size_per_gpu"] * n_micro_steps * world_size == 24


def test_precisions_are_named_once_and_accumulate_in_fp32(data_dir) -> None:
    for precision, bf16, autocast in (("fp32", 0, 0), ("bf16_autocast", 0, 1), ("bf16_native", 1, 0)):
        config = render_zero_config(*of(plan(data_dir, precision=precision, engine=DEEPSPEED)), 1)
        assert (config["bf16"]["enabled"], config["torch_autocast"]["enabled"]) == (bool(bf16), bool(autocast))
        assert config["data_types"]["grad_accum_dtype"] == "fp32"


def of(planned):
    return planned.runs[0].what, planned.runs[0].how.engine


def test_the_configuration_is_shown_and_nothing_is_written(data_dir, tmp_path) -> None:
    toml = write_toml(tmp_path, data_dir)
    arguments = ["plan", str(toml), "--show-engine", "--runs-dir", str(tmp_path / "runs")]
    shown = CliRunner().invoke(app, [*arguments, "--set", 'engine.kind="deepspeed"', "--set", "engine.zero_stage=2"])
    configs = json.loads(shown.stdout)
    assert {config["zero_optimization"]["stage"] for config in configs.values()} == {2}
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="has no DeepSpeed configuration"):
        show_zero_configs(plan(data_dir))


def test_stage_3_for_what_fits_and_dropout_over_ranks_are_cautioned(data_dir) -> None:
    small = plan(data_dir, engine={**DEEPSPEED, "zero_stage": 3})
    assert any("engine.zero_stage=3, but the largest model's" in line for line in describe_findings(small))
    cell = small.runs[0].cells[0].model_copy(update={"n_params": round(FITS_BYTES / STATE_BYTES)})
    large = small.model_copy(update={"runs": (small.runs[0].model_copy(update={"cells": (cell,)}),)})
    assert not list_cautions(large)
    dropout = {"model": {"preset": "nanogpt", "dropout": 0.1}}
    assert not list_cautions(plan(data_dir, **dropout))
    assert "masks" in list_cautions(plan(data_dir, **dropout, engine={"world_size": 2}))[0]
