"""Rules say what their papers print, and mup's factors are 1 at the base."""

import math
from dataclasses import replace

import pytest

from model.parametrization import (
    BATCH_RULES,
    DECAY_RULES,
    LR_RULES,
    WARMUP_RULES,
    Scale,
    find_role,
    scale_attention,
    scale_init,
    scale_lr,
    scale_output,
    scale_residual,
    scale_weight_decay,
)
from model.size import ModelConfig, resolve_model


def build(d_model: int, n_head: int = 4, n_layer: int = 2, **options: object) -> ModelConfig:
    mup = {"parametrization": "mup", "base_d_model": 64, "base_d_head": 16, "base_n_layer": 2}
    shape = {"n_layer": n_layer, "n_head": n_head, "d_model": d_model, "vocab_size": 65, "seq_len": 32}
    return resolve_model("nanogpt", **shape, **{**mup, **options})


def list_factors(config: ModelConfig) -> list[float]:
    roles = ("input", "hidden", "output", "vector")
    factors = [rule(config, role) for rule in (scale_init, scale_lr, scale_weight_decay) for role in roles]
    return [*factors, scale_output(config), scale_residual(config), (scale_attention(config) or config.d_head**-0.5) * 4]


def test_at_the_base_mup_is_standard() -> None:
    assert list_factors(build(64)) == [1.0] * 15


def test_standard_scales_nothing_at_any_width() -> None:
    standard = dict.fromkeys(("parametrization", "base_d_model", "base_d_head", "base_n_layer"))
    assert list_factors(build(256, n_head=16, n_layer=8, **standard)) == [1.0] * 15


def test_four_times_the_width_by_table_8() -> None:
    wide = build(256, n_head=4, n_layer=8)
    assert [scale_init(wide, role) for role in ("input", "hidden", "output", "vector")] == [1, 0.5, 1, 1]
    assert [scale_lr(wide, role) for role in ("input", "hidden", "output", "vector")] == [1, 0.25, 1, 1]
    assert scale_lr(wide, "hidden") * scale_weight_decay(wide, "hidden") == 1
    assert (scale_output(wide), scale_residual(wide)) == (0.25, 0.25)
    assert scale_attention(wide) == pytest.approx(math.sqrt(16) / 64), "1/d_head, and 1/sqrt(16) at the base"


def test_roles_follow_names() -> None:
    named = {"token_embedding.weight": "input", "position_embedding.weight": "input", "head.weight": "output"}
    named |= {"blocks.0.mlp.down.weight": "hidden", "blocks.0.attention.qkv.weight": "hidden"}
    assert {name: find_role(name, 2) for name in named} == named
    assert find_role("head.bias", 1) == find_role("norm.weight", 1) == "vector"


def test_rules_give_the_numbers_of_their_papers() -> None:
    """Spot values worked out by hand from the printed formulas."""
    scale = Scale(
        n_params_non_embedding=108_000_000, n_params_matmul=120_000_000, tokens=10**10, flops_per_token_non_embedding=10**9
    )
    assert LR_RULES["olmo"](scale) == pytest.approx(0.0047)
    eight = replace(scale, n_params_non_embedding=864_000_000)
    assert LR_RULES["olmo"](eight) == pytest.approx(0.00235)
    assert LR_RULES["step_law"](scale) == pytest.approx(1.79 * math.exp(-0.713 * math.log(1.08e8) + 0.307 * math.log(1e10)))
    assert LR_RULES["deepseek"](scale) == pytest.approx(0.3118 * 10 ** (-19 / 8))
    assert LR_RULES["kaplan"](scale) == pytest.approx(0.003239 - 0.0001395 * 18.4976, rel=1e-4)
    assert BATCH_RULES["step_law"](scale) == pytest.approx(0.58 * 10**5.71)
    assert BATCH_RULES["deepseek"](scale) == pytest.approx(0.2920 * 10 ** (19 * 0.3271))
    assert WARMUP_RULES["model_size"](scale) == 120_000_000
    assert WARMUP_RULES["budget_fraction"](scale) == 10**10
    assert DECAY_RULES["product"](1e-3, 500) == pytest.approx(1e3)
    assert DECAY_RULES["timescale"](1e-3, 500) == pytest.approx(2.0)
