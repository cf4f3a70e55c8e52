"""The figures of lessons.py, in the house style of plot.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from model.ladder import format_count
from results.fit import Fit
from results.holdout import HoldOut
from results.laws import FloatArray
from results.plot import INK, STYLE, Picture, begin_figure, pick_shades, scale_powers
from results.profiles import Profile

QUIET, REPORTED = "#9a9a9a", "#c8401e"


@dataclass(frozen=True)
class Mark:
    """A number with its interval, and what it is."""

    words: str
    value: float
    low: float
    high: float


def plot_filter(dropped: Sequence[int], exponents: Sequence[float], interval: tuple[float, float]) -> Picture:
    """Draw the exponent against the number of points left out."""
    with mpl.rc_context(STYLE):
        figure, axes = begin_figure("points left out, highest loss first", "a, best N grows as C$^a$")
        axes.axhspan(*interval, color=mpl.colormaps["viridis"](0.5), alpha=0.15, linewidth=0)
        axes.plot(dropped, exponents, "o-", color=INK)
        axes.plot([5], [exponents[5]], "o", color=REPORTED, markersize=7, zorder=4)
    caption = (
        "The exponent against how many of the 245 points are left out. Coloured: the published rule, five; band: its interval."
    )
    return Picture("filter", "The exponent and the points left out", figure, caption)


def plot_ladder(marks: Sequence[Mark]) -> Picture:
    """Draw numbers with intervals, one under another."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.6))
        axes = figure.subplots()
        for height, mark in enumerate(marks):
            axes.plot([mark.low, mark.high], [height, height], color=INK, linewidth=2.2)
            axes.plot([mark.value], [height], "o", color=INK)
            axes.text(mark.high + 0.012, height, f"{mark.value:.3f}", va="center", color=INK)
        axes.set_yticks(range(len(marks)), [mark.words for mark in marks])
        axes.invert_yaxis()
        axes.set_xlabel("a, best N grows as C$^a$")
        axes.axvline(0.5, color=QUIET, linestyle=":", linewidth=1.0)
        axes.set_xlim(0.45, 0.92)
    caption = "The exponent as choices are mended, RefinedWeb; bars: published 95% intervals. Dotted: one half, as in Chinchilla."
    return Picture("choices", "Choices outside the law", figure, caption)


def plot_hold_outs(scores: Sequence[HoldOut]) -> Picture:
    """Draw the error of the law and of two baselines against where the cut lies."""
    with mpl.rc_context(STYLE):
        figure, axes = begin_figure("fitted below (training FLOPs)", "mean error above (% of loss)")
        x = [one.cut_flops for one in scores]
        lines = {
            "best seen": ([one.best_seen for one in scores], QUIET, ":", 7),
            "power law in compute": ([np.nan if one.power_law is None else one.power_law for one in scores], QUIET, "-", -16),
            "law in N and D": ([one.mape for one in scores], INK, "-", 16),
        }
        for words, (values, shade, style, above) in lines.items():
            axes.plot(x, values, "o", color=shade, linestyle=style)
            axes.annotate(words, (x[0], values[0]), (0, above), textcoords="offset points", color=shade)
        axes.set_xscale("log")
        axes.set_yscale("log")
        scale_powers(axes.xaxis)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([0.5, 1, 2, 5])
    caption = (
        f"Chinchilla's points: fitted below a compute, scored from it on ({scores[0].n_scored} cells scored at the left, "
        f"{scores[-1].n_scored} at the right)."
    )
    return Picture("hold_out", "Predicting dearer cells", figure, caption)


def plot_repeated(profile: Profile, fit: Fit, printed: float, printed_r: float) -> Picture:
    """Draw the profile of R_D with the published value and the lowest."""
    with mpl.rc_context(STYLE):
        figure, axes = begin_figure("R_D, how fast repeated tokens lose value (in epochs)", "objective x 1000")
        kept = (profile.values >= 2) & (profile.values <= 1e5)
        axes.plot(profile.values[kept], 1e3 * profile.objective[kept], color=INK)
        axes.axhline(1e3 * profile.threshold, color=QUIET, linestyle=":", linewidth=1.0)
        axes.plot([fit["R_D"]], [1e3 * fit.objective_value], "o", color=INK, markersize=6)
        axes.plot([printed_r], [1e3 * printed], "o", color=REPORTED, markersize=6)
        axes.annotate("published", (printed_r, 1e3 * printed), (-4, 10), textcoords="offset points", color=REPORTED)
        axes.annotate("lowest", (fit["R_D"], 1e3 * fit.objective_value), (-2, -13), textcoords="offset points", color=INK)
        axes.set_xscale("log")
        axes.set_ylim(15.75, 16.5)
        scale_powers(axes.xaxis)
    caption = (
        "The least objective with R_D held and R_N refitted, 182 runs, the other constants as published. Dotted: the 95% "
        "threshold; "
        f"it is passed at {profile.low:.1f} below and nowhere above."
    )
    return Picture("repeated", "Value of repeated tokens", figure, caption)


def plot_over_training(errors: Mapping[str, tuple[pd.DataFrame, FloatArray]]) -> Picture:
    """Draw the relative error of each run against its tokens per parameter, a panel for each data set."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7))
        panels = figure.subplots(1, len(errors), sharey=True)
        for axes, (name, (runs, error)) in zip(panels, errors.items(), strict=True):
            sizes = sorted(runs["n_params"].unique())
            for size, shade in zip(sizes, pick_shades(len(sizes)), strict=True):
                of_size = (runs["n_params"] == size).to_numpy()
                line = runs[of_size].assign(error=error[of_size]).sort_values("token_multiplier")
                axes.plot(line["token_multiplier"], line["error"], "o-", color=shade, label=format_count(size), linewidth=0.9)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_xscale("log")
            axes.set_ylim(-12, 12)
            axes.set_title(name, fontsize=9)
            axes.set_xticks([5, 20, 80, 320], ["5", "20", "80", "320"])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("tokens per parameter")
        panels[0].set_ylabel("predicted over observed (%)")
        panels[-1].legend(title="parameters", frameon=False, fontsize=7, title_fontsize=7, ncol=2)
    off = sum(int((np.abs(error) > 12).sum()) for _, error in errors.values())
    caption = f"The tied law, fitted to five small runs of each data set, on every run; {off} runs lie beyond the frame."
    return Picture("over_training", "Over-training from five small runs", figure, caption)


def plot_designs(duels: Sequence[tuple[str, float, float]]) -> Picture:
    """Draw the error of chosen cells beside that of random ones, a row for each pool and budget."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4))
        axes = figure.subplots()
        for height, (_, chosen, random) in enumerate(duels):
            axes.plot([chosen, random], [height, height], color=QUIET, linewidth=1.0, zorder=1)
            axes.plot([random], [height], "o", markerfacecolor="white", markeredgecolor=INK)
            axes.plot([chosen], [height], "o", color=REPORTED if chosen > random else INK)
        axes.set_yticks(range(len(duels)), [words for words, _, _ in duels])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("mean error on dearer cells (% of loss)")
    caption = (
        "Filled: cells chosen one by one for what they teach per FLOP; hollow: the median of random choices of the same FLOPs. "
        "Coloured: the choice lost."
    )
    return Picture("design", "Chosen against random cells", figure, caption)
