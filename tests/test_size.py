"""Counts are exact, and impossible shapes are refused in words."""

import pytest

from model.ladder import PUBLISHED, published_model
from model.size import SizeError, count_flops, count_params, resolve_model

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
    with pytest.raises(SizeError, match="use one of video, nanogpt, gpt2"):
        resolve_model("llama", **SMALL)
    with pytest.raises(SizeError, match=r"model\.n_heads=2"):
        resolve_model("nanogpt", **SMALL, n_heads=2)


def test_the_default_mlp_written_out_is_the_same_model() -> None:
    assert resolve_model("nanogpt", **SMALL, d_ff=32) == resolve_model("nanogpt", **SMALL)
