"""Transfer across widths: the coordinate check, and where the best learning rate lies at each width."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.config import ConfigError
from harness.runs import read_json
from results.plot import STYLE, Picture, pick_shades

PANELS = ("standard", "mup")
COORDINATES = "coordinate_check.json"
DRAWN = ("first attention", "stream", "logits")  # of the activations that are checked


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one width: that of the sweep, and the lowest point of a parabola in logs beside it."""

    parametrization: str
    d_model: int
    best_lr: float
    lr: float
    val_loss: float
    at_edge: bool


def load_coordinates(folder: Path) -> tuple[str, pd.DataFrame]:
    """Read what `harness verify` wrote: what grows, d_model or n_layer, and the changes averaged over seeds.

    Raises:
        ConfigError: it is not a coordinate check.
    """
    facts = read_json(folder / COORDINATES)
    if not isinstance(facts, dict) or facts.get("format") != "scaling-harness-coordinates" or "axis" not in facts:
        raise ConfigError(f"{folder / COORDINATES}: is not a coordinate check; run python -m harness verify width again")
    axis, rows = str(facts["axis"]), pd.DataFrame(facts["rows"])
    return axis, rows.groupby(["parametrization", "activation", "step", axis])[["change"]].mean().reset_index()


def plot_coordinates(axis: str, changes: pd.DataFrame) -> Picture:
    """Draw how far activations moved, against width or depth, one line a step, for standard and mup."""
    steps = sorted(changes["step"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4))
        grid = figure.subplots(2, len(DRAWN), sharex=True, sharey="col", squeeze=False)
        for row, parametrization in enumerate(PANELS):
            for column, name in enumerate(DRAWN):
                axes = grid[row][column]
                drawn = changes[(changes["parametrization"] == parametrization) & (changes["activation"] == name)]
                for step, shade in zip(steps, pick_shades(len(steps)), strict=True):
                    line = drawn[drawn["step"] == step].sort_values(axis)
                    axes.plot(line[axis], line["change"], "o-", color=shade, markersize=3)
                finish_size_axis(axes, sorted(changes[axis].unique()))
                axes.set_title(name if row == 0 else "", fontsize=9)
                if row == 1:
                    axes.set_xlabel(axis)
            grid[row][0].set_ylabel(f"{parametrization}: RMS change")
    caption = (
        f"How far activations moved from where they began, after steps {steps[0]} (light) to {steps[-1]} (dark), against {axis}: "
        "what the first attention gives, what leaves the last block, the logits. Flat is what lets a learning rate carry over."
    )
    return Picture("coordinate_check", "Coordinate check", figure, caption)


def finish_size_axis(axes: Any, sizes: list[int]) -> None:  # noqa: ANN401 - matplotlib's axes
    """Make both axes logarithmic, with the sizes as ticks."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def has_sweep(cells: pd.DataFrame) -> bool:
    """Say whether cells differ in learning rate within a width, under both parametrizations."""
    done = select_sweep(cells)
    return set(done["parametrization"]) == set(PANELS) and bool(
        (done.groupby(["parametrization", "d_model"])["lr"].nunique() >= 3).all()
    )


def select_sweep(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the finished cells, their parametrization named, averaged over seeds; a run that diverged is left out."""
    done = cells[(cells["state"] == "done") & cells["val_loss"].notna() & (cells["role"] == "grid")]
    named = done.assign(parametrization=done["parametrization"].where(done["parametrization"] == "mup", "standard"))
    return named.groupby(["parametrization", "d_model", "lr"])[["val_loss"]].mean().reset_index()


def find_optima(cells: pd.DataFrame) -> list[Optimum]:
    """Return the best learning rate at each width."""
    optima = []
    for key, group in select_sweep(cells).groupby(["parametrization", "d_model"]):
        (parametrization, d_model), rows = cast(tuple[str, int], key), group.sort_values("lr")
        x, y = np.log(rows["lr"].to_numpy(float)), rows["val_loss"].to_numpy(float)
        best = int(y.argmin())
        at_edge = best in (0, len(x) - 1)
        lowest = x[best]
        if not at_edge:
            curve = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
            lowest = float(np.clip(-curve[1] / (2 * curve[0]), x[best - 1], x[best + 1])) if curve[0] > 0 else x[best]
        optima.append(
            Optimum(str(parametrization), int(d_model), float(np.exp(x[best])), float(np.exp(lowest)), float(y[best]), at_edge)
        )
    return optima


def measure_drift(optima: list[Optimum], parametrization: str) -> float:
    """Return the largest optimum over the smallest, over all widths of a parametrization."""
    found = [optimum.lr for optimum in optima if optimum.parametrization == parametrization]
    return max(found) / min(found)


def plot_transfer(cells: pd.DataFrame) -> Picture:
    """Draw loss against learning rate, one line a width, one panel a parametrization, optima marked."""
    sweep, optima = select_sweep(cells), find_optima(cells)
    widths = sorted(sweep["d_model"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, parametrization in zip(panels, PANELS, strict=True):
            for width, shade in zip(widths, pick_shades(len(widths)), strict=True):
                line = sweep[(sweep["parametrization"] == parametrization) & (sweep["d_model"] == width)].sort_values("lr")
                axes.plot(line["lr"], line["val_loss"], "o-", color=shade, label=str(width), markersize=3)
                best = next(o for o in optima if (o.parametrization, o.d_model) == (parametrization, width))
                axes.plot([best.lr], [best.val_loss], "v", color=shade, markersize=8)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(base=2))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
            axes.tick_params(axis="x", labelrotation=45)
            axes.set_xlabel("learning rate")
            axes.set_title(
                f"{parametrization}: optimum within a factor of {measure_drift(optima, parametrization):.2g}", fontsize=9
            )
        low = float(sweep["val_loss"].min())
        panels[0].set_ylim(low - 0.02, low + 1.0)
        panels[0].set_ylabel("validation loss (nats per token)")
        panels[1].legend(title="d_model", frameon=False, loc="upper center")
    caption = "Validation loss against learning rate at each width; triangles: optima, by a parabola through the lowest three."
    return Picture("width_transfer", "Transfer across widths", figure, caption)


def render_optima(optima: list[Optimum]) -> str:
    """Write the optima as a table in Markdown."""
    lines = ["| parametrization | d_model | best of the sweep | optimum | loss |", "|---|---|---|---|---|"]
    for o in sorted(optima, key=lambda o: (PANELS.index(o.parametrization), o.d_model)):
        edge = " (edge of the sweep)" if o.at_edge else ""
        lines.append(f"| {o.parametrization} | {o.d_model} | {o.best_lr:.3g}{edge} | {o.lr:.3g} | {o.val_loss:.3f} |")
    drifts = ", ".join(f"{name} {measure_drift(optima, name):.2f}" for name in PANELS)
    return "\n".join(lines) + f"\n\nLargest optimum over smallest, over widths: {drifts}."
