"""Each rule is silent on a sound grid and, on a grid with its mistake alone, names the cells and the field."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment

from harness.config import parse_experiment
from harness.confounds import find_horizon
from harness.plan import plan_experiment
from harness.records import Finding, Plan

# Eleven trunks, tokens per parameter from about 5 to 100, half of the smallest model outside embeddings: nothing to find.
SIZES = [{"n_layer": n, "n_head": n, "d_model": 16 * n} for n in range(1, 12)]
PAPER = {"vocab_size": 64, "train_tokens": 10**10, "val_tokens": 10**8}


def plan_paper(**sections: Any) -> Plan:
    table: dict[str, Any] = {
        "name": "paper",
        "precision": "fp32",
        "data": {"on_paper": PAPER, "seq_len": 64},
        "model": {"preset": "nanogpt", "positions": "rotary"},
        "optim": {"lr": 1e-3, "global_batch_size": 1},
        "schedule": {"kind": "wsd", "warmup_tokens": 640},
        "grid": {"sizes": SIZES, "tokens_per_param": [5, 20, 90, 100]},
    }
    return plan_experiment(parse_experiment(table | sections, where="paper.toml"))


def grid(**keys: Any) -> dict[str, Any]:
    return {"grid": {"sizes": SIZES, "tokens_per_param": [5, 20, 90, 100]} | keys}


def test_a_sound_grid_passes_every_rule() -> None:
    assert plan_paper().findings == ()


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "long_warmup": (
        {"schedule": {"kind": "wsd", "warmup_tokens": 6400}},
        "schedule.warmup_tokens",
        r"up to \d+% of the training",
    ),
    "horizon": ({"schedule": {"kind": "constant"}}, "schedule.kind", "has not decayed at the budget"),
    "few_steps": (
        {"optim": {"lr": 1e-3, "global_batch_size": 16}, "schedule": {"kind": "wsd"}},
        "optim.global_batch_size",
        r"only \d+ steps",
    ),
    "constant_heads": (
        grid(sizes=[size | {"n_head": 1} for size in SIZES]),
        "model.n_head",
        "n_head=1 at every width from 16 to 176",
    ),
    "small_validation": (
        {"data": {"on_paper": PAPER | {"val_tokens": 1_000}, "seq_len": 64}},
        "data.val_tokens",
        "1,000 validation tokens leave a difference uncertain",
    ),
    "repetition": (
        {"data": {"on_paper": PAPER | {"train_tokens": 10**7}, "seq_len": 64, "max_epochs": 100.0}},
        "data.max_epochs",
        "epochs, more than 4",
    ),
    "embedding_rungs": (
        {"data": {"on_paper": PAPER | {"vocab_size": 4096}, "seq_len": 64}},
        "grid.sizes",
        r"up to \d\d% of the parameters are embeddings",
    ),
    "narrow_ratios": (grid(tokens_per_param=[10, 40]), "grid", r"2 tokens-per-parameter ratio\(s\) over a factor of 4"),
    "diagonal": (grid(tokens_per_param=[20]), "grid", "tokens follow one power of the parameters in every cell"),
    "few_trunks": (grid(sizes=SIZES[2:]), "grid.sizes", r"9 trunk\(s\) for the 5 parameters"),
}


@pytest.mark.parametrize("rule", BAD)
def test_a_grid_with_one_mistake_is_told_so(rule: str) -> None:
    sections, field, words = BAD[rule]
    plan = plan_paper(**sections)
    assert {finding.rule for finding in plan.findings} == {rule}
    (found,) = plan.findings
    assert_names(found, plan, field)
    import re

    assert re.search(words, found.message), found.message


def assert_names(found: Finding, plan: Plan, field: str) -> None:
    assert (found.severity, found.field) == ("warning", field)
    assert found.cells
    assert set(found.cells) <= {cell.cell_id for cell in plan.cells}
    assert found.message.startswith(found.cells[0])


def test_a_schedule_that_decays_towards_another_budget_is_an_error() -> None:
    plan = plan_paper(schedule={"kind": "cosine"})
    assert list(find_horizon(plan)) == []
    first, *others = plan.runs
    spoilt = first.model_copy(update={"what": first.what.model_copy(update={"n_steps": 2 * first.cells[0].n_steps})})
    (found,) = find_horizon(plan.model_copy(update={"runs": (spoilt, *others)}))
    assert (found.severity, found.field) == ("error", "n_steps")
    assert first.cells[0].cell_id in found.message


def test_a_sweep_is_not_judged_as_a_law(data_dir: Path) -> None:
    sizes = [{"n_layer": 1, "n_head": 2, "d_model": d_model} for d_model in (8, 16)]
    swept = {"sizes": sizes, "tokens": [128 * 400, 128 * 800], "axes": {"optim.lr": [1e-3, 2e-3]}}
    assert plan_experiment(tiny_experiment(data_dir, grid=swept)).findings == ()
    plain = swept | {"axes": {}}
    assert {found.rule for found in plan_experiment(tiny_experiment(data_dir, grid=plain)).findings} >= {
        "few_trunks",
        "constant_heads",
    }
