"""Fit a scaling law to cells: robust, from many starts, saying what the data do not hold.

The objective is the sum over cells of huber(ln L_fitted - ln L_observed) with delta = 1e-3 (Hoffmann et al. 2022, section 3.3). A sum,
not a mean: with the mean, default tolerances stop an optimiser early, and the published constants show it.

For given exponents the law is linear in E, A and B, so a start costs one small non-negative least-squares problem and a whole grid of
exponents is solved at once (variable projection). The best few grid points, far from each other, are then polished.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from results.laws import (
    PARAMETERS,
    Centred,
    Chinchilla,
    FloatArray,
    centre,
    jacobian,
    law_of_theta,
    predict_log_loss,
)

DELTA = 1e-3
EXPONENT_BOUNDS = (0.01, 3.0)
ZERO_TERM = 1e-6  # a term of the law below this share of the lowest loss counts as zero: its logarithm is bounded there
GRID = np.geomspace(0.05, 1.2, 14)  # exponents tried for each axis
N_POLISHED = 4
MIN_CELLS, MIN_SIZES, MIN_BUDGETS = 6, 3, 3
# The 7 non-empty choices of which of (A, B, E) are above zero.
ACTIVE_SETS = np.array([[(k >> i) & 1 for i in range(3)] for k in range(1, 8)], dtype=float)


class FitError(ValueError):
    """The cells cannot support the law: the message names what is missing and which cells would supply it."""


@dataclass(frozen=True)
class Basin:
    """One local minimum of the objective."""

    law: Chinchilla
    objective: float


@dataclass(frozen=True)
class Fit:
    """A fitted law with what a reader needs to trust it or not.

    Shapes: theta (5,); residuals (n,), in the order of the cells, ln observed - ln fitted: above zero is worse than the law.
    """

    law: Chinchilla
    theta: FloatArray
    centred: Centred
    objective: float
    delta: float
    residuals: FloatArray
    basins: tuple[Basin, ...]  # minima within 1% of the best objective, best first
    at_bounds: tuple[str, ...]  # names of parameters that ended at the edge of where they may be
    condition_number: float  # of the Jacobian in centred logs, columns scaled to length 1
    n_starts: int
    n_polished: int

    @property
    def n_cells(self) -> int:
        return len(self.residuals)


def fit_chinchilla(
    n_params: npt.ArrayLike, tokens: npt.ArrayLike, loss: npt.ArrayLike, *, delta: float = DELTA
) -> Fit:
    """Minimise the sum of Huber losses of log residuals over E, A, B, alpha and beta.

    Raises:
        FitError: a number that has no logarithm, or too few cells, sizes or budgets for five parameters.
    """
    arrays = [np.asarray(values, dtype=float) for values in (n_params, tokens, loss)]
    check_cells(*arrays)
    centred = centre(*arrays)
    starts = plan_starts(centred, delta)
    minima = sorted((polish(start, centred, delta) for start in starts), key=lambda found: found[1])
    theta, objective = minima[0]
    shape = jacobian(theta, centred)
    return Fit(
        law=law_of_theta(theta, centred),
        theta=theta,
        centred=centred,
        objective=objective,
        delta=delta,
        residuals=centred.log_loss - predict_log_loss(theta, centred),
        basins=distinct_basins(minima, centred),
        at_bounds=name_bounds(theta, centred),
        condition_number=float(np.linalg.cond(shape / np.linalg.norm(shape, axis=0))),
        n_starts=GRID.size**2,
        n_polished=len(starts),
    )


def check_cells(n_params: FloatArray, tokens: FloatArray, loss: FloatArray) -> None:
    """Refuse cells from which five parameters cannot be learned.

    Raises:
        FitError: what is missing and which cells would supply it.
    """
    for name, values in (("parameters", n_params), ("tokens", tokens), ("val_loss", loss)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise FitError(
                f"cell {bad[0]}: {name}={values[bad[0]]:g}, has no logarithm; exclude {bad.size} such cell(s)"
            )
    sizes, budgets = np.unique(n_params).size, np.unique(tokens).size
    if loss.size < MIN_CELLS or sizes < MIN_SIZES or budgets < MIN_BUDGETS:
        raise FitError(
            f"{loss.size} usable cell(s), {sizes} model size(s), {budgets} token budget(s): the law has five parameters and "
            f"needs at least {MIN_CELLS} cells, {MIN_SIZES} sizes and {MIN_BUDGETS} budgets; {name_missing(loss.size, sizes, budgets)}"
        )
    if np.linalg.matrix_rank(np.column_stack([np.ones(loss.size), np.log(n_params), np.log(tokens)])) < 3:
        raise FitError(
            "tokens are one power of the parameters in every cell, so the two terms cannot be told apart; "
            "add cells with another number of tokens per parameter"
        )


def name_missing(n_cells: int, sizes: int, budgets: int) -> str:
    """Say which cells would make a fit possible."""
    wanted = []
    if sizes < MIN_SIZES:
        wanted.append(f"{MIN_SIZES - sizes} more model size(s) in grid.sizes")
    if budgets < MIN_BUDGETS:
        wanted.append(f"{MIN_BUDGETS - budgets} more token budget(s) in grid.tokens")
    if not wanted:
        wanted.append(f"{MIN_CELLS - n_cells} more cell(s), of sizes and budgets that are planned but not done, or new")
    return "train " + " and ".join(wanted)


def sum_huber(residuals: FloatArray, delta: float) -> FloatArray:
    """Add up Huber losses over the last axis: r^2 / 2 up to delta, then a straight line."""
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=-1))


def plan_starts(centred: Centred, delta: float) -> list[FloatArray]:
    """Solve the linear part of the law on the grid of exponents; return the best points that are not neighbours."""
    alpha, beta = (axis.ravel() for axis in np.meshgrid(GRID, GRID, indexing="ij"))
    basis = np.stack(
        np.broadcast_arrays(
            np.exp(-alpha[:, None] * centred.x), np.exp(-beta[:, None] * centred.y), np.ones((1, 1))
        ),
        axis=-1,
    ) / np.exp(centred.log_loss[:, None])
    weights = np.ones(basis.shape[:2])
    for _ in range(3):  # reweighting turns least squares towards the Huber objective
        terms = solve_non_negative(basis, weights)
        log_ratio = np.log(np.einsum("gni,gi->gn", basis, terms))
        weights = 1 / np.maximum(np.abs(log_ratio), delta)
    logs = np.log(np.maximum(terms, 10 * zero_term(centred)))
    points = np.column_stack([logs, alpha, beta])
    return [points[i] for i in best_apart(sum_huber(log_ratio, delta).reshape(GRID.size, GRID.size))]


def best_apart(objective: FloatArray) -> list[int]:
    """Return flat indices of the lowest grid points, none within two grid steps of a better one."""
    left, chosen = objective.copy(), []
    for _ in range(N_POLISHED):
        i, j = np.unravel_index(np.argmin(left), left.shape)
        if not np.isfinite(left[i, j]):
            break
        chosen.append(int(i * left.shape[1] + j))
        left[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] = np.inf
    return chosen


def solve_non_negative(basis: FloatArray, weights: FloatArray) -> FloatArray:
    """Minimise sum_n w_n (basis_n . z - 1)^2 over z >= 0, exactly, by trying each choice of which z are above zero.

    Shapes: basis (g, n, 3), weights (g, n) -> (g, 3).
    """
    weighted = basis * weights[..., None]
    gram = np.einsum("gni,gnj->gij", weighted, basis)
    moment = weighted.sum(axis=1)
    active = ACTIVE_SETS
    matrices = gram[:, None] * (active[:, :, None] * active[:, None, :]) + np.eye(3) * (1 - active[:, None, :])
    matrices = matrices + np.eye(3) * (1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None, None])
    candidates = np.linalg.solve(matrices, (moment[:, None] * active)[..., None])[..., 0] * active
    cost = np.einsum("gki,gij,gkj->gk", candidates, gram, candidates) - 2 * np.einsum(
        "gki,gi->gk", candidates, moment
    )
    cost[(candidates < 0).any(axis=-1)] = np.inf
    return np.asarray(np.take_along_axis(candidates, cost.argmin(axis=1)[:, None, None], axis=1)[:, 0])


def zero_term(centred: Centred) -> float:
    """Return the size at which a term of the law counts as zero."""
    return ZERO_TERM * float(np.exp(centred.log_loss.min()))


def bounds_of(centred: Centred) -> tuple[FloatArray, FloatArray]:
    """Return where theta may be."""
    floor = np.log(zero_term(centred))
    low, high = EXPONENT_BOUNDS
    return np.array([floor, floor, floor, low, low]), np.array([np.inf, np.inf, np.inf, high, high])


def polish(start: FloatArray, centred: Centred, delta: float) -> tuple[FloatArray, float]:
    """Descend from one start to its minimum. scipy's huber cost at f_scale = delta is the objective itself."""
    low, high = bounds_of(centred)
    found = least_squares(
        lambda theta: predict_log_loss(theta, centred) - centred.log_loss,
        np.clip(start, low + 1e-9, high - 1e-9),
        jac=lambda theta: jacobian(theta, centred),
        bounds=(low, high),
        loss="huber",
        f_scale=delta,
        x_scale="jac",
        xtol=1e-13,
        ftol=1e-13,
        gtol=1e-13,
        max_nfev=500,
    )
    return np.asarray(found.x), float(found.cost)


def distinct_basins(minima: list[tuple[FloatArray, float]], centred: Centred) -> tuple[Basin, ...]:
    """Keep the minima within 1% of the best objective that are different places, not one place reached twice."""
    best = minima[0][1]
    kept: list[FloatArray] = []
    basins: list[Basin] = []
    for theta, objective in minima:
        near = objective <= best * 1.01 or objective < 1e-20
        if near and all(np.abs(theta - other).max() > 1e-3 for other in kept):
            kept.append(theta)
            basins.append(Basin(law_of_theta(theta, centred), objective))
    return tuple(basins)


def name_bounds(theta: FloatArray, centred: Centred) -> tuple[str, ...]:
    """Name the parameters that stand at the edge of their range."""
    low, high = bounds_of(centred)
    names = ("A", "B", "E", "alpha", "beta")
    return tuple(
        name for name, value, lo, hi in zip(names, theta, low, high, strict=True) if value < lo + 1e-3 or value > hi - 1e-3
    )
