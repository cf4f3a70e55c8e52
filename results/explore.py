"""What the report's charts and its slider show, computed here once: the page draws and never evaluates a law."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from model.ladder import format_count
from results.claims import NOT_IDENTIFIED
from results.frontier import Frontier
from results.laws import FloatArray
from results.plot import select_scored, split_series, spread_grid
from results.study import CONVENTIONS, Fitted, Study
from results.uncertainty import Quantity, estimate_spread

N_STOPS, BELOW, BEYOND = 25, 10.0, 1000.0  # places of the slider: from the fitted compute / 10 to 1,000 times it
N_POINTS = 40
MAX_BUDGETS = 8


def describe_charts(study: Study, frontiers: Mapping[str, Frontier | str]) -> dict[str, Any]:
    """Return the cells, and for each way to count parameters the law's lines, the optimum at each stop, and other estimators."""
    fits = {study.convention.name: study.fitted} | study.others
    return {
        "cells": describe_points(study),
        "default": study.convention.name,
        "conventions": {
            name: describe_convention(study, name, fitted, frontiers if name == study.convention.name else {})
            for name, fitted in fits.items()
        }
        or {study.convention.name: describe_convention(study, study.convention.name, None, {})},
    }


def describe_points(study: Study) -> list[dict[str, Any]]:
    """Return each cell that has a loss: its name, its place under each convention, and whether it was fitted."""
    columns = {name: convention.column for name, convention in CONVENTIONS.items()}
    return [
        {
            "id": row["cell_id"],
            "n": {name: int(row[column]) for name, column in columns.items() if pd.notna(row[column])},
            "tokens": int(row["tokens"]),
            "loss": round(float(row["val_loss"]), 6),
            "out": row["exclusion_reason"],
        }
        for row in select_scored(study).to_dict("records")
    ]


def describe_convention(
    study: Study, name: str, fitted: Fitted | None, frontiers: Mapping[str, Frontier | str]
) -> dict[str, Any]:
    """Return what one way to count parameters adds."""
    told: dict[str, Any] = {"words": CONVENTIONS[name].words, "lines": {}, "stops": [], "estimators": {}}
    cells = select_scored(study)
    if fitted is None or not fitted.fit.law.is_chinchilla or not len(cells):
        return told
    column = CONVENTIONS[name].column
    flops = np.geomspace(fitted.flops / BELOW, fitted.flops * BEYOND, N_STOPS)
    stops = list_stops(fitted, flops)
    told["stops"] = stops
    told["lines"] = {
        "params": trace_lines(fitted, cells, "planned_tokens", spread_grid(cells[column], N_POINTS), by_params=True),
        "tokens": trace_lines(fitted, cells, column, spread_grid(cells["tokens"], N_POINTS), by_params=False),
        "flops": [{"label": "best split", "band": [[s["flops"], s["loss"], s["loss_low"], s["loss_high"]] for s in stops]}],
        "optimum": [{"label": "law", "band": [[s["flops"], s["n"], s["n_low"], s["n_high"]] for s in stops]}],
    }
    told["estimators"] = {
        key: [[one.flops, one.n_params] for one in found.optima] for key, found in frontiers.items() if not isinstance(found, str)
    }
    return told


def trace_lines(fitted: Fitted, cells: pd.DataFrame, column: str, grid: FloatArray, *, by_params: bool) -> list[dict[str, Any]]:
    """Follow the law along one variable, at some values of the other that were trained."""
    law = fitted.fit.constants
    lines = []
    for one in split_series(cells, column):
        if one.has_line:
            loss = law.loss(grid, one.value) if by_params else law.loss(one.value, grid)
            lines.append({"label": format_count(one.value), "points": np.column_stack([grid, loss]).round(6).tolist()})
    return lines


def list_stops(fitted: Fitted, flops: FloatArray) -> list[dict[str, Any]]:
    """Return the best split of each compute with intervals, as numbers and as words."""
    names = {"n": "n_params", "d": "tokens", "loss": "loss"}
    spreads = {short: estimate_spread(fitted.resamples, log_of(name, flops)) for short, name in names.items()}
    stops: list[dict[str, Any]] = []
    for i, compute in enumerate(flops):
        stop: dict[str, Any] = {"flops": float(compute), "beyond": float(compute / fitted.flops)}
        for short, spread in spreads.items():
            values = np.exp([spread.estimate[i], spread.low[i], spread.high[i]])
            stop |= dict(zip((short, f"{short}_low", f"{short}_high"), values.tolist(), strict=True))
        stops.append(stop | {"text": word_stop(stop, explain_split(fitted))})
    return stops


def log_of(name: str, flops: FloatArray) -> Quantity:
    """Return the log of one number of the best split at each compute, as a quantity of a law."""
    return lambda law: np.log([getattr(law.allocate(c), name) for c in flops])


def explain_split(fitted: Fitted) -> str:
    """Say why the best split may not be quoted, or nothing."""
    problems = [fitted.intervals[name].problem for name in ("optimum_exponent", "tokens_per_param")]
    return next((problem for problem in problems if problem), "")


def word_stop(stop: Mapping[str, Any], problem: str) -> dict[str, str]:
    """Write a stop of the slider in words; `problem`: why the split is not quoted."""

    def word(short: str) -> str:
        low, high = format_count(stop[f"{short}_low"]), format_count(stop[f"{short}_high"])
        return f"{format_count(stop[short])} ({low} to {high})"

    beyond = stop["beyond"]
    reach = f"{beyond:.3g} x the largest fitted compute" + (": extrapolated" if beyond > 1.001 else "")
    return {
        "flops": f"{stop['flops']:.2e} FLOPs",
        "reach": reach,
        "n": f"{NOT_IDENTIFIED} ({problem})" if problem else word("n"),
        "d": f"{NOT_IDENTIFIED} ({problem})" if problem else word("d"),
        "loss": f"{stop['loss']:.4f} ({stop['loss_low']:.4f} to {stop['loss_high']:.4f})",
    }
