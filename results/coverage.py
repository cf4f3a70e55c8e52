"""How often nominal 95% intervals hold the truth, measured: simulated studies of a law that is exactly true.

A study is a grid of sizes and budgets whose ln L has noise of 0.4%; on trunks, a given share of its variance is common to
the cells of a size. Each is fitted and given intervals as `results fit` does. That a curve bends away from the law is not
simulated: no interval from the law alone covers that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from results.fit import Fit, fit_chinchilla, is_at_bound, refit_many
from results.laws import Chinchilla, FloatArray, params_of_theta, predict_log_loss
from results.uncertainty import (
    Quantity,
    Resamples,
    Spread,
    estimate_by_delta,
    estimate_by_pairs,
    estimate_spread,
    resample_runs,
)

TRUTH = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)  # near what the demo's cells give
N_RANGE, D_RANGE = (1e4, 4e5), (4e5, 4e6)
FLOPS = 6 * N_RANGE[1] * D_RANGE[1]  # the largest cell; the best split is asked for there and at ten times as much
SIGMA = 0.004
N_RESAMPLES = 200
QUANTITIES = ("E", "alpha", "beta", "a", "ln D*/N*", "ln N* at 10 C", "ln L* at 10 C", "ln L(2N, 2D)")


@dataclass(frozen=True)
class Layout:
    """A grid of sizes x budgets. `share`: of the noise's variance, what is common to a size's trunk; None: no trunks."""

    sizes: int
    budgets: int
    share: float | None = None

    @property
    def words(self) -> str:
        """Name the layout."""
        cells = f"{self.sizes} x {self.budgets}"
        return f"{cells} cells, independent" if self.share is None else f"{cells}, trunks, correlation {self.share:g}"


LAYOUTS = (
    *(Layout(sizes, budgets) for sizes, budgets in ((3, 3), (4, 4), (5, 7))),
    *(Layout(sizes, 4, share) for sizes in (5, 8, 12) for share in (0.0, 0.5, 0.8)),
    *(Layout(sizes, 4, 0.8) for sizes in (3, 4)),  # too few sizes, and just enough
)


def simulate_studies(layout: Layout, n_studies: int, draw: np.random.Generator) -> tuple[list[Fit], list[str]]:
    """Fit simulated studies, and say which run each cell comes from.

    The studies are fitted together, each from the truth; a test holds the minima to those of a full search.
    """
    n, d = (
        axis.ravel()
        for axis in np.meshgrid(np.geomspace(*N_RANGE, layout.sizes), np.geomspace(*D_RANGE, layout.budgets), indexing="ij")
    )
    run = np.arange(n.size) if layout.share is None else np.repeat(np.arange(layout.sizes), layout.budgets)
    share, rows = layout.share or 0.0, (n_studies, n.size)
    noise = np.sqrt(share) * draw.normal(size=rows)[:, run] + np.sqrt(1 - share) * draw.normal(size=rows)
    log_losses = np.log(TRUTH.loss(n, d)) + SIGMA * noise
    pattern = fit_chinchilla(n, d, TRUTH.loss(n, d))
    found = refit_many(pattern, log_losses)
    fits = [place(pattern, theta, losses) for theta, losses in zip(found.theta, log_losses, strict=True)]
    return fits, [f"{one:03}" for one in run]


def place(pattern: Fit, theta: FloatArray, log_loss: FloatArray) -> Fit:
    """Return a fit of other losses to the same cells, with what intervals need of it."""
    centred = replace(pattern.centred, log_loss=log_loss)
    return replace(
        pattern,
        theta=theta,
        params=params_of_theta(theta, centred),
        centred=centred,
        residuals=log_loss - predict_log_loss(theta, centred),
        at_bounds=tuple(np.array(centred.law.parameters)[is_at_bound(theta, centred)].tolist()),
    )


Method = Callable[[Resamples, list[str], Quantity], Spread]
METHODS: dict[str, Method] = {
    "wild": lambda resamples, run_ids, quantity: estimate_spread(resamples, quantity),
    "delta": lambda resamples, run_ids, quantity: estimate_by_delta(resamples, quantity),
    "pairs": lambda resamples, run_ids, quantity: estimate_by_pairs(resamples.fit, run_ids, quantity, n_resamples=N_RESAMPLES),
}

EVERY = {"pairs": 10}  # a slow method is tried on every tenth study


def measure_coverage(layout: Layout, n_studies: int, seed: int = 0) -> pd.DataFrame:
    """Count over studies: one row for each method and quantity, with the share of intervals that held the truth.

    `width`: the median width. The same seed gives the same studies whatever else is measured.
    """
    draw = np.random.default_rng([seed, layout.sizes, layout.budgets, round(100 * (layout.share or 0.0))])
    fits, run_ids = simulate_studies(layout, n_studies, draw)
    rows = pd.DataFrame([row for number, fit in enumerate(fits) for row in iter_intervals(fit, run_ids, number)])
    grouped = rows.groupby(["method", "quantity"], sort=False)
    found = grouped.agg(coverage=("inside", "mean"), width=("width", "median"), n_studies=("inside", "size")).reset_index()
    return found.assign(layout=layout.words)


def iter_intervals(fit: Fit, run_ids: list[str], study: int) -> Iterator[dict[str, object]]:
    """Say of each interval of one study, given its number, whether it holds the truth."""
    resamples = resample_runs(fit, run_ids, n_resamples=N_RESAMPLES)
    truth = stack(TRUTH)
    for method, estimate in METHODS.items():
        if study % EVERY.get(method, 1):
            continue
        spread = estimate(resamples, run_ids, stack)
        inside = (spread.low <= truth) & (truth <= spread.high)
        for name, is_inside, width in zip(QUANTITIES, inside.tolist(), (spread.high - spread.low).tolist(), strict=True):
            yield {"method": method, "quantity": name, "inside": is_inside, "width": width}


def stack(law: Chinchilla) -> FloatArray:
    """Return every quantity at once, in the order of `QUANTITIES`."""
    best = law.allocate(10 * FLOPS)
    ahead = law.E + law.A * (2 * N_RANGE[1]) ** -law.alpha + law.B * (2 * D_RANGE[1]) ** -law.beta
    ratio = law.log_tokens_per_param(FLOPS)
    logs = (math.log(best.n_params), math.log(best.loss), math.log(ahead))
    return np.array([law.E, law.alpha, law.beta, law.optimum_exponent, ratio, *logs])


def measure_all(n_studies: int, seed: int = 0) -> pd.DataFrame:
    """Measure every layout."""
    return pd.concat([measure_coverage(layout, n_studies, seed) for layout in LAYOUTS], ignore_index=True)


def write_coverage(found: pd.DataFrame, folder: Path) -> list[Path]:
    """Write coverage.csv and coverage.md."""
    folder.mkdir(parents=True, exist_ok=True)
    csv, page = folder / "coverage.csv", folder / "coverage.md"
    found.to_csv(csv, index=False, float_format="%.6g")
    n_studies, n_pairs = int(found["n_studies"].max()), int(found["n_studies"].min())
    page.write_text(
        f"# Coverage of nominal 95% intervals\n\n{n_studies:,} simulated studies of a law that is exactly true for each design. "
        f"wild: the default of `results fit`; delta: linear theory with the same degrees of freedom; pairs: percentiles of runs "
        f"drawn with replacement, on {n_pairs:,} of the studies.\n\n{render_coverage(found)}\n"
    )
    return [csv, page]


def render_coverage(found: pd.DataFrame) -> str:
    """Write coverage as a table in Markdown: a row for each layout and method, a column for each quantity."""
    lines = [f"| design | method | {' | '.join(QUANTITIES)} |", "|---" * (len(QUANTITIES) + 2) + "|"]
    for (layout, method), rows in found.groupby(["layout", "method"], sort=False):
        by_name = dict(zip(rows["quantity"], rows["coverage"], strict=True))
        lines.append(f"| {layout} | {method} | {' | '.join(f'{by_name[name]:.3f}' for name in QUANTITIES)} |")
    return "\n".join(lines)
