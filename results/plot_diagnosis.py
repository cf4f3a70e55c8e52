"""Figures of a diagnosis, in the house style of plot.py: the specification curve, profiles, and predictions of dearer cells."""

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.ladder import format_count
from results.diagnose import Diagnosis
from results.fit import Fit
from results.plot import DARKEST, INK, PALETTE, STYLE, Picture
from results.profiles import Profile, profile_parameter
from results.specification import Specification

ACCENT, QUIET = mpl.colors.to_hex(PALETTE(DARKEST + 0.35)), "#9a9a9a"
REPORTED = "#c8401e"
TITLES = ("estimator", "N counts", "C counts", "dropped")


def draw_diagnosis(diagnosis: Diagnosis) -> list[Picture]:
    """Draw every figure that there is something to show for."""
    with mpl.rc_context(STYLE):
        interval = diagnosis.fitted.intervals["optimum_exponent"]
        pictures = [plot_profiles(diagnosis.fitted.fit)]
        if any(not one.problem for one in diagnosis.specifications):
            pictures.append(plot_specifications(diagnosis.specifications, (interval.low, interval.high)))
        if diagnosis.influences:
            pictures.append(plot_influences(diagnosis))
    return pictures


def plot_specifications(specifications: tuple[Specification, ...], interval: tuple[float, float]) -> Picture:
    """Draw the exponent of every specification in its order, over the choices that made it."""
    reported = specifications[0]
    usable = sorted((one for one in specifications if not one.problem), key=lambda one: one.exponent)
    rows = [
        (title, choice)
        for position, title in enumerate(TITLES)
        for choice in dict.fromkeys(one.choices[position] for one in specifications)
    ]
    figure = Figure(figsize=(7.2, 2.6 + 0.17 * len(rows)))
    top, matrix = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.16 * len(rows)))
    x, a = np.arange(len(usable)), [one.exponent for one in usable]
    top.axhspan(*interval, color=PALETTE(0.5), alpha=0.15, linewidth=0)
    shades = [REPORTED if one is reported else INK for one in usable]
    top.scatter(x, a, c=shades, s=[26 if one is reported else 8 for one in usable], zorder=3)
    top.set_ylabel("a, best N grows as C$^a$")
    for height, (title, choice) in enumerate(rows):
        used = [i for i, one in enumerate(usable) if one.choices[TITLES.index(title)] == choice]
        matrix.scatter(used, [height] * len(used), c=[shades[i] for i in used], s=5, marker="s", linewidths=0)
    matrix.set_yticks(range(len(rows)), [f"{title}: {choice}" for title, choice in rows], fontsize=7.5)
    matrix.set_ylim(len(rows) - 0.4, -0.6)
    matrix.set_xticks([])
    matrix.set_xlabel(f"{len(usable)} specifications, ordered by a")
    matrix.grid(visible=False)
    caption = (
        f"How fast the best model grows with compute, under {len(usable)} combinations of choices: {min(a):.3f} to {max(a):.3f}. "
        f"Band: the 95% interval of the reported specification (coloured), {interval[0]:.3f} to {interval[1]:.3f}, which knows "
        "of luck alone."
    )
    return Picture("specification_curve", "Specification curve", figure, caption)


def plot_profiles(fit: Fit, parameters: tuple[str, ...] = ()) -> Picture:
    """Draw how much the objective rises as each parameter is moved and the others are refitted."""
    names = parameters or tuple(name for name in fit.law.parameters if name == fit.law.floor or name not in fit.law.coefficients)
    profiles = [profile_parameter(fit, name) for name in names]
    figure = Figure(figsize=(2.5 * len(names) + 0.4, 2.5))
    for axes, profile in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), profiles, strict=True):
        draw_profile(axes, profile, fit.objective_value)
    figure.axes[0].set_ylabel("objective over its minimum")
    said = "; ".join(f"{one.parameter} {one.low:.4g} to {one.high:.4g}" for one in profiles)
    caption = (
        f"Profiles: the least objective with one parameter held. Dotted: the 95% threshold for independent cells, inside which "
        f"lie {said} (inf: no end on that side)."
    )
    return Picture("profiles", "Profiles", figure, caption)


def draw_profile(axes: Axes, profile: Profile, minimum: float) -> None:
    """Draw one profile as far as a few times its threshold."""
    rise, limit = profile.objective / minimum, profile.threshold / minimum
    axes.plot(profile.values, rise, color=INK)
    axes.axhline(limit, color=QUIET, linestyle=":", linewidth=1.0)
    near = profile.values[rise <= 1 + 4 * (limit - 1)]
    axes.set_xlim(near.min(), near.max())
    axes.set_ylim(1 - 0.1 * (limit - 1), 1 + 4 * (limit - 1))
    axes.set_xlabel(profile.parameter)


def plot_influences(diagnosis: Diagnosis) -> Picture:
    """Draw how leaving out each size moves the exponent a."""
    order = sorted(diagnosis.influences, key=lambda one: one.n_params)
    figure = Figure(figsize=(5.6, 2.6))
    axes = figure.subplots()
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.vlines(range(len(order)), 0, [one.exponent for one in order], color=ACCENT)
    axes.plot(range(len(order)), [one.exponent for one in order], "o", color=ACCENT)
    shown = np.unique(np.linspace(0, len(order) - 1, min(len(order), 8)).round().astype(int))
    axes.set_xticks(shown, [format_count(order[i].n_params) for i in shown])
    axes.set_xlabel("size left out (parameters)")
    axes.set_ylabel("change of a")
    largest = diagnosis.influences[0]
    caption = (
        f"Change of a when one size is left out; the largest, {largest.exponent:+.3f}, is without N = "
        f"{format_count(largest.n_params)}."
    )
    return Picture("influence", "Leave one size out", figure, caption)
