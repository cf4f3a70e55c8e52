"""Rules say what their papers print, and mup's factors are 1 at the base."""

import math

import pytest

from model.parametrization import (
    BATCH_RULES,
    DECAY_RULES,
    LR_RULES,
    WARMUP_RULES,
    Scale,
    find_role,
    scale_attention,
    scale_eps,
    scale_init,
    scale_lr,
    scale_output,
    scale_residual,
    scale_weight_decay,
)
from model.size import ModelConfig, SizeError, resolve_model


def build(d_model: int, n_head: int = 4, n_layer: int = 2, **options: object) -> ModelConfig:
    mup = {"parametrization": "mup", "base_d_model": 64, "base_d_head": 16, "base_n_layer": 2}
    shape = {"n_layer": n_layer, "n_head": n_head, "d_model": d_model, "vocab_size": 65, "seq_len": 32}
    return resolve_model("nanogpt", **shape, **{**mup, **options})


def list_factors(config: ModelConfig) -> list[float]:
    roles = ("input", "hidden", "output", "vector")
    factors = [rule(config, role) for rule in (scale_init, scale_lr, scale_weight_decay) for role in roles]
    factors += [scale_eps(config, name) for name in ("blocks.0.mlp.up.weight", "head.weight")]
    return [*factors, scale_output(config), scale_residual(config), (scale_attention(config) or config.d_head**-0.5) * 4]


def test_at_the_base_mup_is_standard() -> None:
    assert list_factors(build(64)) == [1.0] * 17


def test_standard_scales_nothing_at_any_width() -> None:
    standard = dict.fromkeys(("parametrization", "base_d_model", "base_d_head", "base_n_layer"))
    assert list_factors(build(256, n_head=16, n_layer=8, **standard)) == [1.0] * 17


def test_four_times_the_width_by_table_8() -> None:
    wide = build(256, n_head=4, n_layer=8)
    assert [scale_init(wide, role) for role in ("input", "hidden", "output", "vector")] == [1, 0.5, 1, 1]
    assert [scale_lr(wide, role) for role in ("input", "hidden", "output", "vector")] == [1, 0.25, 1, 1]
    assert scale_lr(wide, "hidden") * scale_weight_decay(wide, "hidden") == 1
    assert (scale_output(wide), scale_residual(wide)) == (0.25, 0.25)
    assert scale_eps(wide, "blocks.7.norm_1.weight") == scale_eps(wide, "blocks.0.mlp.up.weight") == 1 / 16
    assert {scale_eps(wide, name) for name in ("token_embedding.weight", "norm.weight", "head.weight")} == {1.0}
    assert scale_attention(wide) == pytest.approx(math.sqrt(16) / 64), "1/d_head, and 1/sqrt(16) at the base"


def test_roles_follow_names() -> None:
    named = {"token_embedding.weight": "input", "position_embedding.weight": "input", "head.weight": "output"}
    named |= {"blocks.0.mlp.down.weight": "hidden", "blocks.0.attention.qkv.weight": "hidden"}
    assert {name: find_role(name, 2) for name in named} == named
    assert find_role("head.bias", 1) == find_role("norm.weight", 1) == "vector"


def describe_scale(n_params: int, n_head: int = 0, tokens: int = 10**10) -> Scale:
    return Scale(n_params, n_params + n_head, tokens, flops_per_token_non_embedding=10**9)


def test_rules_give_the_numbers_of_their_papers() -> None:
    """Spot values worked out by hand from the printed formulas."""
    scale, eight = describe_scale(108_000_000), describe_scale(864_000_000)
    assert LR_RULES["olmo"](scale) == pytest.approx(0.0047)
    assert LR_RULES["olmo"](eight) == pytest.approx(0.00235)
    assert LR_RULES["step_law"](scale) == pytest.approx(1.79 * math.exp(-0.713 * math.log(1.08e8) + 0.307 * math.log(1e10)))
    assert LR_RULES["deepseek"](scale) == pytest.approx(0.3118 * 10 ** (-19 / 8))
    assert LR_RULES["kaplan"](scale) == pytest.approx(0.003239 - 0.0001395 * 18.4976, rel=1e-4)
    assert BATCH_RULES["olmo"](scale) == pytest.approx(160 * 2048)
    assert BATCH_RULES["olmo"](eight) == pytest.approx(4 * 160 * 2048)
    assert BATCH_RULES["step_law"](scale) == pytest.approx(0.58 * 10**5.71)
    assert BATCH_RULES["deepseek"](scale) == pytest.approx(0.2920 * 10 ** (19 * 0.3271))
    assert WARMUP_RULES["model_size"](scale) == 108_000_000
    assert WARMUP_RULES["budget_fraction"](scale) == 10**10
    assert DECAY_RULES["product"](1e-3, 500) == pytest.approx(1e3)
    assert DECAY_RULES["timescale"](1e-3, 500) == pytest.approx(2.0)


def test_only_the_olmo_rules_count_the_head() -> None:
    """Porian et al. and OLMo-core leave out the token embedding alone; the others leave out both."""
    without, with_head = describe_scale(10**7), describe_scale(10**7, n_head=10**7)
    differ = {rule.__name__ for rule in (*LR_RULES.values(), *BATCH_RULES.values()) if rule(without) != rule(with_head)}
    assert differ == {"compute_olmo_lr", "compute_olmo_batch"}


def test_deepseeks_rule_gives_the_settings_of_its_7b_and_67b() -> None:
    """Their table 2 trains with 4.2e-4 and 3.2e-4, batches of 2,304 and 4,608 sequences of 4,096, on 2T tokens."""
    for n_params, lr, n_sequences in ((6.9e9, 4.2e-4, 2304), (67e9, 3.2e-4, 4608)):
        scale = Scale(int(n_params), int(n_params), 2 * 10**12, flops_per_token_non_embedding=int(6 * n_params))
        assert LR_RULES["deepseek"](scale) == pytest.approx(lr, rel=0.03)
        assert BATCH_RULES["deepseek"](scale) == pytest.approx(n_sequences * 4096, rel=0.1)


def test_kaplans_rule_is_refused_where_it_is_not_positive() -> None:
    assert LR_RULES["kaplan"](describe_scale(10**10)) > 0
    with pytest.raises(SizeError, match="holds up to 1e10"):
        LR_RULES["kaplan"](describe_scale(2 * 10**10))
