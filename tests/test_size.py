"""Counts are exact, and impossible shapes are refused in words."""

import pytest

from model.ladder import PUBLISHED, format_count, iter_ladder, parse_count, published_model
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


def test_ladder_grows_and_keeps_its_bounds() -> None:
    options = {"preset": "nanogpt", "aspect": 32, "d_head": 16, "vocab_size": 65, "seq_len": 64}
    sizes = [count_params(c).n_params_non_embedding for c in iter_ladder(2e4, 5e6, **options)]
    assert sizes == sorted(sizes)
    assert len(sizes) >= 5
    assert sizes[0] >= 2e4
    assert sizes[-1] <= 5e6
    with pytest.raises(SizeError, match="empty or endless"):
        list(iter_ladder(5.0, 1.0, **options))


def test_counts_read_and_write() -> None:
    assert parse_count("0.01M") == 10_000
    assert parse_count("250_000") == 250_000
    assert parse_count("1.5b") == 1.5e9
    assert format_count(10_788_929) == "10.8M"
    with pytest.raises(SizeError, match="not a count"):
        parse_count("many")
