"""How often nominal 95% intervals hold the truth, measured: simulated studies of a law that is exactly true.

A study is a grid of sizes and budgets whose ln L has noise of 0.4%; on trunks, a given share of its variance is common to
the cells of a size. Each is fitted and given intervals as `results fit` does. That a curve bends away from the law is not
simulated: no interval from the law alone covers that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from results.fit import Fit, fit_chinchilla
from results.laws import Chinchilla
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
N_RESAMPLES = 300
QUANTITIES: dict[str, Quantity] = {
    "E": lambda law: law.E,
    "alpha": lambda law: law.alpha,
    "beta": lambda law: law.beta,
    "a": lambda law: law.optimum_exponent,
    "ln D*/N*": lambda law: law.log_tokens_per_param(FLOPS),
    "ln N* at 10 C": lambda law: np.log(law.allocate(10 * FLOPS).n_params),
    "ln L* at 10 C": lambda law: np.log(law.allocate(10 * FLOPS).loss),
    "ln L(2N, 2D)": lambda law: np.log(law.loss(2 * N_RANGE[1], 2 * D_RANGE[1])),
}


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


def simulate_study(layout: Layout, draw: np.random.Generator) -> tuple[Fit, list[str]]:
    """Fit one simulated study, and say which run each cell comes from."""
    n, d = (
        axis.ravel()
        for axis in np.meshgrid(np.geomspace(*N_RANGE, layout.sizes), np.geomspace(*D_RANGE, layout.budgets), indexing="ij")
    )
    run = np.arange(n.size) if layout.share is None else np.repeat(np.arange(layout.sizes), layout.budgets)
    share = layout.share or 0.0
    noise = np.sqrt(share) * draw.normal(size=n.size)[run] + np.sqrt(1 - share) * draw.normal(size=n.size)
    return fit_chinchilla(n, d, TRUTH.loss(n, d) * np.exp(SIGMA * noise)), [f"{one:03}" for one in run]


Method = Callable[[Resamples, list[str], Quantity], Spread]
METHODS: dict[str, Method] = {
    "wild": lambda resamples, run_ids, quantity: estimate_spread(resamples, quantity),
    "delta": lambda resamples, run_ids, quantity: estimate_by_delta(resamples, quantity),
    "pairs": lambda resamples, run_ids, quantity: estimate_by_pairs(resamples.fit, run_ids, quantity, n_resamples=N_RESAMPLES),
}


def measure_coverage(layout: Layout, n_studies: int, seed: int = 0) -> pd.DataFrame:
    """Count over studies: one row for each method and quantity, with the share of intervals that held the truth.

    `width`: the median width. The same seed gives the same studies whatever else is measured.
    """
    draw = np.random.default_rng([seed, layout.sizes, layout.budgets, round(100 * (layout.share or 0.0))])
    rows = pd.DataFrame([row for _ in range(n_studies) for row in iter_intervals(layout, draw)])
    grouped = rows.groupby(["method", "quantity"], sort=False)
    found = grouped.agg(coverage=("inside", "mean"), width=("width", "median")).reset_index()
    return found.assign(layout=layout.words, n_studies=n_studies)


def iter_intervals(layout: Layout, draw: np.random.Generator) -> Iterator[dict[str, object]]:
    """Make one study and say of each of its intervals whether it holds the truth."""
    fit, run_ids = simulate_study(layout, draw)
    resamples = resample_runs(fit, run_ids, n_resamples=N_RESAMPLES)
    truth = stack(TRUTH)
    for method, estimate in METHODS.items():
        spread = estimate(resamples, run_ids, stack)
        inside = (spread.low <= truth) & (truth <= spread.high)
        for name, is_inside, width in zip(QUANTITIES, inside.tolist(), (spread.high - spread.low).tolist(), strict=True):
            yield {"method": method, "quantity": name, "inside": is_inside, "width": width}


def stack(law: Chinchilla) -> np.ndarray:
    """Return every quantity at once."""
    return np.array([quantity(law) for quantity in QUANTITIES.values()], dtype=float)


def measure_all(n_studies: int, seed: int = 0) -> pd.DataFrame:
    """Measure every layout."""
    return pd.concat([measure_coverage(layout, n_studies, seed) for layout in LAYOUTS], ignore_index=True)


def write_coverage(found: pd.DataFrame, folder: Path) -> list[Path]:
    """Write coverage.csv and coverage.md."""
    folder.mkdir(parents=True, exist_ok=True)
    csv, page = folder / "coverage.csv", folder / "coverage.md"
    found.to_csv(csv, index=False, float_format="%.6g")
    n_studies = int(found["n_studies"].iloc[0])
    page.write_text(
        f"# Coverage of nominal 95% intervals\n\n{n_studies:,} simulated studies of a law that is exactly true for each design. "
        f"wild: the default of `results fit`; delta: linear theory with the same degrees of freedom; pairs: percentiles of runs "
        f"drawn with replacement.\n\n{render_coverage(found)}\n"
    )
    return [csv, page]


def render_coverage(found: pd.DataFrame) -> str:
    """Write coverage as a table in Markdown: a row for each layout and method, a column for each quantity."""
    lines = [f"| design | method | {' | '.join(QUANTITIES)} |", "|---" * (len(QUANTITIES) + 2) + "|"]
    for (layout, method), rows in found.groupby(["layout", "method"], sort=False):
        by_name = dict(zip(rows["quantity"], rows["coverage"], strict=True))
        lines.append(f"| {layout} | {method} | {' | '.join(f'{by_name[name]:.3f}' for name in QUANTITIES)} |")
    return "\n".join(lines)
