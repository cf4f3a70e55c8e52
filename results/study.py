"""One table, the law fitted to it, its intervals and what must be said about them: what every page and figure is made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from results.descend import LOG_HUBER, Objective
from results.fit import Fit, FitError, fit_law
from results.laws import CHINCHILLA, Allocation, FloatArray, Law
from results.uncertainty import (
    COVERAGE,
    LEVEL,
    METHOD,
    Interval,
    Resamples,
    SeedNoise,
    estimate_intervals,
    list_alike,
    measure_seed_noise,
    resample_runs,
)

MAX_CONDITION = 1e3
MIN_NOISE_GROUPS = 3  # groups of repeats that show how seed noise changes with compute
LEGEND = "N: parameters; D: training tokens; C: training FLOPs, here 6 N D; ln: natural logarithm"
LOSSES = {"val_loss": "L: val_loss, nats per token", "val_bpb": "L: val_bpb, bits per byte of text"}


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
    """A law with its intervals, under one way to count parameters. Units: flops as 6 N D.

    `optimum`: None for a law that says nothing about the best split.
    """

    fit: Fit
    resamples: Resamples
    intervals: dict[str, Interval]
    flops: float  # the largest compute of the fitted cells, at which an optimum is quoted
    optimum: Allocation | None


@dataclass(frozen=True)
class Choices:
    """How a table is fitted. `loss`: the column; `by_noise`: cells are weighted by 1 / seed noise squared."""

    params: str = "total"
    law: Law = CHINCHILLA
    objective: Objective = LOG_HUBER
    loss: str = "val_loss"
    by_noise: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)


DEFAULT_CHOICES = Choices()


@dataclass(frozen=True)
class Study:
    """A table and all that is claimed from it. `fitted` is None where the cells support no law, and `refusal` says why."""

    name: str
    cells: pd.DataFrame
    convention: Convention
    fitted: Fitted | None
    refusal: str
    others: dict[str, Fitted | None]  # the same fit under the other ways to count parameters
    with_excluded: Fit | None  # the law through every cell that has the numbers, excluded or not; None where none is excluded
    seed_noise: SeedNoise | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    choices: Choices = DEFAULT_CHOICES

    @property
    def kept(self) -> pd.DataFrame:
        """The cells that were fitted."""
        return self.cells[~self.cells["excluded"]]


def fit_study(
    name: str,
    cells: pd.DataFrame,
    choices: Choices = DEFAULT_CHOICES,
    *,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Study:
    """Fit the cells that are not excluded, under one way to count parameters and then under the others.

    `warnings`, `notes`: what is known beforehand, for example from reading a foreign table.
    """
    if choices.loss != "val_loss":
        cells = cells.assign(val_loss=cells[choices.loss])
    kept = cells[~cells["excluded"]]
    refusal = explain_mixture(kept, choices)
    fits = {key: try_fit(kept, convention, choices) for key, convention in CONVENTIONS.items()} if not refusal else {}
    fitted, why = fits.get(choices.params, (None, refusal))
    return Study(
        name=name,
        cells=cells,
        convention=CONVENTIONS[choices.params],
        fitted=fitted,
        refusal=f"{why}{suggest_cells(cells)}" if why else "",
        others={key: other for key, (other, _) in fits.items() if key != choices.params},
        with_excluded=fit_with_excluded(cells, choices) if fitted else None,
        seed_noise=measure_seed_noise(kept),
        warnings=(*warnings, *iter_warnings(cells, kept, fitted)),
        notes=(*notes, *iter_notes(kept)),
        choices=choices,
    )


def explain_mixture(kept: pd.DataFrame, choices: Choices) -> str:
    """Say why losses of these cells do not compare, or nothing."""
    names = sorted(kept["tokenizer"].dropna().unique())
    if len(names) < 2 or choices.loss == "val_bpb":
        return ""
    missing = int(kept["val_bpb"].isna().sum())
    offer = "or fit bits per byte: --loss val_bpb"
    if missing:
        offer = f"or record bits per byte, which do compare (val_bpb is missing in {missing} of {len(kept)} cells)"
    return (
        f"tokenizer: the fitted cells have {len(names)} ({', '.join(names)}), and nats per token of different tokenizers do not "
        f"compare; keep one of them, {offer}"
    )


def read_columns(cells: pd.DataFrame, law: Law, convention: Convention) -> dict[str, FloatArray]:
    """Return what a law reads, parameters counted by a convention."""
    columns = {"n_params": convention.column, "flops": "flops_6nd"}
    return {name: cells[columns.get(name, name)].to_numpy(float, na_value=np.nan) for name in (*law.inputs, "val_loss")}


def check_columns(kept: pd.DataFrame, choices: Choices, convention: Convention) -> None:
    """Refuse a law or a choice whose column the table does not have.

    Raises:
        FitError: naming it.
    """
    needed = {convention.column if name == "n_params" else name for name in choices.law.inputs} | {choices.loss}
    for column in sorted(needed):
        if len(kept) and kept[column].isna().all():
            raise FitError(f"column {column} is missing from every cell; record it, or map it (--map {column}=...)")


def try_fit(kept: pd.DataFrame, convention: Convention, choices: Choices = DEFAULT_CHOICES) -> tuple[Fitted | None, str]:
    """Fit a law and its intervals, or return the reason why these cells support none."""
    columns = read_columns(kept, choices.law, convention)
    try:
        check_columns(kept, choices, convention)
        weights = weigh_by_noise(kept) if choices.by_noise else None
        fit = fit_law(choices.law, columns, choices.objective, weights, choices.fixed)
    except FitError as error:
        return None, str(error)
    resamples = resample_runs(fit, kept["run_id"].tolist())
    flops = float((6 * kept[convention.column].to_numpy(float) * kept["tokens"].to_numpy(float)).max())
    optimum = fit.constants.allocate(flops) if fit.law.is_chinchilla else None
    return Fitted(fit, resamples, estimate_intervals(resamples, flops), flops, optimum), ""


def fit_with_excluded(cells: pd.DataFrame, choices: Choices) -> Fit | None:
    """Fit every cell that has the numbers, also those that were left out; held-out cells stay out."""
    columns = read_columns(cells, choices.law, CONVENTIONS[choices.params])
    has_numbers = np.all([np.isfinite(values) & (values > 0) for values in columns.values()], axis=0)
    used = has_numbers & (cells["role"] != "held_out").to_numpy(bool)
    if int(used.sum()) <= int((~cells["excluded"]).sum()):
        return None
    try:
        used_columns = {name: values[used] for name, values in columns.items()}
        return fit_law(choices.law, used_columns, choices.objective, fixed=choices.fixed)
    except FitError:  # with the cells that were left out there may be no law, which is no news
        return None


def weigh_by_noise(kept: pd.DataFrame) -> FloatArray:
    """Return weights 1 / sd^2 of mean 1, the sd of ln L a power of compute through the groups that differ in the seed alone.

    Raises:
        FitError: too few such groups.
    """
    group = list_alike(kept)
    log_c = np.log(kept["flops_6nd"].to_numpy(float))
    by_group = pd.DataFrame({"log_loss": np.log(kept["val_loss"].to_numpy(float)), "log_c": log_c}).groupby(group)
    repeats = by_group["log_loss"].agg(["count", "var"])
    repeats = repeats[(repeats["count"] > 1) & (repeats["var"] > 0)]
    if len(repeats) < MIN_NOISE_GROUPS:
        raise FitError(
            f"weights: seed noise was measured at {len(repeats)} cell(s), of at least {MIN_NOISE_GROUPS}; "
            "repeat cells of different compute with other seeds (grid.repeats), or fit without weights"
        )
    x = by_group["log_c"].mean()[repeats.index].to_numpy()
    root = np.sqrt(repeats["count"].to_numpy(float) - 1)
    columns = np.column_stack([np.ones(len(x)), x])
    solved = np.linalg.lstsq(columns * root[:, None], np.log(repeats["var"].to_numpy(float)) * root, rcond=None)[0]
    weights = np.exp(-(solved[0] + solved[1] * log_c))
    return np.asarray(weights / weights.mean())


def suggest_cells(cells: pd.DataFrame) -> str:
    """Point at cells that would help a fit: those not trained yet, and those left out for another reason."""
    undone = cells[(cells["state"] != "done") & (cells["role"] != "held_out")]
    left_out = cells[cells["excluded"] & (cells["state"] == "done") & (cells["role"] != "held_out")]
    text = f"; {len(undone)} planned cell(s) are not done: python -m launch submit trains them" if len(undone) else ""
    if len(left_out):
        first = left_out.iloc[0]
        text += f"; {len(left_out)} cell(s) were left out, the first, {first['cell_id']}, since {first['exclusion_reason']}"
    return text


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
    if best is None:
        return
    n_params, tokens = np.exp(fit.centred.x + fit.centred.mean[:, None])
    if not (n_params.min() <= best.n_params <= n_params.max() and tokens.min() <= best.tokens <= tokens.max()):
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
        "format_version": 2,
        "experiment": study.name,
        "law": study.choices.law.name,
        "equation": study.choices.law.equation,
        "source": study.choices.law.source,
        "legend": f"{LOSSES[study.choices.loss]}; {LEGEND}",
        "loss": study.choices.loss,
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
        "with_excluded": None if study.with_excluded is None else describe_with_excluded(study.with_excluded),
        "seed_noise": None if study.seed_noise is None else asdict(study.seed_noise),
        "warnings": list(study.warnings),
        "notes": list(study.notes),
    }


def describe_with_excluded(fit: Fit) -> dict[str, Any]:
    """Return the law through the excluded cells too."""
    return fit.law.name_params(fit.params) | {"n_cells": fit.n_cells, "objective_value": fit.objective_value}


def list_exclusions(excluded: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the id and the reason of each excluded cell."""
    return list(zip(excluded["cell_id"], excluded["exclusion_reason"], strict=True))


def describe_fitted(fitted: Fitted, kept: pd.DataFrame) -> dict[str, Any]:
    """Return a fit as plain values."""
    fit, resamples = fitted.fit, fitted.resamples
    return {
        "objective": fit.objective.name,
        "delta": fit.objective.delta if np.isfinite(fit.objective.delta) else None,
        "weights": None if np.all(fit.weights == 1) else dict(zip(kept["cell_id"], fit.weights.tolist(), strict=True)),
        "objective_value": fit.objective_value,
        "n_starts": fit.n_starts,
        "n_polished": fit.n_polished,
        "law": fit.law.name_params(fit.params),
        "derived": fit.law.derive(fit.law.name_params(fit.params)),
        "basins": [fit.law.name_params(b.params) | {"objective_value": b.objective_value} for b in fit.basins],
        "fixed": {name: fit[name] for name in fit.fixed},
        "at_bounds": list(fit.at_bounds),
        "open_sides": list(fit.open_sides),
        "floor_near_zero": fit.is_floor_near_zero,
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
        "optimum": None if fitted.optimum is None else asdict(fitted.optimum),
    }


def describe_intervals(intervals: dict[str, Interval]) -> dict[str, Any]:
    """Return intervals as plain values; `identified` says whether the estimate may be quoted."""
    return {name: asdict(interval) | {"identified": interval.identified} for name, interval in intervals.items()}
