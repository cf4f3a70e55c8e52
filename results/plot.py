"""The pictures: one function each, from a study to a figure with the words that belong to it.

House style: one sequential palette, small to large from light to dark, that stays apart in grey and for colour-blind
readers; labels beside lines instead of legends; logarithmic axes with plain numbers. No state of pyplot is touched, and
the same study gives the same bytes.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy.special import ndtri

from model.ladder import format_count
from results.laws import FloatArray
from results.study import Fitted, Study
from results.table import select_curve
from results.uncertainty import Quantity, estimate_spread

STYLE: dict[Any, Any] = {
    "figure.figsize": (5.6, 3.7),
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "results",  # the same ids in every SVG
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # text stays text in papers
}
INK = "#222222"
LOSS_LABEL = "validation loss (nats per token)"
# From light (small) to dark (large): viridis without its yellow end, which is lost on white paper.
PALETTE = mpl.colormaps["viridis"]
LIGHTEST, DARKEST = 0.78, 0.05
MAX_LINES = 8
# Where an axis may have its numbers within a power of ten, densest first.
TICKS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))


@dataclass(frozen=True)
class Picture:
    """A figure, its file name, its title, and a caption that says its numbers."""

    name: str
    title: str
    figure: Figure
    caption: str


def pick_shades(count: int) -> list[str]:
    """Return colours for `count` ordered series, light to dark."""
    return [mpl.colors.to_hex(PALETTE(x)) for x in np.linspace(LIGHTEST, DARKEST, count)] if count > 1 else [INK]


def draw_pictures(study: Study, curves: pd.DataFrame) -> list[Picture]:
    """Draw every figure that the study has data for."""
    if study.cells["val_loss"].notna().sum() == 0:
        return []
    with mpl.rc_context(STYLE):
        pictures = [plot_loss_vs_params(study), plot_loss_vs_tokens(study), plot_loss_vs_flops(study)]
        pictures.append(plot_learning_curves(study, curves))
        if study.fitted is not None:
            pictures.append(plot_residuals(study, study.fitted))
    return pictures


def write_pictures(pictures: Sequence[Picture], figures_dir: Path) -> list[Path]:
    """Write each figure as PNG, SVG and PDF."""
    figures_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for picture in pictures:
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
                paths.append(figures_dir / f"{picture.name}.{suffix}")
                picture.figure.savefig(paths[-1], metadata=metadata)
                picture.figure.set_layout_engine("none")  # laid out once, and alike in both files
    return paths


def plot_loss_vs_params(study: Study) -> Picture:
    """Draw loss against parameters, one line for each token budget."""
    x = study.convention.column
    figure, axes = begin_figure(f"{study.convention.words} (N)", LOSS_LABEL)
    cells = select_scored(study)
    grid = spread_grid(cells[x])
    series = split_series(cells, "planned_tokens")
    for one in series:
        draw_cells(axes, one, x)
        draw_law(axes, study, one, x, grid, loss_at(grid, one.value))
    finish_axes(axes, cells["val_loss"])
    label_lines(axes, list_labels(series), "tokens")
    caption = f"Validation loss against {study.convention.words}. {caption_series(study, series, 'token budget')}"
    return Picture("loss_vs_params", "Loss against parameters", figure, caption)


def plot_loss_vs_tokens(study: Study) -> Picture:
    """Draw loss against training tokens, one line for each size."""
    figure, axes = begin_figure("training tokens (D)", LOSS_LABEL)
    cells = select_scored(study)
    grid = spread_grid(cells["tokens"])
    series = split_series(cells, study.convention.column)
    for one in series:
        draw_cells(axes, one, "tokens")
        draw_law(axes, study, one, "tokens", grid, loss_at(one.value, grid))
    finish_axes(axes, cells["val_loss"])
    label_lines(axes, list_labels(series), "parameters")
    caption = f"Validation loss against training tokens. {caption_series(study, series, 'model size')}"
    return Picture("loss_vs_tokens", "Loss against tokens", figure, caption)


def plot_loss_vs_flops(study: Study) -> Picture:
    """Draw loss against training FLOPs: every cell, the best seen, and the loss of the fitted best split with its interval."""
    figure, axes = begin_figure("training FLOPs (C = 6 N D)", LOSS_LABEL)
    cells = select_scored(study)
    cells = cells.assign(compute=6.0 * cells[study.convention.column].astype(float) * cells["tokens"].astype(float))
    series = split_series(cells, study.convention.column)
    for one in series:
        draw_cells(axes, one, "compute")
        grid_cells = one.cells[one.cells["role"] == "grid"].sort_values("compute")
        axes.plot(grid_cells["compute"], grid_cells["val_loss"], color=one.shade, linewidth=0.8)
    labels, losses = list_labels(series), [cells["val_loss"].to_numpy(float)]
    best = cells[~cells["excluded"]].sort_values("compute")
    if len(best):
        axes.step(best["compute"], best["val_loss"].cummin(), where="post", color=INK, linewidth=0.9, linestyle=":")
        labels.append(Label(best["val_loss"].min(), "best seen", INK, ":"))
    if study.fitted is not None:
        grid = spread_grid(cells["compute"])
        frontier = draw_band(axes, study.fitted, grid, lambda law: [law.allocate(flops).loss for flops in grid], INK)
        losses.append(frontier)
        labels.append(Label(frontier[-1], "best split", INK))
    finish_axes(axes, np.concatenate(losses))
    scale_powers(axes.xaxis)
    label_lines(axes, labels, "parameters")
    return Picture("loss_vs_flops", "Loss against compute", figure, caption_flops(study, best))


def plot_learning_curves(study: Study, curves: pd.DataFrame) -> Picture:
    """Draw validation loss during training: trunks light, cooldown branches strong, finished cells marked."""
    figure, axes = begin_figure("training tokens", LOSS_LABEL)
    cells = select_scored(study)
    series = split_series(cells, study.convention.column)
    evals = curves[(curves["kind"] == "eval") & np.isfinite(curves["loss"])]
    has_branches = bool((cells["n_cooldown_steps"] > 0).any())
    for one in series:
        for run_id in one.cells["run_id"].unique():
            trunk = evals[(evals["run_id"] == run_id) & evals["cell_id"].isna()]
            alpha, width = (0.45, 1.0) if has_branches else (1.0, 1.6)
            axes.plot(trunk["tokens"], trunk["loss"], color=one.shade, alpha=alpha, linewidth=width)
        for cell in one.cells.to_dict("records"):
            axes.plot(*trace_branch(evals, cell), color=one.shade, linewidth=1.6)
        draw_cells(axes, one, "tokens")
    finish_axes(axes, cells["val_loss"])
    label_lines(axes, list_labels(series), "parameters")
    parts = " Light: trunks. Strong: the cooldown branch of each budget." if has_branches else ""
    caption = (
        f"Validation loss during training ({len(evals)} passes over the whole validation split).{parts} Marks: finished cells, "
        "whose losses the law is fitted to."
    )
    return Picture("learning_curves", "Learning curves", figure, caption)


def trace_branch(evals: pd.DataFrame, cell: dict[Hashable, Any]) -> tuple[FloatArray, FloatArray]:
    """Return tokens and losses of a cell's own evaluations, led by the point where it leaves the line drawn for its trunk.

    Note: between two evaluations of the trunk that point is interpolated; beyond its last one, it is the last one.
    """
    curve = select_curve(evals, cell["run_id"], cell["cell_id"], cell["planned_steps"])
    own = curve["cell_id"].notna().to_numpy()
    tokens, losses = curve["tokens"].to_numpy(float), curve["loss"].to_numpy(float)
    start = cell["branch_step"] * cell["global_batch_size"] * cell["seq_len"]
    on_trunk, trunk_losses = tokens[~own], losses[~own]
    if not own.any() or not on_trunk.size or start < on_trunk[0]:
        return tokens[own], losses[own]
    start = min(start, on_trunk[-1])
    loss = np.exp(np.interp(np.log(start), np.log(on_trunk), np.log(trunk_losses)))
    return np.append(start, tokens[own]), np.append(loss, losses[own])


def plot_residuals(study: Study, fitted: Fitted) -> Picture:
    """Draw what the law leaves unexplained: against parameters, against tokens, and as quantiles."""
    figure = Figure(figsize=(7.2, 2.7))
    by_n, by_d, quantiles = figure.subplots(1, 3, sharey=True)
    percent = 100 * fitted.fit.residuals
    cells = study.kept.assign(residual=percent)
    series = split_series(cells, study.convention.column)
    for one in series:
        for axes, x in ((by_n, study.convention.column), (by_d, "tokens")):
            draw_cells(axes, one, x, "residual")
    order = np.argsort(percent)
    expected = ndtri((np.arange(len(percent)) + 0.5) / len(percent))
    shade_of = {cell_id: one.shade for one in series for cell_id in one.cells["cell_id"]}
    shades = [shade_of[cell_id] for cell_id in cells["cell_id"].iloc[order]]
    quantiles.axline((0, 0), slope=float(percent.std()), color=INK, linewidth=0.8)
    quantiles.scatter(
        expected, percent[order], c=shades, s=18, edgecolors="white", linewidths=0.4 if len(cells) < 100 else 0.0, zorder=3
    )
    for axes, label in ((by_n, "parameters (N)"), (by_d, "training tokens (D)"), (quantiles, "standard normal quantile")):
        axes.set_xlabel(label)
        axes.axhline(0, color=INK, linewidth=0.8)
    for axes in (by_n, by_d):
        scale_log(axes.xaxis, n_ticks=4)
    by_n.set_ylabel("residual (% of loss)")
    worst = cells.iloc[int(np.argmax(np.abs(percent)))]
    caption = (
        f"Residuals of the fit, ln observed less ln fitted, in percent: standard deviation {percent.std():.2g}, largest "
        f"{worst['residual']:+.2g} ({worst['cell_id']}); shaded by model size. Left and middle: against parameters and tokens; "
        "a run of points on one side of zero means that the law bends otherwise than the data. Right: against a normal "
        "distribution of the same width (line)."
    )
    return Picture("residuals", "Residuals", figure, caption)


@dataclass(frozen=True)
class Series:
    """Cells that share a value, and the shade they are drawn in. `has_line`: drawn with a line and a label."""

    value: float
    cells: pd.DataFrame
    shade: str
    has_line: bool


def select_scored(study: Study) -> pd.DataFrame:
    """Return the cells with a loss to draw, whether fitted or not."""
    scored = np.isfinite(study.cells["val_loss"].to_numpy()) & study.cells["tokens"].notna().to_numpy()
    cells: pd.DataFrame = study.cells.loc[scored]
    return cells


def split_series(cells: pd.DataFrame, column: str) -> list[Series]:
    """Split cells by a column, smallest value first; of very many values only some get a line."""
    values = sorted(cells[column].unique())
    lined = set(np.linspace(0, len(values) - 1, min(len(values), MAX_LINES)).round().astype(int).tolist())
    shades = pick_shades(len(values))
    return [Series(float(v), cells[cells[column] == v], shades[i], i in lined) for i, v in enumerate(values)]


def begin_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Start a figure of one panel."""
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def draw_cells(axes: Axes, series: Series, x: str, y: str = "val_loss") -> None:
    """Mark each cell; hollow where it was not fitted."""
    for excluded, face, edge, width in ((False, series.shade, "white", 0.4), (True, "white", series.shade, 1.0)):
        cells = series.cells[series.cells["excluded"] == excluded]
        axes.plot(cells[x], cells[y], "o", color=face, markeredgecolor=edge, markeredgewidth=width)


def draw_law(axes: Axes, study: Study, series: Series, x: str, grid: FloatArray, quantity: Quantity) -> None:
    """Draw the fitted law through a series; without a fit, join its cells."""
    if study.fitted is not None and series.has_line:
        draw_band(axes, study.fitted, grid, quantity, series.shade)
    elif study.fitted is None:
        cells = series.cells[series.cells["role"] == "grid"].sort_values(x)
        axes.plot(cells[x], cells["val_loss"], color=series.shade, linewidth=0.8)


def loss_at(n_params: npt.ArrayLike, tokens: npt.ArrayLike) -> Quantity:
    """Return the loss at these places as a quantity of a law."""
    return lambda law: law.loss(n_params, tokens)


def draw_band(axes: Axes, fitted: Fitted, grid: FloatArray, quantity: Quantity, shade: str) -> FloatArray:
    """Draw a curve of the law and its interval, computed in logs so that it stays above zero; return the curve."""
    spread = estimate_spread(fitted.resamples, lambda law: np.log(np.asarray(quantity(law))))
    axes.plot(grid, np.exp(spread.estimate), color=shade)
    axes.fill_between(grid, np.exp(spread.low), np.exp(spread.high), color=shade, alpha=0.15, linewidth=0)
    return np.exp(spread.estimate)


def spread_grid(values: "pd.Series[float]", n_points: int = 60) -> FloatArray:
    """Return points evenly spaced in logs over the values and a little beyond."""
    numbers = values.astype(float)
    return np.geomspace(numbers.min() / 1.12, numbers.max() * 1.12, n_points)


def finish_axes(axes: Axes, losses: npt.ArrayLike) -> None:
    """Make both axes logarithmic with plain numbers, framed by these losses and not by the width of a band."""
    values = np.asarray(losses, dtype=float)
    margin = max(float(values.max() / values.min()) ** 0.08, 1.002)
    scale_log(axes.xaxis)
    axes.set_yscale("log")
    axes.set_ylim(values.min() / margin, values.max() * margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def scale_log(axis: Axis, n_ticks: int = 8) -> None:
    """Make a horizontal axis logarithmic, with at most about `n_ticks` round numbers such as 20K, 50K, 100K."""
    axis.axes.set_xscale("log")
    decades = count_decades(axis)
    subs = next((subs for subs in TICKS if decades * len(subs) <= n_ticks), TICKS[-1])
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.set_minor_locator(NullLocator())


def scale_powers(axis: Axis) -> None:
    """Write a logarithmic axis as powers of ten, with small ticks at 2 and 5; over a short range these are written too."""
    is_short = count_decades(axis) < 2
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    axis.set_minor_locator(NullLocator() if is_short else LogLocator(subs=(2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())


def count_decades(axis: Axis) -> float:
    """Return how many powers of ten an axis spans."""
    low, high = axis.get_view_interval()
    return float(np.log10(high / low))


def format_power(value: float) -> str:
    """Write a number as a power of ten for a figure."""
    power = int(np.floor(np.log10(value) + 1e-9))
    digit = round(value / 10.0**power)
    return f"$10^{{{power}}}$" if digit == 1 else f"${digit}\\!\\cdot\\!10^{{{power}}}$"


@dataclass(frozen=True)
class Label:
    """What stands beside the end of a line."""

    loss: float
    text: str
    shade: str
    linestyle: Literal["-", ":"] = "-"


def list_labels(series: Sequence[Series]) -> list[Label]:
    """Label each drawn series by its value, at its lowest loss; in the order of values where noise has them cross."""
    lined = [one for one in series if one.has_line]
    ends = sorted((float(one.cells["val_loss"].min()) for one in lined), reverse=True)
    return [Label(end, format_count(one.value), one.shade) for one, end in zip(lined, ends, strict=True)]


def label_lines(axes: Axes, labels: Sequence[Label], title: str) -> None:
    """Write labels to the right of the axes, pushed apart where lines end close together, under a title."""
    to_fraction = axes.transScale + axes.transLimits
    wanted = [float(to_fraction.transform((axes.get_xlim()[1], label.loss))[1]) for label in labels]
    heights = push_apart(wanted, gap=0.06)
    for label, height in zip(labels, heights, strict=True):
        key = Line2D([1.02, 1.055], [height, height], color=label.shade, linestyle=label.linestyle, linewidth=2.2)
        key.set(transform=axes.transAxes, clip_on=False)
        axes.add_artist(key)
        axes.text(1.07, height, label.text, transform=axes.transAxes, va="center", color=INK)
    axes.text(1.02, max(heights) + 0.075, title, transform=axes.transAxes, va="center", color="#555555")


def push_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights as little as order allows until neighbours are `gap` apart, none above 0.93."""
    order = sorted(range(len(heights)), key=lambda i: -heights[i])
    placed, ceiling = [0.0] * len(heights), 0.93
    for i in order:
        placed[i] = min(heights[i], ceiling)
        ceiling = placed[i] - gap
    floor = 0.0
    for i in reversed(order):
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    return placed


def caption_series(study: Study, series: Sequence[Series], what: str) -> str:
    """Say what the marks, lines and bands of a figure by series are, and how many."""
    cells = pd.concat([one.cells for one in series])
    n_left_out = int(cells["excluded"].sum())
    marks = f"{len(cells)} cells, losses {cells['val_loss'].min():.4g} to {cells['val_loss'].max():.4g}, shaded by {what}"
    hollow = f"; {n_left_out} hollow ones were not fitted" if n_left_out else ""
    lines = " Lines: the fitted law; bands: its 95% intervals." if study.fitted else " Lines join cells: no law was fitted."
    return f"{marks}{hollow}.{lines}"


def caption_flops(study: Study, best: pd.DataFrame) -> str:
    """Say what the best cell reached, and what the fitted frontier says of the same compute."""
    text = "Validation loss against training FLOPs, C = 6 N D with N as in the fit; thin lines join cells of a size."
    if len(best):
        lowest = best.iloc[int(best["val_loss"].argmin())]
        text += (
            f" Dotted: the best seen so far; the lowest loss is {lowest['val_loss']:.4g} at {lowest['compute']:.2e} FLOPs"
            f" ({lowest['cell_id']})."
        )
    if study.fitted is not None:
        optimum = study.fitted.fit.constants.allocate(study.fitted.flops)
        text += (
            f" Dark line: the law's loss for the best split of each compute, with its 95% interval; at {optimum.flops:.2e} FLOPs "
            f"it is {optimum.loss:.4g}."
        )
    return text
