"""A plan resolves everything, ids depend on what is trained and on nothing else, and impossible grids are refused."""

import re
from pathlib import Path

import pytest
from conftest import tiny_experiment, tiny_table

from harness.config import ConfigError, parse_experiment
from harness.plan import check_micro_batch, plan_experiment
from harness.records import Optim, Plan, What, hash_record
from harness.schedule import Schedule
from model.size import resolve_model

SMALL, LARGE = {"n_layer": 1, "n_head": 2, "d_model": 8}, {"n_layer": 1, "n_head": 2, "d_model": 16}
STEP = 128  # tokens of a step: global_batch_size 8 x seq_len 16


def grid(**keys: object) -> dict[str, object]:
    return {"sizes": [SMALL, LARGE], "tokens": [8 * STEP, 16 * STEP], **keys}


def cell_ids(plan: Plan) -> set[str]:
    return {cell.cell_id for cell in plan.cells}


def test_under_wsd_budgets_share_a_trunk(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir))
    assert [len(run.cells) for run in plan.runs] == [2, 2]
    for run in plan.runs:
        for cell in run.cells:
            assert cell.branch_step + cell.n_cooldown_steps == cell.n_steps == cell.tokens // STEP
            assert cell.n_cooldown_steps == cell.n_steps // 4
        assert run.flops < sum(cell.flops for cell in run.cells)


def test_other_schedules_make_a_run_of_every_budget(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir, schedule={"kind": "cosine", "warmup_tokens": 256}))
    assert [len(run.cells) for run in plan.runs] == [1, 1, 1, 1]
    assert all(cell.branch_step == cell.n_steps for cell in plan.cells)
    assert all(run.what.n_steps == run.cells[0].n_steps for run in plan.runs)


def test_ids_do_not_depend_on_position_how_or_paths(data_dir: Path, tmp_path: Path) -> None:
    base = plan_experiment(tiny_experiment(data_dir))
    link = tmp_path / "elsewhere"
    link.symlink_to(data_dir)
    reordered = plan_experiment(
        tiny_experiment(
            link,
            name="other",
            grid=grid(sizes=[LARGE, SMALL], tokens=[16 * STEP, 8 * STEP]),
            engine={"device": "auto", "micro_batch_size": 2},
            track={"log_every_steps": 7},
            eval={},
        )
    )
    assert cell_ids(reordered) == cell_ids(base)
    assert {run.run_id for run in reordered.runs} == {run.run_id for run in base.runs}


@pytest.mark.parametrize(
    "section",
    [
        {"seed": 1},
        {"precision": "bf16_autocast"},
        {"data": {"dir": "", "seq_len": 16, "seed": 5}},
        {"data": {"dir": "", "seq_len": 8}},
        {"model": {"preset": "nanogpt", "dropout": 0.1}},
        {"optim": {"lr": 1e-3, "global_batch_size": 8}},
        {"optim": {"lr": 3e-3, "global_batch_size": 8, "weight_decay": 0.0}},
        {"schedule": {"kind": "wsd", "warmup_tokens": 384, "cooldown_fraction": 0.25}},
        {"eval": {"stride": 8}},
    ],
)
def test_ids_change_with_what_is_trained(data_dir: Path, section: dict[str, object]) -> None:
    if "data" in section:
        section = {"data": {**section["data"], "dir": str(data_dir)}}  # type: ignore[dict-item]
    base, other = plan_experiment(tiny_experiment(data_dir)), plan_experiment(tiny_experiment(data_dir, **section))
    assert not cell_ids(base) & cell_ids(other)
    assert not {run.run_id for run in base.runs} & {run.run_id for run in other.runs}


def test_a_cooldown_changes_the_cells_but_not_the_trunk(data_dir: Path) -> None:
    schedule = {"kind": "wsd", "warmup_tokens": 256, "cooldown_fraction": 0.5}
    base, other = (
        plan_experiment(tiny_experiment(data_dir)),
        plan_experiment(tiny_experiment(data_dir, schedule=schedule)),
    )
    assert {run.run_id for run in base.runs} == {run.run_id for run in other.runs}
    assert not cell_ids(base) & cell_ids(other)


def test_a_grid_extends_without_new_ids(data_dir: Path) -> None:
    base = plan_experiment(tiny_experiment(data_dir))
    third = {"n_layer": 2, "n_head": 2, "d_model": 16}
    longer = plan_experiment(
        tiny_experiment(data_dir, grid=grid(sizes=[SMALL, LARGE, third], tokens=[8 * STEP, 16 * STEP, 32 * STEP]))
    )
    assert cell_ids(base) < cell_ids(longer)
    assert {run.run_id for run in base.runs} < {run.run_id for run in longer.runs}


def test_repeats_are_further_seeds_of_the_cheapest_cell(data_dir: Path) -> None:
    plan = plan_experiment(tiny_experiment(data_dir, grid=grid(repeats={"cells": "cheapest", "n": 2})))
    repeats = [cell for cell in plan.cells if cell.role == "repeat"]
    assert [(cell.seed, cell.d_model, cell.tokens) for cell in repeats] == [(1, 8, 8 * STEP), (2, 8, 8 * STEP)]
    assert len({cell.run_id for cell in repeats}) == 2


def test_axes_multiply_the_grid_and_repeats_keep_their_variant(data_dir: Path) -> None:
    axes = {"optim.weight_decay": [0.0, 0.1], "optim.lr": [1e-3, 3e-3]}
    plan = plan_experiment(tiny_experiment(data_dir, grid=grid(axes=axes, repeats={"cells": "cheapest", "n": 1})))
    assert len(plan.cells) == 2 * 2 * 4 + 1
    optims = {(run.what.optim.weight_decay, run.what.optim.lr) for run in plan.runs}
    assert optims == {(0.0, 1e-3), (0.0, 3e-3), (0.1, 1e-3), (0.1, 3e-3)}
    (repeat,) = [run for run in plan.runs if run.cells[0].role == "repeat"]
    assert (repeat.what.optim.weight_decay, repeat.what.optim.lr) == (0.0, 1e-3)
    with pytest.raises(ConfigError, match=r"grid\.axes: unknown key optim\.l;"):
        plan_experiment(tiny_experiment(data_dir, grid=grid(axes={"optim.l": [1]})))
    with pytest.raises(ConfigError, match=r"grid\.axes: name, is not an axis"):
        plan_experiment(tiny_experiment(data_dir, grid=grid(axes={"name": ["a"]})))


def test_hold_out_marks_the_largest(data_dir: Path) -> None:
    by_size = plan_experiment(tiny_experiment(data_dir, grid=grid(hold_out={"sizes": "largest"})))
    assert {cell.d_model for cell in by_size.cells if cell.role == "held_out"} == {16}
    by_budget = plan_experiment(tiny_experiment(data_dir, grid=grid(hold_out={"budgets": "largest"})))
    assert {cell.n_steps for cell in by_budget.cells if cell.role == "held_out"} == {16}
    assert cell_ids(by_size) == cell_ids(by_budget) == cell_ids(plan_experiment(tiny_experiment(data_dir)))


def test_budgets_by_flops_steps_and_ratio(data_dir: Path) -> None:
    def tokens_of(**budget: object) -> list[int]:
        table = {"sizes": [SMALL], **budget}
        return [cell.tokens for cell in plan_experiment(tiny_experiment(data_dir, grid=table)).cells]

    (cell,) = plan_experiment(tiny_experiment(data_dir, grid={"sizes": [SMALL], "steps": [8]})).cells
    assert tokens_of(steps=[8]) == [8 * STEP]
    assert tokens_of(flops=[8.0 * STEP * cell.flops_per_token]) == [8 * STEP]
    assert tokens_of(tokens_per_param=[8 * STEP / cell.n_params]) == [8 * STEP]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"grid": grid(sizes=[{"n_layer": 1, "n_head": 3, "d_model": 8}])},
            "n_head=3, does not divide d_model=8; use 2",
        ),
        ({"grid": grid(tokens=[STEP - 1])}, "127 tokens, is smaller than one step"),
        ({"grid": grid(tokens=[8 * STEP + 60])}, r"1,084 tokens, is missed by 5\.5% .*; use 1,024"),
        ({"grid": grid(tokens=[2_000 * STEP])}, r"data\.max_epochs=4, a budget of 256,000 tokens is .* epochs"),
        ({"schedule": {"kind": "wsd", "warmup_tokens": 7 * STEP}}, r"schedule\.warmup_tokens=896, is 7 steps of the 8"),
        ({"engine": {"micro_batch_size": 3}}, r"global_batch_size=8 is not a multiple of .* = 3 x 1 = 3; use 9"),
        ({"eval": {"stride": 17}}, r"eval\.stride=17, leaves tokens unscored; use at most data\.seq_len=16"),
    ],
)
def test_impossible_grids_are_refused(data_dir: Path, sections: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_experiment(tiny_experiment(data_dir, **sections))
    assert re.search(expected, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_validation_split_shorter_than_a_window_is_refused(data_dir: Path) -> None:
    table = tiny_table(data_dir, data={"dir": str(data_dir), "seq_len": 4000})
    with pytest.raises(ConfigError, match=r"data\.seq_len=4000, is longer than the validation split"):
        plan_experiment(parse_experiment(table, where="x"))


def test_the_batch_must_divide_over_the_ranks() -> None:
    assert check_micro_batch(64, None, 4) == 16
    assert check_micro_batch(64, 8, 4) == 8
    with pytest.raises(ConfigError, match=r"= 8 x 3 = 24; use 72"):
        check_micro_batch(64, 8, 3)
    with pytest.raises(ConfigError, match="world_size=3; use 63"):
        check_micro_batch(64, None, 3)


def test_an_id_of_the_first_version_stays(data_dir: Path) -> None:
    """Keys that came later are null where unused; an id that moves would train a finished cell again."""
    schedule = Schedule(kind="cosine", n_warmup_steps=5, min_lr_fraction=0.1)
    optim = {"kind": "adamw", "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
    what = What(
        model=resolve_model("nanogpt", n_layer=2, n_head=2, d_model=32, vocab_size=65, seq_len=64),
        precision="fp32",
        data_content_id="0" * 64,
        seed=0,
        data_seed=0,
        optim=Optim(**optim, global_batch_size=16),
        schedule=schedule,
        eval_stride=64,
        n_steps=100,
    )
    assert hash_record(what.model_dump(mode="json"))[:10] == "5c4e8730de"


def test_variants_change_keys_together_and_may_have_their_own_budget(data_dir: Path) -> None:
    variants = [{"optim.lr": 1e-2, "grid.tokens": [4 * STEP]}, {"model.preset": "video", "model.dropout": 0.1}]
    grid_table = {"sizes": [SMALL], "tokens": [8 * STEP], "seeds": [0, 1], "variants": variants}
    plan = plan_experiment(tiny_experiment(data_dir, grid=grid_table))
    found = {(run.what.optim.lr, run.what.model.activation, run.what.model.dropout, run.cells[0].tokens) for run in plan.runs}
    assert found == {(1e-2, "gelu", 0.0, 4 * STEP), (3e-3, "relu", 0.1, 8 * STEP)}
    assert len(plan.cells) == 4


@pytest.mark.parametrize("key", ["name", "data.seq_len", "grid.sizes", "lr"])
def test_a_variant_varies_what_is_trained_and_nothing_else(data_dir: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"grid\.variants: {key}, cannot vary"):
        plan_experiment(tiny_experiment(data_dir, grid=grid(variants=[{key: 1}])))


def test_a_rule_gives_each_size_and_budget_its_learning_rate(data_dir: Path) -> None:
    optim = {"lr": {"rule": "step_law", "factor": 0.5}, "global_batch_size": 8}
    cosine = {"kind": "cosine"}
    plan = plan_experiment(tiny_experiment(data_dir, optim=optim, schedule=cosine))
    for cell in plan.cells:
        expected = 0.5 * 1.79 * cell.n_params_non_embedding**-0.713 * cell.requested_tokens**0.307
        assert cell.lr == pytest.approx(expected)
    assert len({cell.lr for cell in plan.cells}) == 4
    same = plan_experiment(tiny_experiment(data_dir, optim={"lr": plan.cells[0].lr, "global_batch_size": 8}, schedule=cosine))
    assert plan.cells[0].cell_id in cell_ids(same), "a rule is not part of an id, its number is"


def test_the_olmo_rules_count_the_heads_matrix_tied_or_not(data_dir: Path) -> None:
    optim = {"lr": {"rule": "olmo"}, "global_batch_size": {"rule": "olmo"}}
    for tied in (True, False):
        table = {"model": {"preset": "nanogpt", "tied": tied}, "grid": {"sizes": [SMALL], "tokens": [80_000]}}
        for cell in plan_experiment(tiny_experiment(data_dir, optim=optim, **table)).cells:
            n_params = cell.n_params_non_embedding + cell.d_model * cell.vocab_size
            assert cell.lr == pytest.approx(0.0047 * (n_params / 108e6) ** (-1 / 3))
            assert cell.global_batch_size == round(160 * 2048 * (n_params / 108e6) ** (2 / 3) / cell.seq_len)


def test_a_batch_rule_rounds_to_whole_multiples_and_needs_tokens(data_dir: Path) -> None:
    optim = {"lr": 1e-3, "global_batch_size": {"rule": "step_law", "multiple_of": 4}}
    table = {"sizes": [SMALL], "tokens": [80_000]}
    (cell,) = plan_experiment(tiny_experiment(data_dir, optim=optim, grid=table, schedule={"kind": "constant"})).cells
    assert cell.global_batch_size == 4 * round(0.58 * 80_000**0.571 / 16 / 4)
    with pytest.raises(ConfigError, match=r"follows from the tokens, and grid\.steps from the batch"):
        plan_experiment(tiny_experiment(data_dir, optim=optim, grid={"sizes": [SMALL], "steps": [8]}))


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (-1.0, r"optim\.lr=-1\.0, is refused: input should be greater than 0"),
        ({"rule": "mine"}, r"optim\.lr\.rule='mine', is refused: input should be 'olmo'"),
        ({"rule": "olmo", "facto": 1}, r"unknown key optim\.lr\.facto"),
    ],
)
def test_a_number_or_a_rule_is_refused_as_what_it_is(data_dir: Path, lr: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        tiny_experiment(data_dir, optim={"lr": lr, "global_batch_size": 8})


def test_init_from_is_part_of_the_id_by_its_content(data_dir: Path, tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (
        plan_experiment(tiny_experiment(data_dir, model={"preset": "nanogpt", "init_from": str(tmp_path / name)}))
        for name in "abc"
    )
    assert cell_ids(a) == cell_ids(b)
    assert not cell_ids(a) & (cell_ids(c) | cell_ids(plan_experiment(tiny_experiment(data_dir))))
    with pytest.raises(ConfigError, match=r"there is no model\.safetensors"):
        plan_experiment(tiny_experiment(data_dir, model={"preset": "nanogpt", "init_from": str(tmp_path / "d")}))
