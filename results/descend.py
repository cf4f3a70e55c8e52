"""The minimiser: many fits of one law at once, each row its own problem.

A step solves (H + damping x M) step = gradient. M is the curvature of the least squares that lies above the objective
everywhere and touches it here (reweighting), so a damped step always descends; H is the curvature of the objective itself, to
which a cell beyond delta adds nothing, so an undamped step is Newton's and the last digits cost two or three steps, not hundreds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from results.laws import Centred, FloatArray

BATCH_SIZE = 60_000  # residuals evaluated at once: what stays in the processor's cache
EXPONENT_BOUNDS = (0.01, 3.0)
ZERO_SHARE = 1e-6  # a term of the law below this share of the lowest loss counts as zero: its logarithm ends there
EXTRA_BOUNDS = (1e-3, 1e6)
SOLVED = 1e-30  # an objective that is nothing but rounding
MAX_DAMPING = 1e12  # no step that can be told from rounding gains anything
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum over cells of weight x huber(residual), or of half squares where delta is infinite."""

    name: str
    delta: float = np.inf
    in_logs: bool = True  # residual ln L fitted - ln L observed, else the difference of losses

    def compare(self, log_loss: FloatArray, log_observed: FloatArray) -> FloatArray:
        """Return residuals, fitted less observed."""
        return log_loss - log_observed if self.in_logs else exp_safely(log_loss) - np.exp(log_observed)

    def sum(self, residuals: FloatArray, weights: FloatArray | float = 1.0) -> FloatArray:
        """Add up along the last axis: r^2 / 2 as far as delta, a straight line beyond."""
        return np.asarray((weights * rho(residuals, self.delta)).sum(axis=-1))


def exp_safely(log_loss: FloatArray) -> FloatArray:
    """Leave the logs; a step that went astray is told by a huge loss, not by an overflow."""
    return np.asarray(np.exp(np.minimum(log_loss, 30.0)))


def rho(residuals: FloatArray, delta: float) -> FloatArray:
    """Return Huber's loss of each residual."""
    if not np.isfinite(delta):
        return residuals**2 / 2
    near = np.minimum(np.abs(residuals), delta)
    return near * (np.abs(residuals) - near / 2)


# Hoffmann et al. 2022, section 3.3. A sum, not a mean: with a mean, an optimiser at its default tolerance stops early, and that
# paper's constants show it.
LOG_HUBER = Objective("log_huber", delta=1e-3)
LOG_MSE = Objective("log_mse")
MSE = Objective("mse", in_logs=False)
OBJECTIVES = {objective.name: objective for objective in (LOG_HUBER, LOG_MSE, MSE)}


@dataclass(frozen=True)
class Refits:
    """Many fits of the same cells. Shapes: theta (m, p), objective and converged (m,)."""

    theta: FloatArray
    objective: FloatArray
    converged: BoolArray


def find_bounds(centred: Centred) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest theta allowed. Shapes: (p,)."""
    law = centred.law
    low, high = np.full(len(law.parameters), EXPONENT_BOUNDS[0]), np.full(len(law.parameters), EXPONENT_BOUNDS[1])
    zero = np.log(ZERO_SHARE) + centred.log_loss.min()
    for i, name in enumerate(law.parameters):
        if name in law.coefficients:
            # The terms inside an outer exponent are that many times larger in logs.
            low[i], high[i] = (zero, np.inf) if name == law.floor or not law.outer else (-700.0, 700.0)
        elif name in law.extra:
            low[i], high[i] = np.log(EXTRA_BOUNDS)
    return low, high


@dataclass
class Batch:
    """Rows on their way.

    Shapes: theta, free (m, p); log_losses, weights, residuals (m, n); slopes (m, p, n); damping (m,).
    """

    centred: Centred
    objective: Objective
    bounds: tuple[FloatArray, FloatArray]
    theta: FloatArray
    log_losses: FloatArray
    weights: FloatArray
    free: BoolArray
    damping: FloatArray
    residuals: FloatArray
    slopes: FloatArray

    def evaluate(self, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return residuals and their slopes."""
        log_loss, slopes = self.centred.law.evaluate(theta, self.centred)
        if not self.objective.in_logs:
            slopes *= exp_safely(log_loss)[:, None]
        return self.objective.compare(log_loss, self.log_losses), slopes

    def keep(self, on: BoolArray) -> None:
        """Let the other rows go."""
        for name in ("theta", "log_losses", "weights", "free", "damping", "residuals", "slopes"):
            setattr(self, name, getattr(self, name)[on])


def descend(
    centred: Centred,
    start: FloatArray,
    log_losses: FloatArray,
    objective: Objective = LOG_HUBER,
    weights: FloatArray | float = 1.0,
    free: BoolArray | bool = True,
    *,
    tolerance: float = 1e-12,
    max_steps: int = 300,
) -> Refits:
    """Minimise from each row of `start` for each row of `log_losses`; entries of theta that are not `free` stay.

    Shapes: start (p,) or (m, p); log_losses and weights (n,) or (m, n); free (p,) or (m, p).
    """
    n, p = centred.x.shape[1], len(centred.law.parameters)
    m = max(np.shape(array)[0] if np.ndim(array) == 2 else 1 for array in (start, log_losses, weights, free))
    starts, targets, shares = (
        np.broadcast_to(start, (m, p)),
        np.broadcast_to(log_losses, (m, n)),
        np.broadcast_to(weights, (m, n)),
    )
    moves = np.broadcast_to(free, (m, p))
    parts = []
    for rows in np.array_split(np.arange(m), min(m, -(-m * n // BATCH_SIZE))):
        batch = begin_batch(centred, objective, starts[rows], targets[rows], shares[rows], moves[rows])
        parts.append(descend_batch(batch, tolerance, max_steps))
    return Refits(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def begin_batch(
    centred: Centred, objective: Objective, start: FloatArray, log_losses: FloatArray, weights: FloatArray, free: BoolArray
) -> Batch:
    """Put rows at their starts, inside the bounds."""
    bounds, nothing = find_bounds(centred), np.empty(0)
    theta = np.where(free, np.clip(start, *bounds), start)
    batch = Batch(centred, objective, bounds, theta, log_losses, weights, free, np.ones(len(theta)), nothing, nothing)
    batch.residuals, batch.slopes = batch.evaluate(theta)
    return batch


def descend_batch(batch: Batch, tolerance: float, max_steps: int) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Minimise a batch of rows together; a row that has arrived drops out."""
    final, value = batch.theta.copy(), batch.objective.sum(batch.residuals, batch.weights)
    converged, rows = np.zeros(len(final), dtype=bool), np.arange(len(final))
    for _ in range(max_steps):
        step, promised = plan_step(batch)
        on = (promised > tolerance * value[rows]) & (value[rows] > SOLVED) & (batch.damping < MAX_DAMPING)
        if not on.all():
            final[rows[~on]], converged[rows[~on]] = batch.theta[~on], True
            batch.keep(on)
            rows, step = rows[on], step[on]
        if not rows.size:
            break
        tried = np.where(batch.free, np.clip(batch.theta - step, *batch.bounds), batch.theta)
        residuals, slopes = batch.evaluate(tried)
        reached = batch.objective.sum(residuals, batch.weights)
        better = reached < value[rows]
        value[rows] = np.where(better, reached, value[rows])
        batch.theta[better], batch.residuals[better], batch.slopes[better] = tried[better], residuals[better], slopes[better]
        batch.damping = np.where(better, np.maximum(batch.damping * 0.1, 1e-9), batch.damping * 8.0)
    final[rows] = batch.theta
    return final, value, converged


def plan_step(batch: Batch) -> tuple[FloatArray, FloatArray]:
    """Return a step for each row, to be subtracted, and how much the reweighted least squares promise to gain."""
    theta, slopes, weights, delta = batch.theta, batch.slopes, batch.weights, batch.objective.delta
    size, transposed = np.abs(batch.residuals), slopes.transpose(0, 2, 1)
    pull = weights if np.isinf(delta) else weights * (delta / np.maximum(size, delta))
    gradient = np.matmul(slopes, (pull * batch.residuals)[..., None])[..., 0]
    above = np.matmul(slopes * pull[:, None], transposed)
    own = above if np.isinf(delta) else np.matmul(slopes * (weights * (size <= delta))[:, None], transposed)
    low, high = batch.bounds
    moves = batch.free & ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))
    both, identity = moves[:, :, None] & moves[:, None, :], np.eye(theta.shape[1])
    scale = np.maximum(np.einsum("mii->mi", above), 1e-300)[:, None, :]
    ridge = identity * np.where(moves[:, None, :], scale * 1e-13, 1.0)
    gradient = np.where(moves, gradient, 0.0)[..., None]
    damped = own + batch.damping[:, None, None] * (above + identity * scale * 1e-3)
    step = np.linalg.solve(np.where(both, damped, 0.0) + ridge, gradient)[..., 0]
    promised = np.linalg.solve(np.where(both, above, 0.0) + ridge, gradient)[..., 0]
    return np.asarray(step, dtype=float), np.asarray((promised * gradient[..., 0]).sum(axis=1) / 2)
