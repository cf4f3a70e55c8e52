"""Fit a scaling law to cells: robust, from many starts, saying what the data do not hold.

The objective is the sum over cells of huber(ln L fitted - ln L observed) with delta = 1e-3 (Hoffmann et al. 2022, section
3.3). A sum, not a mean: with a mean, an optimiser at its default tolerance stops early, and that paper's constants show it.

For given exponents the law is linear in A, B and E, so one small non-negative least-squares problem solves a start, and a
whole grid of exponents is solved at once (variable projection). The best few grid points that lie apart are then polished.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from harness.config import ConfigError
from results.laws import Centred, Chinchilla, FloatArray, centre, jacobian, law_of_theta, predict_log_loss

DELTA = 1e-3
THETA = ("A", "B", "E", "alpha", "beta")  # what each entry of theta stands for
EXPONENT_BOUNDS = (0.01, 3.0)
ZERO_SHARE = 1e-6  # a term of the law below this share of the lowest loss counts as zero: its logarithm ends there
GRID = np.geomspace(0.05, 1.2, 14)  # exponents tried along each axis
N_POLISHED = 4
MIN_CELLS, MIN_SIZES, MIN_BUDGETS = 6, 3, 3  # five parameters and one degree of freedom; a curve needs three points
# The seven choices of which of A, B and E are above zero.
SUPPORTS = np.array([[1.0 if k >> i & 1 else 0.0 for i in range(3)] for k in range(1, 8)])


class FitError(ConfigError):
    """The cells cannot support the law: the message names what is missing and which cells would supply it."""


@dataclass(frozen=True)
class Basin:
    """One local minimum of the objective."""

    law: Chinchilla
    objective: float


@dataclass(frozen=True)
class Fit:
    """A fitted law, with what a reader needs to trust it or not.

    Shapes: theta (5,); residuals (n,), in the order of the cells: ln observed - ln fitted, so above zero is worse than the law.
    """

    law: Chinchilla
    theta: FloatArray
    centred: Centred
    objective: float
    delta: float
    residuals: FloatArray
    basins: tuple[Basin, ...]  # minima within 1% of the best objective, best first
    at_bounds: tuple[str, ...]  # parameters that ended at the edge of where they may be
    condition_number: float  # of the Jacobian in centred logs, its columns scaled to length 1
    n_starts: int
    n_polished: int

    @property
    def n_cells(self) -> int:
        """How many cells were fitted."""
        return len(self.residuals)


def fit_chinchilla(n_params: npt.ArrayLike, tokens: npt.ArrayLike, loss: npt.ArrayLike, *, delta: float = DELTA) -> Fit:
    """Minimise the sum of Huber losses of log residuals over E, A, B, alpha and beta.

    Raises:
        FitError: a number that has no logarithm, or too few cells, sizes or budgets for five parameters.
    """
    n, d, losses = (np.asarray(values, dtype=float) for values in (n_params, tokens, loss))
    check_cells(n, d, losses)
    centred = centre(n, d, losses)
    starts = plan_starts(centred, delta)
    minima = sorted((polish(start, centred, delta) for start in starts), key=lambda found: found[1])
    theta, objective = minima[0]
    slopes = jacobian(theta, centred)
    return Fit(
        law=law_of_theta(theta, centred),
        theta=theta,
        centred=centred,
        objective=objective,
        delta=delta,
        residuals=centred.log_loss - predict_log_loss(theta, centred),
        basins=list_basins(minima, centred),
        at_bounds=tuple(np.array(THETA)[is_at_bound(theta, centred)].tolist()),
        condition_number=float(np.linalg.cond(slopes / np.linalg.norm(slopes, axis=0))),
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
            raise FitError(f"cell {bad[0]}: {name}={values[bad[0]]:g}, has no logarithm; leave out such cells ({bad.size})")
    sizes, budgets = np.unique(n_params).size, np.unique(tokens).size
    if loss.size < MIN_CELLS or sizes < MIN_SIZES or budgets < MIN_BUDGETS:
        raise FitError(
            f"usable cells={loss.size}, of {sizes} model size(s) and {budgets} token budget(s), are too few for the law's "
            f"five parameters (at least {MIN_CELLS} cells, {MIN_SIZES} sizes, {MIN_BUDGETS} budgets); "
            f"{name_missing(loss.size, sizes, budgets)}"
        )
    columns = np.column_stack([np.ones(loss.size), np.log(n_params), np.log(tokens)])
    if np.linalg.matrix_rank(columns) < 3:
        raise FitError(
            "tokens: follow one power of the parameters in every cell, so the law's two terms cannot be told apart; "
            "add cells of a size already there with another number of tokens"
        )


def name_missing(n_cells: int, sizes: int, budgets: int) -> str:
    """Say which cells would make a fit possible."""
    wanted = []
    if sizes < MIN_SIZES:
        wanted.append(f"{MIN_SIZES - sizes} more model size(s) (grid.sizes)")
    if budgets < MIN_BUDGETS:
        wanted.append(f"{MIN_BUDGETS - budgets} more token budget(s) (grid.tokens)")
    if not wanted:
        wanted.append(f"{MIN_CELLS - n_cells} more cell(s) of other sizes or budgets")
    return "train " + " and ".join(wanted)


def sum_huber(residuals: FloatArray, delta: float) -> FloatArray:
    """Add up Huber losses along the last axis: r^2 / 2 as far as delta, a straight line beyond."""
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=-1))


def plan_starts(centred: Centred, delta: float) -> list[FloatArray]:
    """Solve the linear part of the law for every pair of exponents of `GRID`; return the best pairs that lie apart."""
    alpha, beta = (axis.ravel() for axis in np.meshgrid(GRID, GRID, indexing="ij"))
    by_n, by_d = np.exp(-alpha[:, None] * centred.x), np.exp(-beta[:, None] * centred.y)
    basis = np.stack([by_n, by_d, np.ones_like(by_n)], axis=-1) / np.exp(centred.log_loss[:, None])
    weights = np.ones_like(by_n)
    for _ in range(3):  # reweighting leads from least squares towards the Huber objective
        terms = solve_non_negative(basis, weights)
        log_ratio = np.log(np.einsum("gni,gi->gn", basis, terms))
        weights = 1 / np.maximum(np.abs(log_ratio), delta)
    points = np.column_stack([np.log(np.maximum(terms, 10 * zero_term(centred))), alpha, beta])
    return [points[i] for i in pick_apart(sum_huber(log_ratio, delta).reshape(GRID.size, GRID.size))]


def pick_apart(objective: FloatArray) -> list[int]:
    """Return flat indices of the lowest grid points, best first, none within two grid steps of a better one."""
    left, chosen = objective.copy(), []
    for _ in range(N_POLISHED):
        i, j = divmod(int(np.argmin(left)), left.shape[1])
        chosen.append(i * left.shape[1] + j)
        left[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] = np.inf
    return chosen


def solve_non_negative(basis: FloatArray, weights: FloatArray) -> FloatArray:
    """Minimise sum_n w_n (basis_n . z - 1)^2 over z >= 0, exactly: by trying every choice of which z are above zero.

    Shapes: basis (g, n, 3), weights (g, n) -> (g, 3).
    """
    weighted = basis * weights[..., None]
    gram, moment = np.matmul(weighted.transpose(0, 2, 1), basis), weighted.sum(axis=1)
    ridge = 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None, None]  # two columns may be all but parallel
    inside = SUPPORTS[:, :, None] * SUPPORTS[:, None, :]
    systems = gram[:, None] * inside + np.eye(3) * (1 - SUPPORTS[:, None, :] + ridge)
    tried = np.linalg.solve(systems, (moment[:, None] * SUPPORTS)[..., None])[..., 0] * SUPPORTS
    cost = np.einsum("gki,gij,gkj->gk", tried, gram, tried) - 2 * np.einsum("gki,gi->gk", tried, moment)
    cost[(tried < 0).any(axis=-1)] = np.inf
    return np.asarray(np.take_along_axis(tried, cost.argmin(axis=1)[:, None, None], axis=1)[:, 0])


def zero_term(centred: Centred) -> float:
    """Return the size at which a term of the law counts as zero. Units: nats per token."""
    return ZERO_SHARE * float(np.exp(centred.log_loss.min()))


def find_bounds(centred: Centred) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest theta allowed."""
    floor, (low, high) = np.log(zero_term(centred)), EXPONENT_BOUNDS
    return np.array([floor, floor, floor, low, low]), np.array([np.inf, np.inf, np.inf, high, high])


def is_at_bound(theta: FloatArray, centred: Centred) -> npt.NDArray[np.bool_]:
    """Say which entries of theta stand at an edge. Shapes: (..., 5) -> (..., 5)."""
    low, high = find_bounds(centred)
    return np.asarray((theta < low + 1e-3) | (theta > high - 1e-3))


def polish(start: FloatArray, centred: Centred, delta: float) -> tuple[FloatArray, float]:
    """Descend from one start to its minimum; scipy's huber cost with f_scale = delta is the objective itself."""
    low, high = find_bounds(centred)

    def log_ratio(theta: FloatArray) -> FloatArray:
        return predict_log_loss(theta, centred) - centred.log_loss

    def slopes(theta: FloatArray) -> FloatArray:
        return jacobian(theta, centred)

    found = least_squares(
        log_ratio,
        np.clip(start, low + 1e-6, high - 1e-6),
        jac=slopes,
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


def list_basins(minima: list[tuple[FloatArray, float]], centred: Centred) -> tuple[Basin, ...]:
    """Keep the minima within 1% of the best objective, each place once."""
    kept: list[FloatArray] = []
    basins: list[Basin] = []
    for theta, objective in minima:
        is_near = objective <= max(1.01 * minima[0][1], 1e-18)  # data without noise: every minimum at zero is the same
        if is_near and all(np.abs(theta - other).max() > 1e-3 for other in kept):
            kept.append(theta)
            basins.append(Basin(law_of_theta(theta, centred), objective))
    return tuple(basins)


@dataclass(frozen=True)
class Refits:
    """Many fits of the same cells with other losses. Shapes: theta (r, 5), objective and converged (r,)."""

    theta: FloatArray
    objective: FloatArray
    converged: npt.NDArray[np.bool_]


def refit_many(fit: Fit, log_losses: FloatArray, max_steps: int = 500, tolerance: float = 1e-6) -> Refits:
    """Fit each row of `log_losses`, all at once, starting from a fit.

    Levenberg-Marquardt on reweighted least squares; rows that have arrived drop out. A test holds it to scipy's minima.
    Shapes: log_losses (r, n).
    """
    centred, delta, n_rows = fit.centred, fit.delta, len(log_losses)
    theta, damping = np.repeat(fit.theta[None], n_rows, axis=0), np.full(n_rows, 1e-3)
    residuals = predict_log_loss(theta, centred) - log_losses
    objective, converged = sum_huber(residuals, delta), np.zeros(n_rows, dtype=bool)
    rows = np.arange(n_rows)  # those still on their way
    for _ in range(max_steps):
        tried = take_step(theta[rows], residuals[rows], damping[rows], centred, delta)
        tried_residuals = predict_log_loss(tried, centred) - log_losses[rows]
        gain = objective[rows] - sum_huber(tried_residuals, delta)
        better = gain > 0
        improved = rows[better]
        theta[improved], residuals[improved] = tried[better], tried_residuals[better]
        objective[improved] -= gain[better]
        damping[rows] *= np.where(better, 0.2, 5.0)
        arrived = (better & (gain <= tolerance * objective[rows])) | (damping[rows] > 1e6)
        converged[rows[arrived]] = True
        rows = rows[~arrived]
        if not rows.size:
            break
    return Refits(theta, objective, converged)


def take_step(theta: FloatArray, residuals: FloatArray, damping: FloatArray, centred: Centred, delta: float) -> FloatArray:
    """Return one damped step for each row; an entry at its bound that would leave its range stays.

    Shapes: theta (r, 5), residuals (r, n), damping (r,) -> (r, 5).
    """
    low, high = find_bounds(centred)
    slopes = jacobian(theta, centred)
    weighted = slopes * (delta / np.maximum(np.abs(residuals), delta))[..., None]
    gradient = np.einsum("rni,rn->ri", weighted, residuals)
    curvature = np.matmul(weighted.transpose(0, 2, 1), slopes)
    free = ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))) * 1.0
    diagonal = damping[:, None] * np.einsum("rii->ri", curvature) + 1e-30
    system = curvature * (free[:, :, None] * free[:, None, :]) + np.eye(5) * (1 - free + diagonal)[:, None, :]
    step = np.linalg.solve(system, (gradient * free)[..., None])[..., 0]
    return np.asarray(np.clip(theta - step, low, high))
