"""The figures as descriptions: axes, scales, how many marks and lines; and that they are the same bytes each time."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fake_experiment import change_summary, find_summaries, write_experiment
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from results.plot import Picture, draw_pictures, pick_shades, push_apart, write_pictures
from results.study import Study, fit_study
from results.table import load_cells, load_curves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return write_experiment(tmp_path_factory.mktemp("plot"), data_dir)


@pytest.fixture
def fake(finished: Path, tmp_path: Path) -> Path:
    """A finished experiment that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "fake"))


@pytest.fixture(scope="module")
def curves(finished: Path) -> pd.DataFrame:
    return load_curves(finished)


@pytest.fixture(scope="module")
def study(finished: Path) -> Study:
    return fit_study("fake", load_cells(finished))


@pytest.fixture(scope="module")
def pictures(study: Study, curves: pd.DataFrame) -> dict[str, Picture]:
    return {picture.name: picture for picture in draw_pictures(study, curves)}


def count_marks(axes: Axes, hollow: bool = False) -> int:
    """Count the marks of cells; hollow ones are filled with white."""
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    return sum(len(line.get_xdata()) for line in marks if (line.get_markerfacecolor() == "white") == hollow)


def list_texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("name", "x_label", "n_bands", "labels"),
    [
        ("loss_vs_params", "all parameters (N)", 4, ["tokens", "12.8K", "25.6K", "51.2K", "102K"]),
        ("loss_vs_tokens", "training tokens (D)", 5, ["parameters"]),
        ("loss_vs_flops", "training FLOPs (C = 6 N D)", 1, ["parameters", "best seen", "best split"]),
        ("learning_curves", "training tokens", 0, ["parameters"]),
    ],
)
def test_figure_has_its_axes_marks_bands_and_labels(
    pictures: dict[str, Picture], name: str, x_label: str, n_bands: int, labels: list[str]
) -> None:
    (axes,) = pictures[name].figure.axes
    assert axes.get_xlabel() == x_label
    assert axes.get_ylabel() == "validation loss (nats per token)"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert count_marks(axes) == 22
    assert len(axes.collections) == n_bands
    assert set(labels) <= set(list_texts(axes))


def test_curves_of_the_law_pass_where_the_law_says(pictures: dict[str, Picture], study: Study) -> None:
    assert study.fitted is not None
    (axes,) = pictures["loss_vs_params"].figure.axes
    line = next(line for line in axes.lines if line.get_marker() != "o")
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    tokens = float(study.cells["planned_tokens"].min())
    np.testing.assert_allclose(y, study.fitted.fit.constants.loss(x, tokens), rtol=1e-9)


def test_residuals_have_three_panels_with_every_cell(pictures: dict[str, Picture]) -> None:
    by_n, by_d, quantiles = pictures["residuals"].figure.axes
    assert (count_marks(by_n), count_marks(by_d)) == (22, 22)
    assert len(quantiles.collections[0].get_offsets()) == 22
    assert by_n.get_ylabel() == "residual (% of loss)"


def test_every_label_lies_inside_the_figure_and_off_the_others(pictures: dict[str, Picture]) -> None:
    for picture in pictures.values():
        picture.figure.draw_without_rendering()
        canvas = picture.figure.bbox
        for axes in picture.figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            for i, box in enumerate(boxes):
                assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1 + 1, (picture.name, axes.texts[i].get_text())
                assert not any(box.overlaps(other) for other in boxes[:i]), picture.name
            ticks = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
            inside = [box for box in ticks if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1]
            assert len(inside) >= 2, f"{picture.name}: an axis needs two numbers to be read"
            assert not any(left.x1 > right.x0 for left, right in pairwise(inside)), picture.name


def test_captions_say_numbers(pictures: dict[str, Picture]) -> None:
    for picture in pictures.values():
        assert any(character.isdigit() for character in picture.caption)
        assert picture.caption.endswith(".")


def test_a_cell_that_is_not_fitted_is_hollow(fake: Path) -> None:
    change_summary(find_summaries(fake)[3], skipped_steps=1)
    drawn = draw_pictures(fit_study("fake", load_cells(fake)), load_curves(fake))
    for picture in drawn[:4]:
        (axes,) = picture.figure.axes
        assert (count_marks(axes), count_marks(axes, hollow=True)) == (21, 1)
    assert "1 hollow ones were not fitted" in drawn[0].caption


def test_without_a_fit_cells_are_joined_and_without_cells_nothing_is_drawn(fake: Path) -> None:
    paths = find_summaries(fake)
    for path in paths[4:]:
        path.unlink()
    study = fit_study("fake", load_cells(fake))
    assert study.fitted is None
    drawn = draw_pictures(study, load_curves(fake))
    assert [picture.name for picture in drawn] == ["loss_vs_params", "loss_vs_tokens", "loss_vs_flops", "learning_curves"]
    assert all(not picture.figure.axes[0].collections for picture in drawn)
    for path in paths[:4]:
        path.unlink()
    assert draw_pictures(fit_study("fake", load_cells(fake)), load_curves(fake)) == []


def test_one_cell_alone_can_be_drawn(fake: Path, tmp_path: Path) -> None:
    for path in find_summaries(fake)[1:]:
        path.unlink()
    pictures = draw_pictures(fit_study("fake", load_cells(fake)), load_curves(fake))
    assert len(write_pictures(pictures, tmp_path / "figures")) == 12


def test_the_same_study_gives_the_same_bytes(study: Study, curves: pd.DataFrame, tmp_path: Path) -> None:
    first = write_pictures(draw_pictures(study, curves)[:1], tmp_path / "a")
    second = write_pictures(draw_pictures(study, curves)[:1], tmp_path / "b")
    assert [path.name for path in first] == ["loss_vs_params.png", "loss_vs_params.svg", "loss_vs_params.pdf"]
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_pyplot_is_not_loaded_and_settings_are_left_alone(study: Study, curves: pd.DataFrame) -> None:
    before = dict(mpl.rcParams)
    draw_pictures(study, curves)
    assert dict(mpl.rcParams) == before
    probe = "import results.plot, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True)


def luminance(color: str) -> float:
    """Return relative luminance as WCAG 2 defines it."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


@pytest.mark.parametrize("count", [2, 5, 8])
def test_shades_darken_step_by_step_and_all_show_on_white(count: int) -> None:
    values = [luminance(shade) for shade in pick_shades(count)]
    assert values == sorted(values, reverse=True)
    assert min(np.diff(values[::-1])) > 0.01
    assert 1.05 / (values[0] + 0.05) > 1.7


@given(wanted=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_are_pushed_apart_and_keep_their_order(wanted: list[float]) -> None:
    placed = push_apart(wanted, gap=0.06)
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])
    for upper, lower in pairwise(order):
        assert placed[upper] - placed[lower] >= 0.06 - 1e-9
    assert max(placed) <= 0.93 + 1e-9
    assert min(placed) >= 0.0
