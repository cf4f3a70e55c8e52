"""Ladders and the way counts are read and written."""

import pytest

from model.ladder import format_count, iter_ladder, parse_count, published_model
from model.size import SizeError, count_params


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


def test_an_unknown_published_size_lists_the_known() -> None:
    with pytest.raises(SizeError, match="use one of video-10M"):
        published_model("gpt5")
