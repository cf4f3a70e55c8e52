"""Whatever differs between cells is meant to, follows from a rule, or is an error that names the field and cells."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment

from harness.config import ConfigError, Experiment
from harness.lint import lint_plan, refuse_errors, sort_fields
from harness.plan import plan_experiment
from harness.records import Plan


def spoil(plan: Plan, **what: Any) -> Plan:
    """Change what fixes the first run, as no experiment file could."""
    first, *others = plan.runs
    changed = first.what.model_copy(update=what)
    return plan.model_copy(update={"runs": (first.model_copy(update={"what": changed}), *others)})


def errors(plan: Plan, experiment: Experiment) -> list[str]:
    return [f"{found.field}: {found.message}" for found in lint_plan(plan, experiment) if found.severity == "error"]


def test_a_plan_without_tricks_has_no_error_and_sorts_its_fields(data_dir: Path) -> None:
    experiment = tiny_experiment(data_dir, optim={"lr": {"rule": "olmo"}, "global_batch_size": 8})
    plan = plan_experiment(experiment)
    assert errors(plan, experiment) == []
    kinds = sort_fields(plan, experiment)
    assert kinds["meant to vary"] == ["model.d_model"]
    assert kinds["derived by a rule"] == ["optim.lr"]
    assert {"precision", "optim.weight_decay", "tokenizer", "engine.zero_stage"} <= set(kinds["equal"])


@pytest.mark.parametrize(
    ("field", "confound"),
    [
        ("precision", "different numerics"),
        ("eval_stride", "not meant to vary"),
        ("data_content_id", "different text"),
        ("init_sha256", "initialisation"),
    ],
)
def test_a_field_that_nobody_varied_is_an_error(data_dir: Path, field: str, confound: str) -> None:
    experiment = tiny_experiment(data_dir)
    plan = plan_experiment(experiment)
    value: Any = 8 if field == "eval_stride" else "bf16_autocast"
    (error,) = errors(spoil(plan, **{field: value}), experiment)
    assert error.startswith(f"{field}: differs between cells")
    assert confound in error
    assert plan.cells[0].cell_id in error
    assert plan.cells[-1].cell_id in error
    with pytest.raises(ConfigError, match=f"^{field}: differs between cells"):
        refuse_errors(lint_plan(spoil(plan, **{field: value}), experiment))


def test_the_shape_beside_its_sizes_must_be_equal(data_dir: Path) -> None:
    experiment = tiny_experiment(data_dir)
    plan = plan_experiment(experiment)
    spoilt = spoil(plan, model=plan.runs[0].what.model.model_copy(update={"dropout": 0.5}))
    assert errors(spoilt, experiment)[0].startswith("model.dropout: differs")


def test_how_can_be_an_error_too(data_dir: Path) -> None:
    experiment = tiny_experiment(data_dir)
    plan = plan_experiment(experiment)
    first, *others = plan.runs
    how = first.how.model_copy(update={"engine": first.how.engine.model_copy(update={"zero_stage": 3})})
    spoilt = plan.model_copy(update={"runs": (first.model_copy(update={"how": how}), *others)})
    (error,) = errors(spoilt, experiment)
    assert "different numerics between ZeRO stages" in error


def test_a_confound_on_purpose_is_a_warning(data_dir: Path) -> None:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 8], "axes": {"model.init_std": [0.01, 0.02]}}
    plan = plan_experiment(tiny_experiment(data_dir, grid=grid))
    (found,) = [finding for finding in plan.findings if finding.rule == "confound"]
    assert (found.severity, found.field) == ("warning", "model.init_std")
    assert "different initialisation" in found.message


def test_a_variant_of_the_preset_may_change_every_option(data_dir: Path) -> None:
    variants = [{}, {"model.preset": "video"}]
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 8], "variants": variants}
    experiment = tiny_experiment(data_dir, grid=grid)
    assert errors(plan_experiment(experiment), experiment) == []
