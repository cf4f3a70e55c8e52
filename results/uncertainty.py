"""Intervals that know which cells share a trunk, and the judgement whether a number is identified by the grid at all.

Wild cluster bootstrap: the cells of a run share a trunk, and so its luck. The log residuals of each run are
kept together and multiplied by one random weight, the law is fitted again, and the spread of the refits is the
interval. Three corrections make it honest for the few runs of a grid; each is here because coverage in
simulations asked for it:

- Residuals are first projected off the law's slopes. A Huber fit with a small delta passes through about as
  many cells as it has parameters, and their zero residuals would pin every refit.
- The residuals of each run are scaled up for the part of its own noise that the fit absorbed (CR2, the
  cluster form of HC2).
- The spread is multiplied by a t quantile whose degrees of freedom follow from the design, for each quantity.

Sources: Bell & McCaffrey 2002, Survey Methodology 28(2) (CR2 and its degrees of freedom); Webb 2014, QED working
paper 1315 (weights for few clusters); Feng, He & Hu 2011, Biometrika 98(4) (wild bootstrap of a robust fit).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import chdtri, stdtrit

from results.fit import Fit, is_at_bound, refit_many
from results.laws import Centred, FloatArray, Law, jacobian, params_of_theta, predict_log_loss

LEVEL = 0.95
N_RESAMPLES = 1000
# And their negatives: mean 0, variance 1. Signs alone also keep the density of small residuals, on which a fit that is nearly
# one of least absolute errors rests (Webb's raise it by 8%, and intervals of many runs came out 7% too narrow); for few runs
# they are too few different refits.
WEBB, SIGNS, FEW_RUNS = np.sqrt([0.5, 1.0, 1.5]), np.ones(1), 8
MIN_SIZES_SHARED = 4  # E, A and alpha fit any three sizes: nothing would be left to show how trunks differ by luck
MAX_AT_BOUND, MAX_UNCONVERGED = 0.05, 0.10  # shares of the resamples
LARGE = 1e9
MAX_RATIO = 10.0  # an interval of a positive quantity that spans more than this factor says nothing
METHOD = "wild cluster bootstrap by run (trunk), CR2 residuals, t quantiles"
# tests/test_uncertainty.py measures this sentence.
COVERAGE = (
    "In simulations of a true law (5 sizes x 4 budgets, a trunk for each size, noise of 0.4% with correlation 0, 0.5 and 0.8 "
    "within a trunk, 200 studies each) nominal 95% intervals of this kind held the truth in 93% to 98% of cases. A curve that "
    "bends away from the law is not covered."
)

Quantity = Callable[[Any], npt.ArrayLike]  # of a Chinchilla, or of any law's parameters by attribute


@dataclass(frozen=True)
class Resamples:
    """Refits of a law under another luck of its runs.

    Shapes: run_of_cell, noise (n,): residuals less what the law's slopes explain; basis (n, 5), orthonormal, spans the slopes;
    reach (n, 5): how far each cell's noise, scaled up as the bootstrap scales it, moves theta.
    """

    fit: Fit
    laws: tuple[Any, ...]  # what `Law.read` makes of each refit
    run_of_cell: npt.NDArray[np.intp]
    noise: FloatArray
    basis: FloatArray
    reach: FloatArray
    unsupported: str  # why this design cannot show its own noise; empty if it can
    share_at_bound: dict[str, float]  # for each parameter: the share of refits that ended at the edge of its range
    share_unconverged: float

    @property
    def n_runs(self) -> int:
        """How many runs the cells come from."""
        return int(self.run_of_cell.max()) + 1


@dataclass(frozen=True)
class Spread:
    """A quantity at the fit, with an interval and its degrees of freedom. Shapes: those of the quantity."""

    estimate: FloatArray
    low: FloatArray
    high: FloatArray
    df: FloatArray


@dataclass(frozen=True)
class Interval:
    """One number with its interval, or the reason why the grid does not identify it."""

    estimate: float
    low: float
    high: float
    df: float
    problem: str = ""

    @property
    def identified(self) -> bool:
        """Whether the number may be quoted."""
        return not self.problem


def resample_runs(fit: Fit, run_ids: Sequence[str], *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Resamples:
    """Refit the law to losses that other luck could have given. `run_ids`: the run of each cell."""
    names, run_of_cell = np.unique(np.asarray(run_ids), return_inverse=True)
    runs = [np.flatnonzero(run_of_cell == run) for run in range(len(names))]
    root, slopes = np.sqrt(fit.weights), scale_slopes(fit)
    basis, _ = np.linalg.qr(slopes)
    noise = root * fit.residuals
    noise -= basis @ (basis.T @ noise)
    reach = np.zeros((fit.n_cells, len(fit.theta)))
    reach[:, fit.free] = slopes @ np.linalg.pinv(slopes.T @ slopes)
    scaled = noise.copy()
    for cells in runs:
        scale_up = invert_root(np.eye(len(cells)) - basis[cells] @ basis[cells].T)
        scaled[cells], reach[cells] = scale_up @ noise[cells], scale_up @ reach[cells]
    draw = np.random.default_rng(seed)
    sizes = WEBB if len(runs) < FEW_RUNS else SIGNS
    weights = draw.choice(np.concatenate([-sizes, sizes]), size=(n_resamples, len(runs)))[:, run_of_cell]
    refits = refit_many(fit, add_noise(fit, weights * (scaled / root)), tolerance=1e-6)
    return Resamples(
        fit=fit,
        laws=tuple(fit.law.read(params) for params in params_of_theta(refits.theta, fit.centred)),
        run_of_cell=run_of_cell,
        noise=noise,
        basis=basis,
        reach=reach,
        unsupported=explain_unsupported(runs, np.unique(fit.centred.x[0]).size),
        share_at_bound=dict(zip(fit.law.parameters, is_at_bound(refits.theta, fit.centred).mean(axis=0).tolist(), strict=True)),
        share_unconverged=float(1 - refits.converged.mean()),
    )


def scale_slopes(fit: Fit) -> FloatArray:
    """Return the slopes, by each parameter that was fitted, of what the objective compares, weighted. Shapes: (n, free)."""
    slopes = jacobian(fit.theta, fit.centred)[:, fit.free] * np.sqrt(fit.weights)[:, None]
    return slopes if fit.objective.in_logs else slopes * np.exp(predict_log_loss(fit.theta, fit.centred))[:, None]


def add_noise(fit: Fit, noise: FloatArray) -> FloatArray:
    """Return ln of the fitted losses with noise of the objective's kind. Shapes: (m, n) -> (m, n)."""
    fitted = predict_log_loss(fit.theta, fit.centred)
    return fitted + noise if fit.objective.in_logs else np.log(np.maximum(np.exp(fitted) + noise, 1e-3 * np.exp(fitted)))


def invert_root(matrix: FloatArray) -> FloatArray:
    """Return the inverse square root of a symmetric matrix, zero in directions where it is singular."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-8
    return np.asarray((vectors * np.where(kept, 1 / np.sqrt(np.where(kept, values, 1.0)), 0.0)) @ vectors.T)


def explain_unsupported(runs: list[npt.NDArray[np.intp]], n_sizes: int) -> str:
    """Say why the differences between runs cannot be told from the law itself, or nothing."""
    if n_sizes >= MIN_SIZES_SHARED or all(len(cells) == 1 for cells in runs):
        return ""
    return (
        f"interval not supported by this design: cells share trunks and there are {n_sizes} sizes, which E, A and alpha fit "
        f"whatever a trunk's luck; more trunks per fitted parameter would: train {MIN_SIZES_SHARED - n_sizes} more size(s)"
    )


def estimate_spread(resamples: Resamples, quantity: Quantity, level: float = LEVEL) -> Spread:
    """Return an interval for any quantity of a law; each side is as wide as the refits on that side say.

    Note: the root mean square deviation of each side times a t quantile. Percentiles came out too narrow: with
    bounded weights for few runs the refits have no tails.
    """
    estimate = np.asarray(quantity(resamples.fit.law.read(resamples.fit.params)), dtype=float)
    deviations = np.array([np.asarray(quantity(law), dtype=float) for law in resamples.laws]) - estimate
    df = estimate_df(resamples, quantity)
    reach = stdtrit(df, (1 + level) / 2)  # quantile of Student's t
    below, above = measure_side(np.minimum(deviations, 0)), measure_side(np.maximum(deviations, 0))
    return Spread(estimate, estimate - reach * below, estimate + reach * above, df)


def measure_side(deviations: FloatArray) -> FloatArray:
    """Return the root mean square over the refits (first axis) that deviate to this side; zeros are on the other."""
    count = np.maximum((deviations != 0).sum(axis=0), 1)
    return np.asarray(np.sqrt((deviations**2).sum(axis=0) / count))


def estimate_by_delta(resamples: Resamples, quantity: Quantity, level: float = LEVEL) -> Spread:
    """Return the interval of linear theory: the cluster sandwich (CR2) of the fit, without a refit.

    Source: Bell & McCaffrey 2002. Note: the law is taken to be straight over the interval, and E may come out below zero.
    """
    estimate = np.asarray(quantity(resamples.fit.law.read(resamples.fit.params)), dtype=float)
    gradient = differentiate(resamples.fit.theta, resamples.fit.centred, quantity)
    moved = (resamples.reach @ gradient.reshape(len(gradient), -1)) * resamples.noise[:, None]
    of_run = np.zeros((resamples.n_runs, moved.shape[1]))
    np.add.at(of_run, resamples.run_of_cell, moved)
    df = estimate_df(resamples, quantity)
    half = stdtrit(df, (1 + level) / 2) * np.sqrt((of_run**2).sum(axis=0)).reshape(estimate.shape)
    return Spread(estimate, estimate - half, estimate + half, df)


def estimate_by_pairs(
    fit: Fit, run_ids: Sequence[str], quantity: Quantity, *, n_resamples: int = N_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Spread:
    """Return percentiles of refits to runs drawn with replacement, as Besiroglu et al. 2024 drew cells.

    Note: for 30 runs or more; with few, some draws hold too little to fit, and the interval is far too wide.
    """
    names, run_of_cell = np.unique(np.asarray(run_ids), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    refits = refit_many(fit, weights=fit.weights * drawn[:, run_of_cell], tolerance=1e-6)
    laws = [fit.law.read(params) for params in params_of_theta(refits.theta, fit.centred)]
    estimate, values = (
        np.asarray(quantity(fit.law.read(fit.params))),
        np.array([np.asarray(quantity(law), dtype=float) for law in laws]),
    )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Spread(estimate, low, high, np.full(estimate.shape, len(names) - 1.0))


def estimate_df(resamples: Resamples, quantity: Quantity) -> FloatArray:
    """Return the degrees of freedom of a quantity's variance estimate (Satterthwaite), from the design alone.

    Source: Bell & McCaffrey 2002, with independent cells as the working model: (sum of eigenvalues)^2 / sum of their
    squares for the matrix with v_g . v_h - (basis_g' v_g) . (basis_h' v_h) at runs g, h, v_g . v_h = 0 unless g = h.
    """
    gradient = differentiate(resamples.fit.theta, resamples.fit.centred, quantity)
    moved = resamples.reach @ gradient.reshape(len(gradient), -1)  # (n, q)
    own = np.zeros((resamples.n_runs, moved.shape[1]))
    absorbed = np.zeros((resamples.n_runs, resamples.basis.shape[1], moved.shape[1]))
    np.add.at(own, resamples.run_of_cell, moved**2)
    np.add.at(absorbed, resamples.run_of_cell, resamples.basis[:, :, None] * moved[:, None, :])
    lost = (absorbed**2).sum(axis=1)
    cross = np.einsum("gaq,gbq->qab", absorbed, absorbed)
    squares = (own**2 - 2 * own * lost).sum(axis=0) + (cross**2).sum(axis=(1, 2))
    df = (own - lost).sum(axis=0) ** 2 / np.maximum(squares, 1e-300)
    return np.asarray(np.maximum(df, 1.0).reshape(gradient.shape[1:]))


def differentiate(theta: FloatArray, centred: Centred, quantity: Quantity, step: float = 1e-5) -> FloatArray:
    """Differentiate a quantity by theta with central differences. Shapes: (5, *quantity)."""
    rows = []
    for direction in np.eye(len(theta)) * step:
        moved = (params_of_theta(theta + sign * direction, centred) for sign in (1, -1))
        up, down = (np.asarray(quantity(centred.law.read(params))) for params in moved)
        rows.append((up - down) / (2 * step))
    return np.array(rows, dtype=float)


@dataclass(frozen=True)
class Quoted:
    """A number that people quote from a law. In logs: the quantity is the logarithm of a number that is above zero."""

    name: str
    quantity: Quantity
    rests_on: tuple[str, ...]  # the parameters that must be inside their ranges
    in_logs: bool = False


def list_quoted(law: Law, flops: float) -> tuple[Quoted, ...]:
    """List the numbers that a page quotes; `flops` is the compute to be split best between parameters and tokens."""
    if not law.is_chinchilla:
        return tuple(quote_parameter(law, name) for name in law.parameters)
    return (
        Quoted("E", lambda law: law.E, ("E",)),
        Quoted("alpha", lambda law: law.alpha, ("alpha",)),
        Quoted("beta", lambda law: law.beta, ("beta",)),
        Quoted("optimum_exponent", lambda law: law.optimum_exponent, ("alpha", "beta")),
        Quoted("tokens_per_param", lambda law: law.log_tokens_per_param(flops), ("alpha", "beta"), in_logs=True),
        Quoted("A", lambda law: np.log(law.A), ("A", "alpha"), in_logs=True),
        Quoted("B", lambda law: np.log(law.B), ("B", "beta"), in_logs=True),
    )


def quote_parameter(law: Law, name: str) -> Quoted:
    """Quote a parameter; one that is above zero and may be of any size, in logs."""
    if name == law.floor or name not in (*law.coefficients, *law.extra):
        return Quoted(name, lambda read: getattr(read, name), (name,))
    return Quoted(name, lambda read: np.log(getattr(read, name)), (name,), in_logs=True)


def estimate_intervals(resamples: Resamples, flops: float) -> dict[str, Interval]:
    """Return the intervals of the numbers that people quote, each judged."""
    return {quoted.name: judge(resamples, quoted) for quoted in list_quoted(resamples.fit.law, flops)}


def judge(resamples: Resamples, quoted: Quoted) -> Interval:
    """Give a number its interval, and say why it is not identified where it is not."""
    spread = estimate_spread(resamples, quoted.quantity)
    values = np.array([spread.estimate, spread.low, spread.high])
    if quoted.in_logs:
        values = np.exp(np.minimum(values, 700.0))  # the largest power of e that a float holds
    estimate, low, high = values.tolist()
    problem = explain_refits(resamples, quoted) or explain_width(estimate, low, high, quoted.in_logs)
    return Interval(estimate, low, high, float(spread.df), problem)


def explain_refits(resamples: Resamples, quoted: Quoted) -> str:
    """Say why the refits cannot carry an interval, or nothing."""
    edges = [name for name in quoted.rests_on if name in resamples.fit.at_bounds]
    open_sides = [side for side in resamples.fit.open_sides if side.split()[0] in quoted.rests_on]
    if quoted.name in resamples.fit.fixed:
        return "held fixed, not fitted"
    share = max(resamples.share_at_bound.get(name, 0.0) for name in quoted.rests_on)
    if edges:
        return f"the fit put {' and '.join(edges)} at the edge of its range"
    if resamples.unsupported:
        return resamples.unsupported
    if resamples.share_unconverged > MAX_UNCONVERGED:
        return f"{resamples.share_unconverged:.0%} of the refits did not converge"
    if open_sides:
        return f"the data hardly object beyond it (open side: {' and '.join(open_sides)})"
    if share > MAX_AT_BOUND:
        return f"{share:.0%} of the refits put {' or '.join(quoted.rests_on)} at the edge of its range"
    return ""


def explain_width(estimate: float, low: float, high: float, in_logs: bool) -> str:
    """Say why an interval is too wide to quote its number, or nothing."""
    interval = f"its interval, {format_digits(low)} to {format_digits(high)},"
    if in_logs:
        return f"{interval} spans a factor of {format_digits(high / low)}" if high > MAX_RATIO * low else ""
    if low <= 0 <= high:
        return f"{interval} holds 0"
    return f"{interval} is wider than its value" if high - low > abs(estimate) else ""


def format_digits(value: float) -> str:
    """Write a number with two significant digits, and no exponent unless it is very large."""
    if abs(value) >= LARGE:
        return f"{value:.2g}"
    return np.format_float_positional(value, precision=2, unique=False, fractional=False, trim="-")


@dataclass(frozen=True)
class SeedNoise:
    """How much the loss moves when only the seed changes. Units: nats per token."""

    sd: float
    low: float
    high: float
    n_cells: int
    n_groups: int


ALIKE = ("size", "n_params", "planned_tokens", "unique_tokens", "lr", "global_batch_size", "schedule", "precision")


def measure_seed_noise(cells: pd.DataFrame) -> SeedNoise | None:
    """Pool the spread of val_loss over groups of cells that differ in nothing but the seed; None without such a group.

    Note: the interval takes the noise to be Gaussian (chi-squared).
    """
    groups = [group for _, group in cells["val_loss"].groupby(list_alike(cells)) if len(group) > 1]
    if not groups:
        return None
    df = sum(len(group) - 1 for group in groups)
    sd = float(np.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / df))
    low, high = (sd * float(np.sqrt(df / chdtri(df, upper_tail))) for upper_tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return SeedNoise(sd, low, high, sum(len(group) for group in groups), len(groups))


def list_alike(cells: pd.DataFrame) -> npt.NDArray[np.intp]:
    """Number the groups of cells that differ in nothing but the seed, as far as the table tells what they are."""
    told = [name for name in ALIKE if name in cells and cells[name].notna().any()]
    budget = [] if "planned_tokens" in told else ["tokens"]
    # A foreign table may not say what the seeds were; then cells of one place may differ in anything.
    alone = np.where(cells["seed"].isna(), np.arange(len(cells)), -1) if "seed" in cells else np.full(len(cells), -1)
    return np.asarray(cells.groupby([*(cells[name] for name in (*told, *budget)), alone], dropna=False).ngroup(), dtype=np.intp)
