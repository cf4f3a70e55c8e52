"""Fit a scaling law to cells: robust, from many starts, saying what the data do not hold.

For given exponents a law is linear in its coefficients, so one small non-negative least-squares problem solves a start, and a
whole grid of exponents is solved at once (variable projection). The best grid points that lie apart are then polished.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.special import chdtri

from harness.config import ConfigError
from results.descend import LOG_HUBER, SOLVED, ZERO_SHARE, Objective, Refits, descend, find_bounds
from results.laws import (
    CHINCHILLA,
    Centred,
    Chinchilla,
    FloatArray,
    Law,
    centre,
    jacobian,
    params_of_theta,
    predict_log_loss,
    theta_of_params,
)

N_TRIED = {1: 40, 2: 12, 3: 8}  # exponents tried along each axis, by how many axes there are
TRIED = (0.05, 1.2)
EXTRA_TRIED = (0.5, 1.7, 5.0, 15.0, 50.0, 150.0)
FLOORS_TRIED = (
    0.0,
    0.3,
    0.5,
    0.7,
    0.85,
    0.95,
)  # shares of the lowest loss, where an outer exponent keeps the floor from being linear
N_APART = 6
IN_THE_RUNNING = 1.3  # of the best objective, after some steps
MIN_VALUES = 3  # of each input: a curve needs three points
NEAR_ZERO = 0.01  # a floor below this share of the lowest loss is no floor
INPUT_WORDS = {"n_params": "model size(s)", "tokens": "token budget(s)", "unique_tokens": "amount(s) of unique text"}
GRID_KEYS = {"n_params": "grid.sizes", "tokens": "grid.tokens", "unique_tokens": "data.dir"}


class FitError(ConfigError):
    """The cells cannot support the law: the message names what is missing and which cells would supply it."""


@dataclass(frozen=True)
class Basin:
    """One local minimum of the objective. Shapes: params (p,)."""

    params: FloatArray
    objective_value: float


@dataclass(frozen=True)
class Fit:
    """A fitted law, with what a reader needs to trust it or not.

    Shapes: params and theta (p,), in the order of `law.parameters`; free (p,); weights and residuals (n,), in the order of the
    cells. Residuals are observed - fitted, in logs where the objective is, so above zero is worse than the law.
    """

    law: Law
    params: FloatArray
    theta: FloatArray
    centred: Centred
    objective: Objective
    objective_value: float
    weights: FloatArray
    free: npt.NDArray[np.bool_]
    residuals: FloatArray
    basins: tuple[Basin, ...]  # minima within 1% of the best objective, best first
    at_bounds: tuple[str, ...]  # parameters that ended at the edge of where they may be
    open_sides: tuple[str, ...]  # "beta up": the data hardly object to any larger value, at the 95% level
    condition_number: float  # of the Jacobian in centred logs, its columns scaled to length 1
    n_starts: int
    n_polished: int

    def __getitem__(self, parameter: str) -> float:
        """Return a parameter by name."""
        return float(self.params[self.law.index(parameter)])

    @property
    def fixed(self) -> tuple[str, ...]:
        """The parameters that were held fixed."""
        return tuple(name for name, free in zip(self.law.parameters, self.free, strict=True) if not free)

    @property
    def log_residuals(self) -> FloatArray:
        """ln L observed - ln L fitted, whatever was minimised. Shapes: (n,)."""
        return self.centred.log_loss - predict_log_loss(self.theta, self.centred)

    @property
    def n_cells(self) -> int:
        """How many cells were fitted."""
        return len(self.residuals)

    @property
    def constants(self) -> Chinchilla:
        """The parameters as Chinchilla's, where the law is of that form."""
        return self.law.as_chinchilla(self.params)

    @property
    def is_floor_near_zero(self) -> bool:
        """Whether the law has a floor that the cells do not see."""
        return bool(self.law.floor) and self[self.law.floor] < NEAR_ZERO * float(np.exp(self.centred.log_loss.min()))


def fit_chinchilla(
    n_params: npt.ArrayLike, tokens: npt.ArrayLike, loss: npt.ArrayLike, *, objective: Objective = LOG_HUBER
) -> Fit:
    """Fit Chinchilla's law to three columns."""
    return fit_law(CHINCHILLA, {"n_params": n_params, "tokens": tokens, "val_loss": loss}, objective)


def fit_law(
    law: Law,
    cells: Mapping[str, npt.ArrayLike],
    objective: Objective = LOG_HUBER,
    weights: npt.ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """Minimise the objective over the law's parameters; `cells` holds the law's inputs and val_loss, as the table does.

    Raises:
        FitError: a number that has no logarithm, or too few cells or values of an input for the parameters.
    """
    columns = {name: np.asarray(cells[name], dtype=float) for name in (*law.inputs, "val_loss")}
    fixed = dict(fixed or {})
    check_cells(law, columns, len(law.parameters) - len(fixed))
    # A coefficient that is fixed at N = 1 and D = 1 can stay fixed only if the logs are not moved.
    centred = centre(law, columns, columns["val_loss"], at=0.0 if fixed else None)
    free = np.array([name not in fixed for name in law.parameters])
    share = np.ones(len(centred.log_loss)) if weights is None else np.asarray(weights, dtype=float)
    starts = plan_starts(centred, objective, share, fixed)
    found = search(centred, starts, objective, share, free)
    return describe_fit(centred, found, objective, share, free)


def search(
    centred: Centred, starts: FloatArray, objective: Objective, weights: FloatArray, free: npt.NDArray[np.bool_]
) -> Refits:
    """Go some steps from every start, then all the way from those that are still in the running, and from around the best.

    Note: with a small delta a few cells decide where a minimum lies, and beside it there are others: hence around the best.
    """
    near = descend(centred, starts, centred.log_loss, objective, weights, free, max_steps=25)
    running = near.theta[near.objective <= IN_THE_RUNNING * near.objective.min() + SOLVED]
    around = shake(near.theta[int(np.argmin(near.objective))], centred, float(near.objective.min()), objective, weights, free)
    return descend(centred, np.concatenate([running, around]), centred.log_loss, objective, weights, free)


def shake(
    theta: FloatArray, centred: Centred, value: float, objective: Objective, weights: FloatArray, free: npt.NDArray[np.bool_]
) -> FloatArray:
    """Move theta both ways along each principal direction of its curvature, as far as would double least squares.

    Shapes: -> (2p, p).
    """
    log_loss, slopes = centred.law.evaluate(theta[None], centred)
    slopes = slopes[0, free] * np.sqrt(weights) * (1.0 if objective.in_logs else np.exp(log_loss))
    residuals = objective.compare(log_loss[0], centred.log_loss)
    curvature, directions = np.linalg.eigh(slopes @ slopes.T)
    reach = np.sqrt((weights * residuals**2).sum() / len(residuals) / np.maximum(curvature, 1e-12 * curvature[-1]))
    moved = np.repeat(theta[None], 2 * len(reach), axis=0)
    moved[:, free] += np.concatenate([directions.T * reach[:, None], -directions.T * reach[:, None]])
    return moved


def describe_fit(centred: Centred, found: Refits, objective: Objective, weights: FloatArray, free: npt.NDArray[np.bool_]) -> Fit:
    """Put the best of some minima beside what there is to doubt about it."""
    best = int(np.argmin(found.objective))
    theta, value = found.theta[best], float(found.objective[best])
    slopes = jacobian(theta, centred)[:, free]
    return Fit(
        law=centred.law,
        params=params_of_theta(theta, centred),
        theta=theta,
        centred=centred,
        objective=objective,
        objective_value=value,
        weights=weights,
        free=free,
        residuals=-objective.compare(predict_log_loss(theta, centred), centred.log_loss),
        basins=list_basins(found, centred),
        at_bounds=tuple(np.array(centred.law.parameters)[is_at_bound(theta, centred) & free].tolist()),
        open_sides=find_open_sides(theta, value, centred, objective, weights, free),
        condition_number=float(np.linalg.cond(slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-300))),
        n_starts=count_starts(centred.law),
        n_polished=len(found.theta),
    )


def fit_many(
    law: Law,
    cells: Mapping[str, npt.ArrayLike],
    losses: npt.ArrayLike,
    start: npt.ArrayLike,
    objective: Objective = LOG_HUBER,
    weights: FloatArray | float = 1.0,
    *,
    tolerance: float = 1e-9,
) -> FloatArray:
    """Fit each row of `losses` to the same cells, all at once, from one set of parameters; return each row's parameters.

    Shapes: losses and weights (m, n) or (n,), start (p,) or (m, p) -> (m, p).
    """
    rows = np.atleast_2d(np.asarray(losses, dtype=float))
    centred = centre(law, cells, rows.min(axis=0))
    refits = descend(centred, theta_of_params(start, centred), np.log(rows), objective, weights, tolerance=tolerance)
    return params_of_theta(refits.theta, centred)


def refit_many(
    fit: Fit, log_losses: FloatArray | None = None, weights: FloatArray | None = None, *, tolerance: float = 1e-9
) -> Refits:
    """Fit each row of other log losses, or of other weights, to the cells of a fit, all at once, starting from it.

    Shapes: log_losses, weights (m, n).
    """
    rows = fit.centred.log_loss if log_losses is None else log_losses
    share = fit.weights if weights is None else weights
    return descend(fit.centred, fit.theta, rows, fit.objective, share, fit.free, tolerance=tolerance)


def check_cells(law: Law, columns: Mapping[str, FloatArray], n_free: int) -> None:
    """Refuse cells from which the law's parameters cannot be learned.

    Raises:
        FitError: what is missing and which cells would supply it.
    """
    for name, values in columns.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise FitError(f"cell {bad[0]}: {name}={values[bad[0]]:g}, has no logarithm; leave out such cells ({bad.size})")
    n_cells = len(columns["val_loss"])
    counts = {name: count_distinct(columns[name]) for name in law.inputs}
    if n_cells <= n_free or any(count < MIN_VALUES for count in counts.values()):
        seen = " and ".join(f"{count} {INPUT_WORDS[name]}" for name, count in counts.items())
        wanted = ", ".join(f"{MIN_VALUES} {INPUT_WORDS[name]}" for name in counts)
        raise FitError(
            f"usable cells={n_cells}, of {seen}, are too few for the {n_free} parameters of {law.name} "
            f"(at least {n_free + 1} cells, {wanted}); {name_missing(n_free + 1 - n_cells, counts)}"
        )
    logs = np.log([columns[name] for name in law.inputs])
    if np.linalg.matrix_rank(np.vstack([np.ones(n_cells), logs])) <= len(law.inputs):
        raise FitError(
            "tokens: follow one power of the parameters in every cell, so the law's two terms cannot be told apart; "
            "add cells of a size already there with another number of tokens"
        )


def count_distinct(values: FloatArray) -> int:
    """Count values that differ by more than rounding, which tokens computed from FLOPs carry."""
    return int(np.unique(np.round(np.log(values), 6)).size)


def name_missing(n_missing: int, counts: Mapping[str, int]) -> str:
    """Say which cells would make a fit possible."""
    wanted = [
        f"{MIN_VALUES - count} more {INPUT_WORDS[name]} ({GRID_KEYS[name]})"
        for name, count in counts.items()
        if count < MIN_VALUES
    ]
    return "train " + (" and ".join(wanted) or f"{n_missing} more cell(s) of other {' or '.join(INPUT_WORDS[i] for i in counts)}")


def list_axes(law: Law, fixed: Mapping[str, float] | None = None) -> dict[str, FloatArray]:
    """Return the values tried for each parameter in which a law is not linear."""
    names = [*law.exponents, *([law.outer] if law.outer else [])]
    tried = np.geomspace(*TRIED, N_TRIED[len(names)])
    axes = {name: np.array([fixed[name]]) if fixed and name in fixed else tried for name in names}
    axes |= {name: np.array([fixed[name]] if fixed and name in fixed else EXTRA_TRIED) for name in law.extra}
    return axes | ({law.floor: np.array(FLOORS_TRIED)} if law.floor and law.outer else {})


def count_starts(law: Law) -> int:
    """Count the grid points tried."""
    return int(np.prod([axis.size for axis in list_axes(law).values()]))


def plan_starts(centred: Centred, objective: Objective, weights: FloatArray, fixed: Mapping[str, float]) -> FloatArray:
    """Solve the linear part of the law for every point of a grid of exponents; return the best that lie apart.

    Shapes: -> (k, p), k at most `N_APART`.
    """
    law, axes = centred.law, list_axes(centred.law, fixed)
    theta = np.zeros((int(np.prod([axis.size for axis in axes.values()])), len(law.parameters)))
    for name, column in zip(axes, np.array(list(product(*axes.values()))).T, strict=True):
        theta[:, law.index(name)] = np.log(column) if name in law.extra else column
    if law.floor and law.outer:
        lowest = np.exp(centred.log_loss.min())
        theta[:, 0] = np.log(lowest * np.maximum(theta[:, 0], ZERO_SHARE))
    solve_linear(theta, centred, objective, weights)
    given = theta_of_params([fixed.get(name, 1.0) for name in law.parameters], centred)
    theta = np.where([name in fixed for name in law.parameters], given, theta)
    reached = objective.sum(objective.compare(predict_log_loss(theta, centred), centred.log_loss), weights)
    return theta[pick_apart(reached.reshape([axis.size for axis in axes.values()]))]


def solve_linear(theta: FloatArray, centred: Centred, objective: Objective, weights: FloatArray) -> None:
    """Put the best coefficients beside the exponents that stand in theta (changed in place)."""
    law, (_, t, n) = centred.law, centred.design.shape
    nonlinear = [law.index(name) for name in law.exponents]
    terms = (theta[:, nonlinear] @ centred.design[nonlinear].reshape(-1, t * n)).reshape(-1, t, n)
    terms += 0.0 if centred.fixed is None else centred.fixed
    target, first = centred.log_loss, 0
    if law.outer:
        above = centred.log_loss if not law.floor else np.log(np.exp(target) - np.exp(np.minimum(theta[:, :1], target - 1e-9)))
        target, first = above / theta[:, [law.index(law.outer)]], 1 if law.floor else 0
    basis = np.exp(terms[:, first:] - np.broadcast_to(target, (len(theta), n))[:, None]).transpose(0, 2, 1)
    share = np.broadcast_to(weights if objective.in_logs else weights * np.exp(2 * centred.log_loss), basis.shape[:2])
    pull = share
    for _ in range(3 if np.isfinite(objective.delta) else 1):  # reweighting leads from least squares towards Huber's objective
        solved = solve_non_negative(basis, pull)
        log_ratio = np.log(np.maximum(np.einsum("gni,gi->gn", basis, solved), 1e-300))
        pull = share / np.maximum(np.abs(log_ratio), min(objective.delta, 1.0))
    zero = ZERO_SHARE * 10 * (np.exp(centred.log_loss.min()) if not law.outer else 1e-3)
    theta[:, first : first + solved.shape[1]] = np.log(np.maximum(solved, zero))


def pick_apart(objective: FloatArray) -> list[int]:
    """Return flat indices of the lowest grid points, best first, none within two grid steps of a better one."""
    left = objective.copy()
    chosen: list[int] = []
    while len(chosen) < N_APART and np.isfinite(left).any():
        place = np.unravel_index(int(np.argmin(left)), left.shape)
        chosen.append(int(np.ravel_multi_index(place, left.shape)))
        left[tuple(slice(max(i - 2, 0), i + 3) for i in place)] = np.inf
    return chosen


def solve_non_negative(basis: FloatArray, weights: FloatArray) -> FloatArray:
    """Minimise sum_n w_n (basis_n . z - 1)^2 over z >= 0, exactly: by trying every choice of which z are above zero.

    Shapes: basis (g, n, k), weights (g, n) -> (g, k).
    """
    k = basis.shape[2]
    supports = np.array(list(product([0.0, 1.0], repeat=k))[1:])
    weighted = basis * weights[..., None]
    gram, moment = np.matmul(weighted.transpose(0, 2, 1), basis), weighted.sum(axis=1)
    ridge = 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None, None]  # two columns may be all but parallel
    inside = supports[:, :, None] * supports[:, None, :]
    systems = gram[:, None] * inside + np.eye(k) * (1 - supports[:, None, :] + ridge)
    tried = np.linalg.solve(systems, (moment[:, None] * supports)[..., None])[..., 0] * supports
    cost = np.einsum("gki,gij,gkj->gk", tried, gram, tried) - 2 * np.einsum("gki,gi->gk", tried, moment)
    cost[(tried < 0).any(axis=-1)] = np.inf
    return np.asarray(np.take_along_axis(tried, cost.argmin(axis=1)[:, None, None], axis=1)[:, 0])


def is_at_bound(theta: FloatArray, centred: Centred) -> npt.NDArray[np.bool_]:
    """Say which entries of theta stand at an edge. Shapes: (..., p) -> (..., p)."""
    low, high = find_bounds(centred)
    return np.asarray((theta < low + 1e-3) | (theta > high - 1e-3))


def list_basins(found: Refits, centred: Centred) -> tuple[Basin, ...]:
    """Keep the minima within 1% of the best objective, each place once."""
    kept: list[FloatArray] = []
    basins: list[Basin] = []
    for i in np.argsort(found.objective):
        theta, value = found.theta[i], float(found.objective[i])
        is_near = value <= max(1.01 * found.objective.min(), 1e-18)  # data without noise: every minimum at zero is the same
        if is_near and all(np.abs(theta - other).max() > 1e-3 for other in kept):
            kept.append(theta)
            basins.append(Basin(params_of_theta(theta, centred), value))
    return tuple(basins)


def find_threshold(residuals: FloatArray, value: float, objective: Objective, level: float = 0.95) -> float:
    """Return the objective up to which a profile is inside a confidence region, its noise scale profiled out.

    Note: Laplace noise where most residuals lie beyond delta, so that the objective is all but a sum of sizes; else Gaussian.
    """
    is_laplace = np.mean(np.abs(residuals) > objective.delta) > 0.5
    return float(value * np.exp(chdtri(1, 1 - level) / (len(residuals) * (2 if is_laplace else 1))))


def find_open_sides(
    theta: FloatArray, value: float, centred: Centred, objective: Objective, weights: FloatArray, free: npt.NDArray[np.bool_]
) -> tuple[str, ...]:
    """Name the parameters whose profile is still inside its 95% region at the end of their range, and on which side."""
    law, bounds = centred.law, find_bounds(centred)
    residuals = objective.compare(predict_log_loss(theta, centred), centred.log_loss)
    threshold = find_threshold(residuals, value, objective)
    ends = [
        (name, side, bounds[side][law.index(name)])
        for name in law.parameters
        for side in (0, 1)
        if free[law.index(name)] and ((name == law.floor and side == 0) or name not in law.coefficients)
    ]
    starts, moves = np.repeat(theta[None], len(ends), axis=0), np.repeat(free[None], len(ends), axis=0)
    for row, (name, _, end) in enumerate(ends):
        starts[row, law.index(name)], moves[row, law.index(name)] = end, False
    found = descend(centred, starts, centred.log_loss, objective, weights, moves, tolerance=1e-3, max_steps=60)
    reached, near = found.objective, (found.objective > threshold) & (found.objective < 1.1 * threshold)
    if near.any():  # those that might still fall below it
        again = descend(
            centred, found.theta[near], centred.log_loss, objective, weights, moves[near], tolerance=1e-5, max_steps=200
        )
        reached[near] = again.objective
    return tuple(f"{name} {('down', 'up')[side]}" for (name, side, _), end in zip(ends, reached, strict=True) if end <= threshold)
