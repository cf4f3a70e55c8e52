"""Counts are exact, and impossible shapes are refused in words."""

import pytest

from model.ladder import PUBLISHED, published_model
from model.size import (
    SizeError,
    compare_chinchilla,
    count_flops,
    count_params,
    list_flop_conventions,
    resolve_model,
)

SMALL = {"n_layer": 2, "n_head": 2, "d_model": 8, "vocab_size": 11, "seq_len": 4}


def test_published_sizes_have_their_published_parameters() -> None:
    assert count_params(published_model("video-10M")).n_params == 10_788_929
    assert count_params(published_model("nanogpt-10M")).n_params == 10_745_088
    assert count_params(published_model("gpt2-124M")).n_params == 124_439_808
    assert count_params(published_model("gpt2-1.5B")).n_params == 1_557_611_200


@pytest.mark.parametrize("name", PUBLISHED)
def test_conventions_are_sums_of_components(name: str) -> None:
    params = count_params(published_model(name))
    assert params.n_params_non_embedding == params.attention + params.mlp + params.norms
    assert params.n_params_matmul == params.attention_matrices + params.mlp_matrices + params.head_matrix
    assert params.n_params > params.n_params_non_embedding


def test_flops_per_token_is_palms_formula() -> None:
    config = published_model("gpt2-124M")
    params = count_params(config)
    assert count_flops(config).flops_per_token == 6 * params.n_params_matmul + 12 * 12 * 768 * 1024


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SizeError, match=r"model: n_head=3, does not divide d_model=8; use 2 or 4"):
        resolve_model("nanogpt", **{**SMALL, "n_head": 3})


def test_unknown_preset_and_key_are_named() -> None:
    with pytest.raises(SizeError, match="use one of video, nanogpt, gpt2, modern"):
        resolve_model("llama", **SMALL)
    with pytest.raises(SizeError, match=r"model\.n_heads=2"):
        resolve_model("nanogpt", **SMALL, n_heads=2)


def test_the_default_mlp_written_out_is_the_same_model() -> None:
    assert resolve_model("nanogpt", **SMALL, d_ff=32) == resolve_model("nanogpt", **SMALL)
    assert resolve_model("modern", **SMALL, d_ff=24) == resolve_model("modern", **SMALL)
    assert resolve_model("modern", **SMALL, d_ff=32) != resolve_model("modern", **SMALL)


def test_options_that_came_later_are_null_where_unused() -> None:
    """So that they stand in no hash: the presets that there were have none of them."""
    later = {"stage", "n_kv_head", "qk_norm", "rope_theta", "padded_vocab_size", "parametrization"}
    later |= {"base_d_model", "base_d_head", "base_n_layer"}
    for preset in ("video", "nanogpt", "gpt2"):
        assert {
            key: value for key, value in resolve_model(preset, **SMALL).model_dump().items() if key in later
        } == dict.fromkeys(later)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_head": 8, "n_kv_head": 3}, "n_kv_head=3, does not divide n_head=8; use 2 or 4"),
        ({"n_head": 8, "positions": "rotary"}, "d_head=1 is odd"),
        ({"rope_theta": 5e5}, "rope_theta=500000, needs rotary positions"),
        ({"padded_vocab_size": 10}, "padded_vocab_size=10, is below vocab_size=11; use for example 64"),
        ({"parametrization": "mup"}, "needs the width that it is relative to; add base_d_model"),
        ({"base_d_model": 8}, "base_d_model=8, is for mup"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(SizeError, match=expected):
        resolve_model("nanogpt", **{**SMALL, **options})


@pytest.mark.parametrize(
    ("d_model", "n_layer", "n_head", "ratio"),
    [
        (640, 10, 10, 1.025),
        (1024, 20, 16, 1.101),
        (1280, 24, 10, 1.083),
        (1792, 26, 14, 1.044),
        (2048, 28, 16, 1.033),
        (3584, 40, 28, 0.994),
    ],
)
def test_chinchillas_table_a4_is_reproduced(d_model: int, n_layer: int, n_head: int, ratio: float) -> None:
    shape = {"d_model": d_model, "n_layer": n_layer, "n_head": n_head}
    config = resolve_model("gpt2", **shape, seq_len=2048, vocab_size=32_000)
    assert compare_chinchilla(config) == pytest.approx(ratio, abs=5e-4)


def test_flop_conventions_differ_by_what_their_names_say() -> None:
    config = published_model("gpt2-124M")
    flops, table = count_flops(config), list_flop_conventions(config)
    full = table["exact: matrices, scores, head"]
    assert full == flops.flops_per_token == flops.forward.flops_per_token + flops.backward.flops_per_token
    assert flops.backward.flops_per_token == 2 * flops.forward.flops_per_token
    assert full - table["exact, no scores"] == flops.attention_scores
    assert full - table["exact, no head"] == flops.head == 6 * 768 * 50_257
    assert full - table["exact, causal half of the scores"] == flops.attention_scores * 1023 // 2048
    assert table["6 n_params_matmul"] == table["exact, no scores"]
