"""Fits and bootstraps beside the published recipe, in turn on the same cells: CPU seconds, and who ends lower.

The recipe is that of Besiroglu et al. 2024, arXiv 2404.10102 (github.com/epoch-research/analyzing-chinchilla): L-BFGS-B with
numerical gradients from each of 4,500 starts, then 4,000 pairs bootstraps, each a single BFGS run from the best with an exact
gradient. A stated part of it is run and the rest extrapolated. Its exact gradient is written out here, which is faster than the
automatic one of the original, so the second ratio is a cautious one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize

from results.descend import LOG_HUBER
from results.fit import fit_law, refit_many
from results.laws import CHINCHILLA, Chinchilla, FloatArray

DELTA = 1e-3
N_STARTS, N_BOOTSTRAPS = 4500, 4000
# ln A, ln B, ln E, alpha, beta: Hoffmann et al. 2022, section 3.3.
START_GRID = (
    np.arange(0, 30, 5.0),
    np.arange(0, 30, 5.0),
    np.arange(-1, 1.5, 0.5),
    np.arange(0, 2.5, 0.5),
    np.arange(0, 2.5, 0.5),
)


@dataclass(frozen=True)
class Side:
    """One side of a race. Units: CPU seconds for all of the work, extrapolated from `n_run` pieces of it."""

    what: str
    cpu_s: float
    n_run: int
    n_all: int
    objective: float


@dataclass(frozen=True)
class Race:
    """Both tasks, ours and the recipe's, in rounds; medians."""

    fit: Side
    recipe_fit: Side
    bootstraps: Side
    recipe_bootstraps: Side


def simulate_points(n_cells: int = 240, seed: int = 0) -> dict[str, FloatArray]:
    """Draw cells like the published ones, for a machine that does not have those."""
    draw = np.random.default_rng(seed)
    n = np.exp(draw.uniform(np.log(6e7), np.log(1.6e10), n_cells))
    d = np.exp(draw.uniform(np.log(1e18), np.log(1e22), n_cells)) / 6 / n
    loss = Chinchilla(1.8172, 477.8, 2143.4, 0.3473, 0.3672).loss(n, d) * np.exp(draw.laplace(0, 0.004, n_cells))
    return {"n_params": n, "tokens": d, "val_loss": loss}


def run_race(cells: dict[str, FloatArray], n_starts: int = 45, n_bootstraps: int = 40, rounds: int = 3) -> Race:
    """Run both in turn, `rounds` times; the recipe from every k-th of its starts."""
    logs = np.log([cells[name] for name in ("n_params", "tokens", "val_loss")])
    starts = np.array(list(product(*START_GRID)))[:: N_STARTS // n_starts][:n_starts]
    n = logs.shape[1]
    draw = np.random.default_rng(0)
    counts = np.array([np.bincount(draw.integers(0, n, n), minlength=n) for _ in range(N_BOOTSTRAPS)], dtype=float)
    fit = fit_law(CHINCHILLA, cells)
    best = np.array([np.log(fit["A"]), np.log(fit["B"]), np.log(fit["E"]), fit["alpha"], fit["beta"]])
    sides: list[list[Side]] = []
    for _ in range(rounds):
        ours = clock(lambda: fit_law(CHINCHILLA, cells).objective_value, "fit, open sides and basins", 1, 1)
        theirs = clock(lambda: min(descend_numerically(start, logs) for start in starts), "L-BFGS-B", n_starts, N_STARTS)
        refits = clock(
            lambda: float(refit_many(fit, weights=counts).objective[:n_bootstraps].mean()), "batched", N_BOOTSTRAPS, N_BOOTSTRAPS
        )
        singles = clock(
            lambda: float(np.mean([descend_once(best, logs, row) for row in counts[:n_bootstraps]])),
            "BFGS, one start",
            n_bootstraps,
            N_BOOTSTRAPS,
        )
        sides.append([ours, theirs, refits, singles])
    return Race(*(sorted(column, key=lambda side: side.cpu_s)[rounds // 2] for column in zip(*sides, strict=True)))


def clock(work: Callable[[], float], what: str, n_run: int, n_all: int) -> Side:
    """Measure the CPU time of some pieces of work, and extrapolate."""
    started = time.process_time()
    objective = work()
    return Side(what, (time.process_time() - started) * n_all / n_run, n_run, n_all, objective)


def weigh_misses(params: FloatArray, logs: FloatArray, weights: FloatArray | float = 1.0) -> float:
    """Return the recipe's objective: the sum of Huber losses of log residuals."""
    log_a, log_b, log_e, alpha, beta = params
    terms = np.stack([log_a - alpha * logs[0], log_b - beta * logs[1], np.full(logs.shape[1], log_e)])
    return float(LOG_HUBER.sum(np.logaddexp.reduce(terms, axis=0) - logs[2], weights))


def descend_numerically(start: FloatArray, logs: FloatArray) -> float:
    """Run L-BFGS-B with numerical gradients from one start, at scipy's own tolerances."""
    with np.errstate(all="ignore"):
        return float(minimize(weigh_misses, start, args=(logs,), method="L-BFGS-B").fun)


def descend_once(start: FloatArray, logs: FloatArray, weights: FloatArray) -> float:
    """Run BFGS with the exact gradient from one start."""

    def value_and_gradient(params: FloatArray) -> tuple[float, FloatArray]:
        log_a, log_b, log_e, alpha, beta = params
        terms = np.stack([log_a - alpha * logs[0], log_b - beta * logs[1], np.full(logs.shape[1], log_e)])
        log_loss = np.logaddexp.reduce(terms, axis=0)
        shares, residuals = np.exp(terms - log_loss), log_loss - logs[2]
        pull = weights * np.clip(residuals, -DELTA, DELTA)
        rows = np.stack([*shares, -shares[0] * logs[0], -shares[1] * logs[1]])
        return float(LOG_HUBER.sum(residuals, weights)), rows @ pull

    return float(minimize(value_and_gradient, start, jac=True, method="BFGS").fun)


def render_race(race: Race) -> str:
    """Write the table."""
    rows = ["| task | who | CPU seconds, all of it | run | objective | ratio |", "|---|---|---|---|---|---|"]
    for task, ours, theirs in (
        ("fit", race.fit, race.recipe_fit),
        (f"{N_BOOTSTRAPS:,} bootstraps", race.bootstraps, race.recipe_bootstraps),
    ):
        for side, who in ((ours, "here"), (theirs, "recipe")):
            ratio = f"{theirs.cpu_s / ours.cpu_s:,.1f}" if side is ours else ""
            run = f"{side.n_run:,} of {side.n_all:,}" if side.n_run < side.n_all else "all"
            rows.append(f"| {task} | {who}: {side.what} | {side.cpu_s:.3g} | {run} | {side.objective:.8e} | {ratio} |")
    return "\n".join(rows)
