"""Runs -> one table: a row for every planned cell, done or not: what was planned, what was achieved, why it is left out.

The columns stand in results/FORMAT.md.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.config import ConfigError
from harness.records import CellRecord, Plan, RunRecord
from harness.runs import (
    RunState,
    find_cell_dir,
    is_cell_done,
    iter_metrics,
    list_attempts,
    load_plan,
    read_json,
    run_state,
)

HELD_OUT = "held out: trained to test a prediction, never fitted"
MAX_OFF_PLAN = 1e-3  # tokens or steps may differ from the plan by this fraction
# Int64 and boolean are the pandas types that can be empty. FLOPs are floats: those of large runs pass 2^63.
COLUMNS = {
    "experiment": "str",
    "run_id": "str",
    "cell_id": "str",
    "role": "str",
    "state": "str",
    "excluded": "boolean",
    "exclusion_reason": "str",
    "size": "str",
    "n_layer": "Int64",
    "n_head": "Int64",
    "d_model": "Int64",
    "seq_len": "Int64",
    "vocab_size": "Int64",
    "seed": "Int64",
    "data_seed": "Int64",
    "n_params": "Int64",
    "n_params_non_embedding": "Int64",
    "n_params_matmul": "Int64",
    "flops_per_token": "float64",
    "requested_tokens": "Int64",
    "planned_tokens": "Int64",
    "tokens": "Int64",
    "unique_tokens": "Int64",
    "epochs": "float64",
    "planned_steps": "Int64",
    "steps": "Int64",
    "skipped_steps": "Int64",
    "branch_step": "Int64",
    "n_cooldown_steps": "Int64",
    "planned_flops": "float64",
    "flops": "float64",
    "flops_6nd": "float64",
    "flops_6nd_non_embedding": "float64",
    "lr": "float64",
    "global_batch_size": "Int64",
    "schedule": "str",
    "precision": "str",
    "stage": "str",
    "parametrization": "str",
    "val_loss": "float64",
    "val_loss_best": "float64",
    "val_bpb": "float64",
    "train_loss": "float64",
    "metric_id": "str",
    "val_tokens_scored": "Int64",
    "data_content_id": "str",
    "data_source": "str",
    "data_is_fallback": "boolean",
    "tokenizer": "str",
    "receipt": "str",
    "weights_sha256": "str",
    "engine": "str",
    "world_size": "Int64",
    "n_threads": "Int64",
    "device": "str",
    "device_name": "str",
    "train_s": "float64",
    "tokens_per_s": "float64",
    "attempts": "Int64",
    "code_hash": "str",
    "commit": "str",
    "dirty": "boolean",
    "torch_version": "str",
    "python_version": "str",
    "finished_utc": "str",
}
ACHIEVED = ("tokens", "flops", "flops_6nd", "flops_6nd_non_embedding", "unique_tokens", "epochs")  # unknown until done
CURVE_COLUMNS = {
    "run_id": "str",
    "cell_id": "str",
    "size": "str",
    "n_params": "Int64",
    "kind": "str",
    "step": "Int64",
    "tokens": "float64",
    "flops": "float64",
    "loss": "float64",
    "lr": "float64",
    "grad_norm": "float64",
    "tokens_per_s": "float64",
}


def load_cells(experiment_dir: Path) -> pd.DataFrame:
    """Read an experiment: one row for every cell of its plan.

    Raises:
        ConfigError: there is no plan, or it is not one.
    """
    plan = load_plan(experiment_dir)
    rows = []
    for run in plan.runs:
        run_dir = experiment_dir / run.run_id
        state = run_state(run_dir, run)
        rows += [read_row(run_dir, plan, cell, state) for cell in run.cells]
    cells = conform(pd.DataFrame(rows), COLUMNS)
    metric_id = find_metric(cells, plan)
    reasons = [explain_exclusion(row, metric_id) for row in cells.to_dict("records")]
    cells["exclusion_reason"] = pd.Series(reasons, dtype="str")
    cells["excluded"] = cells["exclusion_reason"] != ""
    return cells


def load_runs(folder: Path) -> pd.DataFrame:
    """Read an experiment, or every experiment in a folder of them as one table.

    Raises:
        ConfigError: there is no plan, or a cell stands in two experiments.
    """
    plans = sorted(folder.glob("*/plan.json"))
    if (folder / "plan.json").exists() or not plans:
        return load_cells(folder)
    cells = pd.concat([load_cells(plan.parent) for plan in plans], ignore_index=True)
    done = cells[cells["state"] == "done"]
    again = done[done.duplicated("cell_id", keep=False)]
    if len(again):
        cell_id, count = again["cell_id"].iloc[0], int(done.duplicated("cell_id").sum())
        names = " and ".join(again.loc[again["cell_id"] == cell_id, "experiment"])
        raise ConfigError(f"{folder}: cell {cell_id} stands in {names} ({count} cell(s) too many); name one experiment")
    metrics = cells.loc[~cells["excluded"], "metric_id"]
    other = ~cells["excluded"] & (cells["metric_id"] != (metrics.mode()[0] if len(metrics) else ""))
    if not cells.loc[~cells["excluded"], "tokenizer"].nunique() > 1:  # else the fit says that losses do not compare
        reasons = [f"another metric: {metric}, while most cells have {metrics.mode()[0]}" for metric in cells["metric_id"][other]]
        cells.loc[other, "exclusion_reason"] = reasons
        cells.loc[other, "excluded"] = True
    return cells


def read_row(run_dir: Path, plan: Plan, cell: CellRecord, state: RunState) -> dict[str, Any]:
    """Return the row of one cell: the plan's part and over it what the summary measured, or why there is none."""
    planned = cell.model_dump(mode="json")
    row = {
        **planned,
        "planned_tokens": planned["tokens"],
        "planned_flops": planned["flops"],
        "planned_steps": planned["n_steps"],
        "data_content_id": plan.data.content_id,
        "data_source": plan.data.source,
        "data_is_fallback": plan.data.is_fallback,
        "tokenizer": plan.data.tokenizer,
        **dict.fromkeys(ACHIEVED),
    }
    if not is_cell_done(run_dir, cell):
        return row | {"state": state.state, "exclusion_reason": state.reason}
    try:
        summary = read_json(find_cell_dir(run_dir, cell) / "summary.json")
    except ConfigError as error:
        return row | {"state": "failed", "exclusion_reason": str(error)}
    if not isinstance(summary, dict) or summary.get("cell_id") != cell.cell_id:
        return row | {"state": "failed", "exclusion_reason": "summary.json is that of another cell"}
    measured = {key: value for key, value in summary.items() if key not in planned or key in ACHIEVED}
    return row | measured | {"state": "done", "exclusion_reason": ""}


def conform(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Give a table exactly these columns and types; what is no number where one belongs becomes empty."""
    return pd.DataFrame({name: conform_column(table, name, dtype) for name, dtype in columns.items()})


def conform_column(table: pd.DataFrame, name: str, dtype: str) -> "pd.Series[Any]":
    """Return one column in its type; a column that is missing is empty."""
    values = table[name] if name in table else pd.Series([None] * len(table), index=table.index, dtype=object)
    if dtype in ("Int64", "float64"):
        numbers = pd.to_numeric(values, errors="coerce")
        return numbers.astype(float) if dtype == "float64" else numbers.where(np.isfinite(numbers)).round().astype("Int64")
    if dtype in ("bool", "boolean"):
        return values.map(lambda value: value if isinstance(value, bool) else None).astype("boolean")
    return values.map(lambda value: None if pd.isna(value) else str(value)).astype("str")


def find_metric(cells: pd.DataFrame, plan: Plan) -> str:
    """Return the identity of the metric that most finished cells were scored by; the plan's where there is a tie."""
    counts = Counter(cells.loc[cells["state"] == "done", "metric_id"].dropna())
    return max(counts, key=lambda metric: (counts[metric], metric == plan.data.metric_id), default=plan.data.metric_id)


def explain_exclusion(row: dict[Hashable, Any], metric_id: str) -> str:
    """Say in one phrase why a cell may not be fitted; empty if it may."""
    if row["state"] != "done":
        detail = f" ({row['exclusion_reason']})" if row["exclusion_reason"] else ""
        return f"diverged{detail}" if row["state"] == "diverged" else f"not done: {row['state']}{detail}"
    for unit in ("tokens", "steps"):
        if is_off(row[unit], row[f"planned_{unit}"]):
            return f"{unit} off the plan: {describe_count(row[unit])} of {describe_count(row[f'planned_{unit}'])}"
    if pd.isna(row["skipped_steps"]) or row["skipped_steps"] > 0:
        return f"skipped steps: {describe_count(row['skipped_steps'])}"
    if pd.isna(row["val_loss"]):
        return "val_loss is missing"
    if not (np.isfinite(row["val_loss"]) and row["val_loss"] > 0):
        return f"val_loss is {row['val_loss']:g}: not a finite number above 0"
    if row["metric_id"] != metric_id:
        return f"another metric: {row['metric_id']}, while most cells have {metric_id}"
    if row["role"] == "held_out":
        return HELD_OUT
    if row["role"] == "scratch":
        return "from scratch: trained to be compared with its branch, never fitted"
    return ""


def is_off(achieved: Any, planned: Any) -> bool:  # noqa: ANN401 - a number or pandas' NA
    """Say whether a count is unknown or differs from the plan by more than `MAX_OFF_PLAN`."""
    return bool(pd.isna(achieved) or abs(achieved - planned) > MAX_OFF_PLAN * planned)


def describe_count(count: Any) -> str:  # noqa: ANN401 - a number or pandas' NA
    """Write a count, or that there is none."""
    return "not recorded" if pd.isna(count) else f"{count:,}"


def load_curves(experiment_dir: Path) -> pd.DataFrame:
    """Read every metric row of an experiment in long form; `loss` is train_loss or val_loss, as `kind` says.

    Note: rows of a trunk have no cell_id; `select_curve` puts a cell's curve together.
    """
    plan = load_plan(experiment_dir)
    rows = []
    for run in plan.runs:
        of_run = {"run_id": run.run_id, "size": run.size, "n_params": run.cells[0].n_params}
        for row in iter_metrics(experiment_dir / run.run_id):
            loss = row.get("val_loss" if row["kind"] == "eval" else "train_loss")
            rows.append({**row, **of_run, "loss": loss})
    return conform(pd.DataFrame(rows), CURVE_COLUMNS)


def select_curve(curves: pd.DataFrame, run_id: str, cell_id: str, branch_step: int) -> pd.DataFrame:
    """Return a cell's curve: its trunk's rows up to the branch, then its own."""
    of_run = curves[curves["run_id"] == run_id]
    on_trunk = of_run["cell_id"].isna() & (of_run["step"] <= branch_step)
    return of_run[on_trunk | (of_run["cell_id"] == cell_id)].sort_values("step", kind="stable")


def write_table(cells: pd.DataFrame, results_dir: Path) -> list[Path]:
    """Write table.csv and table.parquet."""
    results_dir.mkdir(parents=True, exist_ok=True)
    csv, parquet = results_dir / "table.csv", results_dir / "table.parquet"
    safe = {name: cells[name].map(disarm, na_action="ignore") for name, dtype in COLUMNS.items() if dtype == "str"}
    cells.assign(**safe).to_csv(csv, index=False)
    cells.to_parquet(parquet, index=False)
    return [csv, parquet]


def disarm(text: str) -> str:
    """Keep a text from starting a formula in a spreadsheet."""
    return f"'{text}" if text and (text[0] in "=+-@" or text[0] < " ") else text


@dataclass(frozen=True)
class Cost:
    """What an experiment has spent, finished or not. Units: training FLOPs; seconds during which some attempt ran."""

    flops: float
    wall_s: float | None
    n_attempts: int
    n_unended: int  # attempts without an end: their time is not known and not in wall_s


def measure_cost(experiment_dir: Path, cells: pd.DataFrame, curves: pd.DataFrame) -> Cost:
    """Add up training FLOPs, shared trunks once, and the time during which at least one attempt ran.

    Note: steps of unfinished work count as far as they were logged; work done again after a crash counts once.
    """
    plan = load_plan(experiment_dir)
    spans = [read_span(path) for run in plan.runs for path in list_attempts(experiment_dir / run.run_id)]
    ended = [span for span in spans if span is not None]
    return Cost(
        flops=sum(count_spent_flops(run, cells, curves) for run in plan.runs),
        wall_s=measure_union(ended) if ended else None,
        n_attempts=len(spans),
        n_unended=len(spans) - len(ended),
    )


def count_spent_flops(run: RunRecord, cells: pd.DataFrame, curves: pd.DataFrame) -> float:
    """Count a run's training FLOPs: the trunk as far as it came, and each cell's own steps after it."""
    logged = curves[(curves["run_id"] == run.run_id) & (curves["kind"] == "train")]
    last_step = logged.groupby("cell_id", dropna=False)["step"].max()
    done = set(cells.loc[cells["state"] == "done", "cell_id"])
    trunk = max([0, *last_step[last_step.index.isna()], *(c.branch_step for c in run.cells if c.cell_id in done)])
    steps = trunk
    for cell in run.cells:
        steps += cell.n_cooldown_steps if cell.cell_id in done else max(0, last_step.get(cell.cell_id, 0) - cell.branch_step)
    return float(steps) * run.tokens_per_step * run.cells[0].flops_per_token


def read_span(attempt_dir: Path) -> tuple[float, float] | None:
    """Return an attempt's start and end, or None where one of them was not recorded. Units: seconds of universal time."""
    try:
        start = read_json(attempt_dir / "attempt.json")["started_utc"]
        end = read_json(attempt_dir / "outcome.json")["finished_utc"]
    except FileNotFoundError:
        return None
    return datetime.fromisoformat(start).timestamp(), datetime.fromisoformat(end).timestamp()


def measure_union(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans, so that runs side by side count once and pauses not at all."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
