"""Which cells an experiment asks for: rules become numbers, cells beside the grid are planned, mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment

from harness.config import ConfigError
from harness.plan import plan_experiment
from harness.records import Plan, RunRecord

SMALL, LARGE = {"n_layer": 1, "n_head": 2, "d_model": 8}, {"n_layer": 1, "n_head": 2, "d_model": 16}
STEP = 128


def plan_grid(data_dir: Path, sections: dict[str, Any] | None = None, **grid: Any) -> Plan:
    table = {"sizes": [SMALL, LARGE], "tokens": [8 * STEP, 16 * STEP], **grid}
    return plan_experiment(tiny_experiment(data_dir, grid=table, **(sections or {})))


def count_warmup(run: RunRecord) -> int:
    """Return the parameters of the blocks and of the head: what the rule model_size counts."""
    return run.cells[0].n_params_non_embedding + run.what.model.d_model * run.what.model.vocab_size


def roles(plan: Plan, role: str) -> list[tuple[int, int, int]]:
    return [(cell.d_model, cell.seed, cell.n_steps) for cell in plan.cells if cell.role == role]


def test_extra_cells_join_the_trunk_of_their_size_and_may_be_held_out(data_dir: Path) -> None:
    extra = [
        {"size": SMALL, "steps": 32},
        {"size": LARGE, "tokens": 64 * STEP, "hold_out": True},
        {"size": SMALL, "steps": 8, "seed": 7},
    ]
    base, plan = plan_grid(data_dir), plan_grid(data_dir, extra=extra)
    assert {cell.cell_id for cell in base.cells} < {cell.cell_id for cell in plan.cells}
    assert roles(plan, "held_out") == [(16, 0, 64)]
    assert {run.run_id for run in base.runs} < {run.run_id for run in plan.runs}
    assert len(plan.runs) == len(base.runs) + 1, "only the new seed needs a trunk of its own"
    with pytest.raises(ConfigError, match=r"grid\.extra: .* is planned twice, as grid and as held_out"):
        plan_grid(data_dir, extra=[{"size": SMALL, "steps": 8, "hold_out": True}])
    with pytest.raises(ConfigError, match=r"grid\.extra\.0: has tokens and steps; give exactly one"):
        plan_grid(data_dir, extra=[{"size": SMALL, "steps": 8, "tokens": 1024}])


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_a_cell_from_scratch_is_a_run_of_its_own_at_the_horizon_of_its_branch(data_dir: Path, schedule: str) -> None:
    base = plan_grid(data_dir)
    plan = plan_grid(data_dir, scratch={"cells": "cheapest", "n": 2, "schedule": schedule})
    assert {cell.cell_id for cell in base.cells} < {cell.cell_id for cell in plan.cells}
    assert roles(plan, "scratch") == roles(base, "grid")[:2]
    for run in plan.runs:
        if run.cells[0].role == "scratch":
            assert len(run.cells) == 1
            assert (run.what.n_steps, run.what.schedule.kind) == (run.cells[0].n_steps, schedule)
    with pytest.raises(ConfigError, match=r"grid\.scratch: no fitted cell branches off a trunk"):
        plan_grid(data_dir, {"schedule": {"kind": "linear"}}, scratch={"cells": "cheapest"})


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("optim.lr", {"optim": {"lr": {"rule": "step_law"}, "global_batch_size": 8}}),
        ("optim.global_batch_size", {"optim": {"lr": 1e-3, "global_batch_size": {"rule": "deepseek"}}}),
        (
            "optim.weight_decay",
            {"optim": {"lr": 1e-3, "global_batch_size": 8, "weight_decay": {"rule": "timescale", "factor": 5.0}}},
        ),
        ("schedule.warmup_tokens", {"schedule": {"kind": "wsd", "warmup_tokens": {"rule": "budget_fraction", "factor": 0.1}}}),
    ],
)
def test_a_rule_that_reads_the_budget_is_refused_while_trunks_are_shared(
    data_dir: Path, key: str, sections: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=rf'{key}={{ rule = .* reads the budget, but under schedule\.kind="wsd"'):
        plan_grid(data_dir, sections)
    alone = {"tokens": [80_000]} if key == "optim.global_batch_size" else {"tokens": [8 * STEP]}
    plan_grid(data_dir, sections, **alone)  # one budget shares nothing


def test_rules_of_the_size_give_each_size_its_own_number(data_dir: Path) -> None:
    sections = {
        "optim": {"lr": {"rule": "olmo"}, "global_batch_size": 8, "weight_decay": {"rule": "product", "factor": 1e-4}},
        "schedule": {"kind": "wsd", "warmup_tokens": {"rule": "model_size", "factor": 0.1}},
    }
    plan = plan_grid(data_dir, sections)
    assert len(plan.runs) == 2
    for run in plan.runs:
        assert run.what.optim.lr * run.what.optim.weight_decay == pytest.approx(1e-4)
        assert run.what.schedule.n_warmup_steps == round(0.1 * count_warmup(run) / STEP)
    written = {"lr": plan.runs[0].what.optim.lr, "weight_decay": plan.runs[0].what.optim.weight_decay, "global_batch_size": 8}
    warmup = plan.runs[0].what.schedule.n_warmup_steps * STEP
    same = plan_grid(data_dir, {"optim": written, "schedule": {"kind": "wsd", "warmup_tokens": warmup}})
    assert plan.runs[0].run_id == same.runs[0].run_id, "a rule is not part of an id, its number is"


def test_data_on_paper_is_planned_and_two_sources_are_refused(data_dir: Path) -> None:
    paper = {"vocab_size": 512, "train_tokens": 10**9, "val_tokens": 10**6}
    plan = plan_grid(data_dir, {"data": {"on_paper": paper, "seq_len": 16}})
    assert (plan.data.content_id, plan.data.train_tokens) == ("on paper", 10**9)
    for data in ({"seq_len": 16}, {"seq_len": 16, "dir": str(data_dir), "on_paper": paper}):
        with pytest.raises(ConfigError, match=r"data: needs a prepared directory \(dir\) or figures \(on_paper\)"):
            plan_grid(data_dir, {"data": data})
