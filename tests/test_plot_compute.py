"""The figures about compute as descriptions: axes, scales, how many marks and lines; captions that say what is not identified."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_experiment import LAW, write_experiment

from harness.records import CellForecast, Forecast
from harness.runs import load_plan
from results.plot import Picture
from results.plot_compute import draw_compute, plot_isoflop, try_isoflop
from results.study import Study, fit_study
from results.table import load_cells, load_curves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return write_experiment(tmp_path_factory.mktemp("compute"), data_dir)


@pytest.fixture(scope="module")
def study(finished: Path) -> Study:
    return fit_study("fake", load_cells(finished))


@pytest.fixture(scope="module")
def pictures(finished: Path, study: Study) -> dict[str, Picture]:
    plan = load_plan(finished)
    cells = tuple(CellForecast(cell_id=cell.cell_id, train_s=30.0, device_s=30.0) for cell in plan.cells)
    told = Forecast(
        basis="roofline", device="d", n_devices=1, device_hours=1, wall_s=1, disk_bytes=1, price=None, sizes=(), cells=cells
    )
    drawn = draw_compute(study, load_curves(finished), plan.model_copy(update={"forecast": told}))
    return {picture.name: picture for picture in drawn}


@pytest.mark.parametrize(
    ("name", "n_panels", "x_label", "scales", "n_marks"),
    [
        ("curves_vs_flops", 1, "training FLOPs", ("log", "log"), 0),
        ("optimum", 2, "training FLOPs (C = 6 N D)", ("log", "log"), 0),
        ("surface", 1, "all parameters (N)", ("log", "log"), 22),
        ("tokens_per_param", 1, "training FLOPs (C = 6 N D)", ("log", "log"), 22),
        ("parity", 1, "fitted or predicted loss", ("linear", "linear"), 22),
        ("pairs", 16, "", ("linear", "linear"), 0),
        ("seed_noise", 1, "training FLOPs (C = 6 N D)", ("log", "linear"), 3),
        ("forecast", 1, "forecast seconds in training steps", ("log", "log"), 22),
        ("throughput", 2, "all parameters", ("log", "log"), 22),
    ],
)
def test_figure_has_its_panels_axes_and_marks(
    pictures: dict[str, Picture], name: str, n_panels: int, x_label: str, scales: tuple[str, str], n_marks: int
) -> None:
    panels = pictures[name].figure.axes
    assert len(panels) == n_panels
    assert panels[0].get_xlabel() == x_label
    assert (panels[0].get_xscale(), panels[0].get_yscale()) == scales
    marks = [line for line in panels[0].lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in marks) == n_marks
    assert any(character.isdigit() for character in pictures[name].caption)


def test_every_figure_that_these_cells_support_is_described_above(pictures: dict[str, Picture]) -> None:
    assert len(pictures) == 9, "no budgets of equal compute were planned, so there are no slices"


def test_the_optimum_is_the_laws_and_published_laws_lie_beside(pictures: dict[str, Picture], study: Study) -> None:
    assert study.fitted is not None
    own, *published = [line for line in pictures["optimum"].figure.axes[0].lines if len(line.get_xdata()) > 2]
    wanted = [study.fitted.fit.constants.allocate(flops).n_params for flops in own.get_xdata()]
    np.testing.assert_allclose(np.asarray(own.get_ydata(), dtype=float), wanted, rtol=1e-9)
    assert [line.get_linestyle() for line in published] == ["--", ":"]


def test_forecast_says_the_ratio(pictures: dict[str, Picture]) -> None:
    assert "measured over forecast 2.00" in pictures["forecast"].caption


def make_slices(study: Study, sizes: tuple[float, ...]) -> Study:
    """Return a study of three budgets, cells at these multiples of the best size."""
    like = study.cells.iloc[0].to_dict()
    rows = []
    for flops in (1e9, 1e10, 1e11):
        for factor in sizes:
            n_params = LAW.allocate(flops).n_params * factor
            counts = dict.fromkeys(("n_params", "n_params_non_embedding", "n_params_matmul"), n_params)
            tokens = flops / 6 / n_params
            number = {"cell_id": f"c{len(rows)}", "run_id": f"r{len(rows)}", "tokens": tokens, "flops": flops, "flops_6nd": flops}
            rows.append(like | counts | number | {"val_loss": float(LAW.loss(n_params, tokens))})
    return replace(study, cells=pd.DataFrame(rows))


def test_slices_show_their_lowest_points_where_there_are_any(study: Study) -> None:
    whole = make_slices(study, (0.15, 0.3, 0.6, 1.0, 1.8, 3.0, 6.0))
    frontier = try_isoflop(whole)
    assert frontier is not None
    assert frontier.n_params.exponent == pytest.approx(LAW.optimum_exponent, abs=0.01)
    (axes,) = plot_isoflop(whole, frontier).figure.axes
    assert [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"] == [7, 7, 7]
    assert len([line for line in axes.lines if line.get_marker() == "D"]) == 3
    edge = plot_isoflop(make_slices(study, (2.0, 3.0, 4.0, 6.0, 9.0, 12.0)), frontier)
    assert "3 of 3 slices show no lowest point" in edge.caption
    assert not [line for line in edge.figure.axes[0].lines if line.get_marker() == "D"]
