"""What to doubt about a fit: whether its numbers are identified, what they rest on, and how they move with other choices.

Everything is a value first and words after; `render_diagnosis` makes the page, figures stand in plot_diagnosis.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from results.claims import wrap_line
from results.fit import Fit, refit_many
from results.holdout import HoldOut, score_origins
from results.laws import FloatArray, jacobian, params_of_theta
from results.specification import Specification, iter_specifications
from results.study import Convention, Fitted
from results.uncertainty import list_alike

MAX_CONDITION, MAX_CORRELATION = 1e3, 0.995
MIN_RATIOS, MIN_RATIO_SPAN = 3, 16.0  # of tokens to parameters; one ratio makes the fit singular, a narrow range nearly so
CELLS_PER_PARAMETER, TRUNKS_PER_PARAMETER = 2, 2
SLOPPY_CHANGE = 1e-3  # of ln L: how large a change the sloppy direction is described at
LEVEL = 0.05  # below this p-value, structure or lack of fit is called so
LARGE_INFLUENCE = 0.05  # of a
MAX_SIZES = 40  # left out one by one


@dataclass(frozen=True)
class Influence:
    """What leaving out one size does. Units: changes of the exponents and of a = beta / (alpha + beta)."""

    n_params: float
    n_cells: int
    alpha: float
    beta: float
    exponent: float


@dataclass(frozen=True)
class Test:
    """An F test. `what` it looks for; `statistic` with its degrees of freedom; p: how likely so much is by luck alone."""

    what: str
    statistic: float
    df: tuple[int, int]
    p: float


@dataclass(frozen=True)
class Diagnosis:
    """All that is known against a fit. Shapes: correlations (p, p) and sloppy (p,) in the order of the law's parameters."""

    fitted: Fitted
    correlations: FloatArray
    sloppy: FloatArray
    gate: tuple[str, ...]  # why numbers of this fit may not be identified; empty if nothing speaks against it
    influences: tuple[Influence, ...]  # largest change of a first
    hold_outs: tuple[HoldOut, ...]  # the default cut first
    structure: Test | None
    lack_of_fit: Test | None
    specifications: tuple[Specification, ...]  # the one that `fit` reports first


def diagnose(kept: pd.DataFrame, fitted: Fitted, convention: Convention) -> Diagnosis:
    """Look at a fit from every side; `kept` are the cells that were fitted."""
    fit = fitted.fit
    slopes = jacobian(fit.theta, fit.centred)[:, fit.free]
    columns = {"n_params": convention.column, "tokens": "tokens", "val_loss": "val_loss"}
    cells = {name: kept[column].to_numpy(float) for name, column in columns.items()}
    correlations = correlate_parameters(slopes)
    return Diagnosis(
        fitted=fitted,
        correlations=correlations,
        sloppy=find_sloppy(slopes),
        gate=tuple(iter_gate(fitted, correlations)),
        influences=tuple(sorted(iter_influences(fit), key=lambda one: -abs(one.exponent))),
        hold_outs=tuple(score_origins(cells)),
        structure=check_structure(fit),
        lack_of_fit=check_lack_of_fit(fit, kept),
        specifications=tuple(iter_specifications(kept)),
    )


def correlate_parameters(slopes: FloatArray) -> FloatArray:
    """Return the correlations of the estimates in centred logs, from linear theory. Shapes: (n, p) -> (p, p)."""
    scaled = slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
    covariance = np.linalg.pinv(scaled.T @ scaled, hermitian=True)
    size = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    return np.asarray(covariance / np.outer(size, size))


def find_sloppy(slopes: FloatArray) -> FloatArray:
    """Return the move of theta that the cells see least, scaled to a root mean square change of ln L of `SLOPPY_CHANGE`."""
    size = np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
    direction = np.linalg.svd(slopes / size, full_matrices=False)[2][-1] / size
    change = float(np.sqrt(np.mean((slopes @ direction) ** 2)))
    direction *= np.sign(direction[-1] or 1.0)
    return np.asarray(direction * (SLOPPY_CHANGE / max(change, 1e-300)))


def describe_sloppy(diagnosis: Diagnosis) -> str:
    """Say the sloppy direction in words."""
    fit, law = diagnosis.fitted.fit, diagnosis.fitted.fit.law
    moves = []
    for name, is_log, move in zip(
        np.array(law.parameters)[fit.free].tolist(), law.is_log[fit.free], diagnosis.sloppy, strict=True
    ):
        size = f"{100 * abs(np.expm1(move)):.2g}%" if is_log else f"{abs(move):.2g}"
        what = f"the {name} term" if is_log and name != law.floor else name
        moves.append(f"{what} {'up' if move > 0 else 'down'} {size}")
    return (
        f"The cells say least about {', '.join(moves)}, all together and each term taken at the middle of the grid: that moves "
        f"the fitted losses by {100 * SLOPPY_CHANGE:g}% (root mean square)."
    )


def iter_gate(fitted: Fitted, correlations: FloatArray) -> Iterator[str]:
    """Say each reason why numbers of this fit may not be identified, and which cells would help."""
    fit, resamples = fitted.fit, fitted.resamples
    names, p = np.array(fit.law.parameters)[fit.free], int(fit.free.sum())
    if fit.condition_number > MAX_CONDITION:
        yield f"condition number {fit.condition_number:,.0f} is above {MAX_CONDITION:,.0f}: parameters are nearly interchangeable"
    for i, j in zip(*np.nonzero(np.triu(np.abs(correlations) > MAX_CORRELATION, k=1)), strict=True):
        yield f"{names[i]} and {names[j]} are correlated {correlations[i, j]:+.3f}: quote neither without the other"
    if fit.at_bounds:
        yield f"{' and '.join(fit.at_bounds)} ended at the edge of the allowed range"
    if fit.is_floor_near_zero:
        yield f"{fit.law.floor} cannot be told from 0: the losses are far above any floor; add larger sizes and budgets"
    if fit.open_sides:
        yield f"open sides: {', '.join(fit.open_sides)}; the data hardly object there, so quote a bound, not a number"
    if fit.n_cells < CELLS_PER_PARAMETER * p:
        yield f"{fit.n_cells} cells for {p} parameters: fewer than {CELLS_PER_PARAMETER} each; add cells"
    if resamples.n_runs < fit.n_cells and resamples.n_runs < TRUNKS_PER_PARAMETER * p:
        yield f"{resamples.n_runs} trunks for {p} parameters: fewer than {TRUNKS_PER_PARAMETER} each; add sizes or seeds"
    if len(fit.basins) > 1:
        yield f"{len(fit.basins)} different minima lie within 1% of the best objective"
    yield from iter_ratio_problems(fit)


def iter_ratio_problems(fit: Fit) -> Iterator[str]:
    """Say whether tokens per parameter vary enough to tell the two terms apart."""
    if not {"n_params", "tokens"} <= set(fit.law.inputs):
        return
    logs = fit.centred.x + fit.centred.mean[:, None]
    log_n, log_d = (logs[fit.law.inputs.index(name)] for name in ("n_params", "tokens"))
    ratios = np.unique(np.round(log_d - log_n, 2))
    span = float(np.exp(ratios[-1] - ratios[0]))
    if len(ratios) < MIN_RATIOS or span < MIN_RATIO_SPAN:
        yield (
            f"tokens per parameter take {len(ratios)} value(s) within a factor of {span:.3g}: at least {MIN_RATIOS} over a "
            f"factor of {MIN_RATIO_SPAN:g} tell the two terms apart; add budgets to the sizes there are"
        )


def iter_influences(fit: Fit) -> Iterator[Influence]:
    """Fit again without each size, all at once, and say what it changes; nothing where three sizes or fewer are left."""
    sizes, size_of = np.unique(np.round(fit.centred.x[0], 6), return_inverse=True)
    if len(sizes) <= 3:
        return
    if len(sizes) > MAX_SIZES:  # neighbours together, else a table of thousands of sizes takes minutes and says nothing
        size_of = size_of * MAX_SIZES // len(sizes)
        sizes = np.array([np.median(fit.centred.x[0][size_of == i]) for i in range(MAX_SIZES)])
    kept = size_of[None] != np.arange(len(sizes))[:, None]
    refits = refit_many(fit, weights=fit.weights * kept)
    whole = fit.constants
    for i, params in enumerate(params_of_theta(refits.theta, fit.centred)):
        law = fit.law.as_chinchilla(params)
        yield Influence(
            n_params=float(np.exp(sizes[i] + fit.centred.mean[0])),
            n_cells=int((~kept[i]).sum()),
            alpha=law.alpha - whole.alpha,
            beta=law.beta - whole.beta,
            exponent=law.optimum_exponent - whole.optimum_exponent,
        )


def check_structure(fit: Fit) -> Test | None:
    """Test whether residuals bend: whether x^2, x y and y^2 of the centred logs explain more of them than luck would.

    Note: takes the cells to be independent; with trunks the p-value is too small.
    """
    slopes, (x, y) = jacobian(fit.theta, fit.centred)[:, fit.free], fit.centred.x
    more = np.column_stack([slopes, x * x, x * y, y * y])
    rank, full = np.linalg.matrix_rank(slopes), np.linalg.matrix_rank(more)
    df = int(full - rank), int(fit.n_cells - full)
    if min(df) < 1:
        return None
    before, after = (sum_left(columns, fit.log_residuals) for columns in (slopes, more))
    statistic = float((before - after) / df[0] / max(after / df[1], 1e-300))
    return Test("curvature in ln N and ln D that the law does not have", statistic, df, float(fdtrc(*df, max(statistic, 0.0))))


def sum_left(columns: FloatArray, values: FloatArray) -> float:
    """Return the sum of squares that least squares on these columns leaves."""
    fitted = columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum())


def check_lack_of_fit(fit: Fit, kept: pd.DataFrame) -> Test | None:
    """Compare how far the law misses the means of repeated cells with how far seeds differ; None without repeats.

    Source: Draper & Smith 1998, section 2.1 (pure error). Note: residuals of ln L; needs more places than parameters.
    """
    group, slopes = list_alike(kept), jacobian(fit.theta, fit.centred)
    # A robust fit leaves more squares than least squares would; taken as they are, luck alone looked like lack of fit.
    left = fit.log_residuals - slopes @ np.linalg.lstsq(slopes, fit.log_residuals, rcond=None)[0]
    mean = pd.Series(left).groupby(group).transform("mean").to_numpy()
    n_groups, p = len(np.unique(group)), int(fit.free.sum())
    df = n_groups - p, fit.n_cells - n_groups
    if min(df) < 1:
        return None
    pure = float(((left - mean) ** 2).sum())
    lack = max(float((left**2).sum()) - pure, 0.0)
    statistic = lack / df[0] / max(pure / df[1], 1e-300)
    return Test("misses beyond seed noise (lack of fit)", statistic, df, float(fdtrc(*df, statistic)))


def render_diagnosis(name: str, diagnosis: Diagnosis) -> str:
    """Write the page that `diagnose` prints."""
    fit = diagnosis.fitted.fit
    sections = {
        "Identified?": diagnosis.gate or ("nothing speaks against it",),
        "Shape": (
            f"condition number {fit.condition_number:.3g} (centred logs, scaled columns); largest correlation "
            f"{describe_largest(diagnosis)}",
            describe_sloppy(diagnosis),
        ),
        "What it rests on": tuple(describe_influences(diagnosis)),
        "Predicting dearer cells": tuple(describe_hold_outs(diagnosis)),
        "Residuals": tuple(describe_residuals(diagnosis)),
        "Other ways to have done it": tuple(describe_specifications(diagnosis)),
    }
    lines = [f"{name}: {fit.n_cells} cells, {fit.law.equation}"]
    for title, items in sections.items():
        lines += ["", title, *(f"  - {item}" for item in items)]
    return "\n".join(wrapped for line in lines for wrapped in wrap_line(line))


def describe_largest(diagnosis: Diagnosis) -> str:
    """Name the pair of parameters that are correlated most."""
    off = np.abs(np.triu(diagnosis.correlations, k=1))
    i, j = np.unravel_index(int(np.argmax(off)), off.shape)
    names = np.array(diagnosis.fitted.fit.law.parameters)[diagnosis.fitted.fit.free]
    return f"{diagnosis.correlations[i, j]:+.3f} ({names[i]}, {names[j]})"


def describe_influences(diagnosis: Diagnosis) -> Iterator[str]:
    """Say which sizes the exponents rest on."""
    if not diagnosis.influences:
        yield "three sizes or fewer: none can be left out"
    for one in diagnosis.influences[:3]:
        mark = " (much)" if abs(one.exponent) > LARGE_INFLUENCE else ""
        yield (
            f"without N = {one.n_params:.3g} ({one.n_cells} cells): a {one.exponent:+.3f}{mark}, alpha {one.alpha:+.3f}, "
            f"beta {one.beta:+.3f}"
        )


def describe_hold_outs(diagnosis: Diagnosis) -> Iterator[str]:
    """Say how well cheaper cells predicted dearer ones."""
    if not diagnosis.hold_outs:
        yield "too few cells to fit the cheaper ones alone"
    for one in diagnosis.hold_outs:
        power = "not fitted" if one.power_law is None else f"{one.power_law:.2f}%"
        yield (
            f"{one.n_fitted} cells below {one.cut_flops:.2e} FLOPs predict {one.n_scored}, up to {one.reach:.3g} x dearer: mean "
            f"error {one.mape:.2f}% (bias {one.bias:+.2f}%); best seen {one.best_seen:.2f}%, power law in compute {power}; "
            f"skill {one.skill:+.2f}"
        )


def describe_residuals(diagnosis: Diagnosis) -> Iterator[str]:
    """Say whether what is left looks like luck."""
    residuals = 100 * diagnosis.fitted.fit.log_residuals
    yield f"standard deviation {residuals.std():.2g}%, largest {residuals[np.argmax(np.abs(residuals))]:+.2g}% of the loss"
    for test in (diagnosis.structure, diagnosis.lack_of_fit):
        if test is not None:
            verdict = "there is" if test.p < LEVEL else "no sign of"
            yield f"{verdict} {test.what}: F({test.df[0]}, {test.df[1]}) = {test.statistic:.3g}, p = {test.p:.2g}"
    if diagnosis.lack_of_fit is None:
        yield "lack of fit cannot be told from seed noise: no cells differ in their seed alone, or too few"


def describe_specifications(diagnosis: Diagnosis) -> Iterator[str]:
    """Say how far a moves over the specifications, beside the interval of the one that is reported."""
    usable = [one for one in diagnosis.specifications if not one.problem]
    interval = diagnosis.fitted.intervals["optimum_exponent"]
    if not usable:
        yield "no other specification could be fitted"
        return
    exponents = [one.exponent for one in usable]
    yield (
        f"a = {interval.estimate:.3f}, 95% interval {interval.low:.3f} to {interval.high:.3f} from luck alone; over "
        f"{len(usable)} specifications {min(exponents):.3f} to {max(exponents):.3f}, median {np.median(exponents):.3f}"
    )
    for position, title in enumerate(("estimator", "what N counts", "what C counts", "dropped")):
        by_choice: dict[str, list[float]] = {}
        for one in usable:
            by_choice.setdefault(one.choices[position], []).append(one.exponent)
        medians = ", ".join(f"{choice} {np.median(values):.3f}" for choice, values in by_choice.items())
        yield f"median a by {title}: {medians}"
