"""One table, the law fitted to it, its intervals and what must be said about them: what every page and figure is made of."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from results.fit import Fit, FitError, fit_chinchilla
from results.laws import Allocation
from results.uncertainty import (
    COVERAGE,
    LEVEL,
    METHOD,
    Interval,
    Resamples,
    SeedNoise,
    estimate_intervals,
    measure_seed_noise,
    resample_runs,
)

MAX_CONDITION = 1e3
EQUATION = "L(N, D) = E + A / N^alpha + B / D^beta"
LEGEND = "L: val_loss, nats per token; N: parameters; D: training tokens; C: training FLOPs, here 6 N D; ln: natural logarithm"


@dataclass(frozen=True)
class Convention:
    """One way to count parameters."""

    name: str
    column: str
    words: str


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("total", "n_params", "all parameters"),
        Convention("non_embedding", "n_params_non_embedding", "parameters outside token and position embeddings"),
        Convention("matmul", "n_params_matmul", "parameters in matrix products, output head included"),
    )
}


@dataclass(frozen=True)
class Fitted:
    """A law with its intervals, under one way to count parameters. Units: flops as 6 N D."""

    fit: Fit
    resamples: Resamples
    intervals: dict[str, Interval]
    flops: float  # the largest compute of the fitted cells, at which an optimum is quoted
    optimum: Allocation


@dataclass(frozen=True)
class Study:
    """A table and all that is claimed from it. `fitted` is None where the cells support no law, and `refusal` says why."""

    name: str
    cells: pd.DataFrame
    convention: Convention
    fitted: Fitted | None
    refusal: str
    others: dict[str, Fitted | None]  # the same fit under the other ways to count parameters
    seed_noise: SeedNoise | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def kept(self) -> pd.DataFrame:
        """The cells that were fitted."""
        return self.cells[~self.cells["excluded"]]


def fit_study(name: str, cells: pd.DataFrame, params: str = "total") -> Study:
    """Fit the cells that are not excluded, under one way to count parameters and then under the others."""
    kept = cells[~cells["excluded"]]
    fits = {key: try_fit(kept, convention) for key, convention in CONVENTIONS.items()}
    fitted, refusal = fits[params]
    return Study(
        name=name,
        cells=cells,
        convention=CONVENTIONS[params],
        fitted=fitted,
        refusal=f"{refusal}{suggest_cells(cells)}" if refusal else "",
        others={key: other for key, (other, _) in fits.items() if key != params},
        seed_noise=measure_seed_noise(kept),
        warnings=tuple(iter_warnings(cells, kept, fitted)),
        notes=tuple(iter_notes(kept)),
    )


def try_fit(kept: pd.DataFrame, convention: Convention) -> tuple[Fitted | None, str]:
    """Fit a law and its intervals, or return the reason why these cells support none."""
    n_params, tokens, loss = (kept[column].to_numpy(float) for column in (convention.column, "tokens", "val_loss"))
    try:
        fit = fit_chinchilla(n_params, tokens, loss)
    except FitError as error:
        return None, str(error)
    resamples = resample_runs(fit, kept["run_id"].tolist())
    flops = float((6 * n_params * tokens).max())
    return Fitted(fit, resamples, estimate_intervals(resamples, flops), flops, fit.constants.allocate(flops)), ""


def suggest_cells(cells: pd.DataFrame) -> str:
    """Point at planned cells that would help a fit, where there are any."""
    undone = cells[(cells["state"] != "done") & (cells["role"] != "held_out")]
    return f"; {len(undone)} planned cell(s) are not done: python -m launch submit trains them" if len(undone) else ""


def iter_warnings(cells: pd.DataFrame, kept: pd.DataFrame, fitted: Fitted | None) -> Iterator[str]:
    """Say in words what should lower a reader's trust."""
    if (cells["data_is_fallback"] == True).any():  # noqa: E712 - the column may hold "not recorded"
        yield "The text is the fallback, not the corpus asked for: these numbers say nothing about that corpus."
    hashes = sorted(kept["code_hash"].dropna().unique())
    if len(hashes) > 1:
        yield f"Fitted cells were trained by {len(hashes)} versions of the code ({', '.join(hashes)})."
    if fitted is not None:
        yield from iter_fit_warnings(fitted)


def iter_fit_warnings(fitted: Fitted) -> Iterator[str]:
    """Say what the fit itself gives reason to doubt."""
    fit, resamples, best = fitted.fit, fitted.resamples, fitted.optimum
    if fit.at_bounds:
        yield f"The fit put {' and '.join(fit.at_bounds)} at the edge of the allowed range."
    if len(fit.basins) > 1:
        others = "; ".join(
            ", ".join(f"{name} {v:.3g}" for name, v in fit.law.name_params(b.params).items()) for b in fit.basins[1:]
        )
        yield f"{len(fit.basins)} different minima lie within 1% of the best objective (the others: {others})."
    if fit.condition_number > MAX_CONDITION:
        yield f"The parameters are nearly interchangeable on this grid (condition number {fit.condition_number:,.0f})."
    if resamples.n_runs < 2 * len(fit.theta):
        yield (
            f"Few trunks: {resamples.n_runs} runs for {len(fit.theta)} parameters, fewer than two for each, so the intervals "
            f"rest on {min(i.df for i in fitted.intervals.values()):.1f} to "
            f"{max(i.df for i in fitted.intervals.values()):.1f} degrees of freedom and may still be too narrow."
        )
    if resamples.share_unconverged > 0.01:
        yield f"{resamples.share_unconverged:.0%} of the refits behind the intervals did not converge."
    n_params, tokens = np.exp(fit.centred.x + fit.centred.mean[:, None])
    inside = n_params.min() <= best.n_params <= n_params.max() and tokens.min() <= best.tokens <= tokens.max()
    if not inside:
        yield "The best split of the largest compute lies outside the sizes and budgets that were trained."


def iter_notes(kept: pd.DataFrame) -> Iterator[str]:
    """Say what a reader should know without doubting the numbers for it."""
    for column, words in (
        ("device_name", "devices"),
        ("n_threads", "thread counts"),
        ("world_size", "world sizes"),
        ("torch_version", "versions of torch"),
    ):
        values = sorted(str(value) for value in kept[column].dropna().unique())
        if len(values) > 1:
            yield f"Fitted cells were trained with {len(values)} {words}: {', '.join(values)}."
    repeated = kept[kept["epochs"] > 1]
    if len(repeated):
        yield (
            f"{len(repeated)} of {len(kept)} fitted cells repeat text (up to {repeated['epochs'].max():.2f} epochs); the law "
            "counts a repeated token like a new one."
        )
    if (kept["dirty"] == True).any():  # noqa: E712 - the column may hold "not recorded"
        yield "The code had uncommitted changes; code_hash identifies the files as they were."


def describe_study(study: Study) -> dict[str, Any]:
    """Return everything that fit.json holds; the fields stand in results/FORMAT.md."""
    excluded = study.cells[study.cells["excluded"]]
    return {
        "format": "scaling-harness-fit",
        "format_version": 1,
        "experiment": study.name,
        "equation": EQUATION,
        "legend": LEGEND,
        "params": study.convention.name,
        "params_column": study.convention.column,
        "n_cells": len(study.kept),
        "excluded": [dict(zip(("cell_id", "reason"), row, strict=True)) for row in list_exclusions(excluded)],
        "refusal": study.refusal or None,
        "fit": None if study.fitted is None else describe_fitted(study.fitted, study.kept),
        "conventions": {
            name: None if fitted is None else describe_intervals(fitted.intervals)
            for name, fitted in ({study.convention.name: study.fitted} | study.others).items()
        },
        "seed_noise": None if study.seed_noise is None else asdict(study.seed_noise),
        "warnings": list(study.warnings),
        "notes": list(study.notes),
    }


def list_exclusions(excluded: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the id and the reason of each excluded cell."""
    return list(zip(excluded["cell_id"], excluded["exclusion_reason"], strict=True))


def describe_fitted(fitted: Fitted, kept: pd.DataFrame) -> dict[str, Any]:
    """Return a fit as plain values."""
    fit, resamples = fitted.fit, fitted.resamples
    return {
        "objective": "sum over cells of huber(ln L fitted - ln L observed)",
        "delta": fit.objective.delta,
        "objective_value": fit.objective_value,
        "n_starts": fit.n_starts,
        "n_polished": fit.n_polished,
        "law": fit.law.name_params(fit.params),
        "basins": [fit.law.name_params(b.params) | {"objective_value": b.objective_value} for b in fit.basins],
        "at_bounds": list(fit.at_bounds),
        "condition_number": fit.condition_number,
        "residual_sd": float(fit.residuals.std()),
        "residuals": dict(zip(kept["cell_id"], fit.residuals.tolist(), strict=True)),
        "n_runs": resamples.n_runs,
        "interval_method": METHOD,
        "interval_coverage": COVERAGE,
        "interval_level": LEVEL,
        "n_resamples": len(resamples.laws),
        "share_unconverged": resamples.share_unconverged,
        "share_at_bound": resamples.share_at_bound,
        "intervals": describe_intervals(fitted.intervals),
        "optimum": asdict(fitted.optimum) | {"flops": fitted.flops},
    }


def describe_intervals(intervals: dict[str, Interval]) -> dict[str, Any]:
    """Return intervals as plain values; `identified` says whether the estimate may be quoted."""
    return {name: asdict(interval) | {"identified": interval.identified} for name, interval in intervals.items()}
