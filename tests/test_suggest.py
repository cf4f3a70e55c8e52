"""Proposed cells are affordable, new, trainable, and shrink the target; written out, they plan."""

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_experiment

from harness.config import ConfigError
from harness.plan import plan_experiment
from harness.records import Plan
from results.preflight import choose_prior, read_grid
from results.suggest import render_suggestion, render_toml, suggest_cells

SIZES = [{"n_layer": 1, "n_head": 2, "d_model": d_model} for d_model in (8, 16, 32, 64)]
GRID = {"sizes": SIZES, "tokens": [128 * 250, 128 * 400, 128 * 700]}


@pytest.fixture
def plan(data_dir: Path) -> Plan:
    return plan_experiment(tiny_experiment(data_dir, grid=GRID))


@pytest.mark.parametrize("target", ["optimum", "loss", "exponent"])
def test_proposals_fit_the_budget_and_shrink_the_target(plan: Plan, target: str) -> None:
    grid = read_grid(plan)
    law, planned = choose_prior(grid, plan.data.vocab_size), {(cell.size, cell.tokens) for cell in plan.cells}
    found = suggest_cells(plan, law, 2e11, target, 1e13)
    assert found.choices
    assert sum(choice.flops for choice in found.choices) <= 2e11
    chosen = [(choice.like.size, choice.tokens) for choice in found.choices]
    assert len(set(chosen)) == len(chosen)
    assert not set(chosen) & planned
    assert all(choice.tokens % 128 == 0 and choice.tokens >= 128 * 200 for choice in found.choices)
    sds = [found.sd_before, *(choice.sd for choice in found.choices)]
    assert np.all(np.diff(sds) <= 1e-9)
    assert sds[-1] < sds[0]
    assert f"to know the {target} better, for 2e+11 FLOPs" in render_suggestion(found, 2e11)


def test_the_written_cells_are_the_key_extra(plan: Plan, data_dir: Path) -> None:
    import tomllib

    law = choose_prior(read_grid(plan), plan.data.vocab_size)
    found = suggest_cells(plan, law, 2e11, "optimum", 1e13, at_most=3)
    extra = tomllib.loads(render_toml(found, plan))["extra"]
    again = plan_experiment(tiny_experiment(data_dir, grid=GRID | {"extra": extra}))
    added = [(cell.size, cell.tokens) for cell in again.cells if cell.cell_id not in {c.cell_id for c in plan.cells}]
    assert sorted(added) == sorted((choice.like.size, choice.tokens) for choice in found.choices)
    assert len(added) == 3


def test_a_budget_that_buys_nothing_is_refused(plan: Plan) -> None:
    law = choose_prior(read_grid(plan), plan.data.vocab_size)
    with pytest.raises(ConfigError, match=r"--flops=10, buys no cell; the cheapest takes"):
        suggest_cells(plan, law, 10.0, "optimum", 1e13)
    with pytest.raises(ConfigError, match=r"--target=fame, is not one; use one of optimum, loss, exponent"):
        suggest_cells(plan, law, 1e12, "fame", 1e13)
