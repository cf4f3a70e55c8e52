"""Ladders and the way counts are read and written."""

import itertools

import pytest
from rich.console import Console
from typer.testing import CliRunner

from model import __main__ as command_line
from model.ladder import ASPECTS, format_count, iter_ladder, iter_rungs, parse_count, published_model
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


@pytest.mark.parametrize("preset", ["video", "nanogpt", "gpt2", "modern"])
def test_rungs_go_from_ten_thousand_to_175_billion_and_say_how_far_they_are_off(preset: str) -> None:
    rungs = list(iter_rungs(1e4, 175e9, per_decade=3, preset=preset, d_head=None, vocab_size=65, seq_len=64))
    assert (rungs[0].nominal, rungs[-1].nominal) == (1e4, 175e9)
    assert len(rungs) == 23
    for rung in rungs:
        assert rung.achieved == count_params(rung.config).n_params_non_embedding
        assert rung.off == pytest.approx(rung.achieved / rung.nominal - 1)
        assert ASPECTS[0] <= rung.config.d_model / rung.config.n_layer <= ASPECTS[1]
        assert abs(rung.off) < (0.3 if rung.nominal < 1e5 else 0.12)
    for small, large in itertools.pairwise(rungs):
        assert small.achieved < large.achieved
        assert small.config.d_head <= large.config.d_head
        assert small.config.d_model <= large.config.d_model
        assert small.config.n_layer <= large.config.n_layer


def test_the_largest_rung_is_gpt3s_shape() -> None:
    (rung,) = iter_rungs(175e9, 175e9, per_decade=1, preset="gpt2", d_head=128, vocab_size=50_257, seq_len=2048)
    assert rung.config.size == published_model("gpt3-175B").size == "l96-h96-d12288"
    assert count_params(published_model("gpt3-175B")).n_params == pytest.approx(175e9, rel=0.01)


def test_no_shape_within_the_constraints_is_refused() -> None:
    with pytest.raises(SizeError, match=r"no shape with d_head=32768 has d_model / n_layer between 32 and 128"):
        list(iter_rungs(1e4, 1e4, per_decade=1, preset="gpt2", d_head=32768, vocab_size=65, seq_len=64))


def print_ladder(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    monkeypatch.setattr(command_line, "build_console", lambda: Console(width=width))
    result = CliRunner().invoke(command_line.app, ["ladder", "--from", "0.01M", "--to", "175B"])
    assert result.exit_code == 0
    return [line.rstrip() for line in result.output.splitlines()]


def test_the_table_fits_a_terminal_and_shows_components_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = print_ladder(monkeypatch, 80), print_ladder(monkeypatch, 160)
    rows = [[line for line in lines if "l96-h96-d12288" in line] for lines in (narrow, wide)]
    assert rows[0][0].split() == ["175B", "-0.6%", "l96-h96-d12288", "174B", "174B", "174B", "1.05T", "0.997"]
    assert [text for text in rows[1][0].split() if text not in rows[0][0].split()] == [
        "799K",
        "3.15M",
        "58B",
        "116B",
        "2.37M",
        "tied",
    ]
    assert max(map(len, (line for line in narrow if " l" in line))) <= 80
    assert not any("…" in line for line in narrow + wide)
    assert "parameters by component: in a terminal of 128 columns" in narrow[-1]
