"""Predictions that were written down before, and their scores: a seal is a file whose digest can be committed or published.

A seal is one JSON file in `predictions/` of an experiment (results/FORMAT.md). Its digest is the hash of all else in it. An
edited seal is detected where its digest was committed or published; a clock that was set back is not, and the page says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from harness.config import ConfigError
from harness.records import CellRecord, Plan, hash_record
from harness.runs import describe_code, find_code_root, list_attempts, load_plan, read_json, run_git, write_json
from results.holdout import extrapolate_frontier
from results.laws import FloatArray
from results.study import Fitted, Study
from results.table import HELD_OUT, load_cells
from results.uncertainty import LEVEL, estimate_spread

METHOD = "interval of the law at the cell, and the scatter of one cell about the law, added in squares; no allowance for a bend"
CAVEAT = "An edited seal is detected by its digest; a clock that was set back is not: trust the commit no more than its host."


@dataclass(frozen=True)
class Score:
    """One prediction beside what came. Units: nats per token; error in percent of the loss. None: not trained, or not usable.

    skill: 1 - error / error of the better baseline; 1 is perfect, 0 no better than it, below 0 worse.
    """

    experiment: str
    seal: str
    cell_id: str
    predicted: float
    low: float
    high: float
    observed: float | None
    error: float | None
    covered: bool | None
    skill: float | None
    when: str  # what is known of whether the seal came before the training
    is_before: bool
    problem: str  # why there is no score, or why it is worth little


def seal_predictions(study: Study, plan: Plan, experiment_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Write what the law says of the held-out cells that are not trained; return the file and its content.

    Raises:
        ConfigError: no law was fitted, or no held-out cell is left to be predicted.
    """
    if study.fitted is None:
        raise ConfigError(f"{experiment_dir}: {study.refusal}")
    done = set(study.cells.loc[study.cells["state"] == "done", "cell_id"])
    held = [cell for cell in plan.cells if cell.role == "held_out"]
    waiting = [cell for cell in held if cell.cell_id not in done]
    if not waiting:
        found = f"all {len(held)} held-out cells are trained" if held else "no cell of the plan is held out"
        raise ConfigError(
            f"{experiment_dir}: {found}; hold out a cell (grid.hold_out, or hold_out = true in grid.extra) and plan again"
        )
    seal = describe_seal(study, study.fitted, plan, waiting)
    seal["digest"] = hash_record(seal)
    number = 1 + max((int(path.stem) for path in list_seals(experiment_dir)), default=0)
    path = experiment_dir / "predictions" / f"{number}.json"
    write_json(path, seal)
    return path, seal


def describe_seal(study: Study, fitted: Fitted, plan: Plan, cells: Sequence[CellRecord]) -> dict[str, Any]:
    """Return the content of a seal, but for its digest."""
    code, kept = describe_code(find_code_root()), study.kept
    return {
        "format": "scaling-harness-seal",
        "format_version": 1,
        "experiment": study.name,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "law": fitted.fit.law.name,
        "equation": fitted.fit.law.equation,
        "params": fitted.fit.law.name_params(fitted.fit.params),
        "params_column": study.convention.column,
        "interval_level": LEVEL,
        "interval_method": METHOD,
        "fitted_cells": dict(zip(kept["cell_id"], kept["val_loss"].astype(float).tolist(), strict=True)),
        "warnings": list(study.warnings),
        "data_content_id": plan.data.content_id,
        "metric_id": plan.data.metric_id,
        "code_hash": code.code_hash,
        "commit": code.commit,
        "dirty": code.dirty,
        "predictions": list(iter_predictions(study, fitted, cells)),
    }


def iter_predictions(study: Study, fitted: Fitted, cells: Sequence[CellRecord]) -> Iterator[dict[str, Any]]:
    """Give the law's loss at each cell with an interval for what will be measured there, and what baselines say."""
    kept, column = study.kept, study.convention.column
    n_params = np.array([float(getattr(cell, column)) for cell in cells])
    tokens = np.array([float(cell.tokens) for cell in cells])
    loss, low, high = predict_losses(fitted, n_params, tokens)
    seen = 6 * kept[column].to_numpy(float) * kept["tokens"].to_numpy(float)
    frontier = extrapolate_frontier(seen, kept["val_loss"].to_numpy(float), 6 * n_params * tokens)
    for i, cell in enumerate(cells):
        yield {
            "cell_id": cell.cell_id,
            "run_id": cell.run_id,
            "n_params": n_params[i],
            "tokens": cell.tokens,
            "epochs": cell.epochs,
            "flops_6nd": float(6 * n_params[i] * tokens[i]),
            "reach": float(6 * n_params[i] * tokens[i] / seen.max()),
            "loss": float(loss[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "best_seen": float(kept["val_loss"].min()),
            "power_law": None if frontier is None else float(frontier[i]),
        }


def predict_losses(fitted: Fitted, n_params: FloatArray, tokens: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the law's loss and an interval for one new cell: the law's own, and the scatter of cells about it.

    Note: the scatter is that of the residuals, with as many degrees of freedom as cells less parameters.
    """
    fit = fitted.fit
    spread = estimate_spread(fitted.resamples, lambda law: np.log(law.loss(n_params, tokens)))
    df = max(fit.n_cells - int(fit.free.sum()), 1)
    scatter = float(stdtrit(df, (1 + LEVEL) / 2)) * float(np.sqrt((fit.residuals**2).sum() / df))
    below = np.hypot(spread.estimate - spread.low, scatter)
    above = np.hypot(spread.high - spread.estimate, scatter)
    return np.exp(spread.estimate), np.exp(spread.estimate - below), np.exp(spread.estimate + above)


def list_seals(experiment_dir: Path) -> list[Path]:
    """Return an experiment's seals, oldest first."""
    return sorted((p for p in experiment_dir.glob("predictions/*.json") if p.stem.isdigit()), key=lambda p: int(p.stem))


def load_seal(path: Path) -> dict[str, Any]:
    """Read a seal and check it against its digest.

    Raises:
        ConfigError: it is not one, or was edited.
    """
    seal = read_json(path)
    if not isinstance(seal, dict) or seal.get("format") != "scaling-harness-seal":
        raise ConfigError(f"{path}: is not a seal; restore it or move it away")
    digest = hash_record({key: value for key, value in seal.items() if key != "digest"})
    if seal.get("digest") != digest:
        raise ConfigError(f"{path}: digest={seal.get('digest')}, but its content has {digest}: it was edited; restore it")
    return seal


def score_experiment(experiment_dir: Path, cells: pd.DataFrame | None = None) -> list[Score]:
    """Score every prediction of an experiment; none where nothing was sealed."""
    paths = list_seals(experiment_dir)
    if not paths:
        return []
    plan = load_plan(experiment_dir)
    rows = {row["cell_id"]: row for row in (load_cells(experiment_dir) if cells is None else cells).to_dict("records")}
    return [score for path in paths for score in iter_scores(path, experiment_dir, plan, rows)]


def score_studies(folder: Path) -> list[Score]:
    """Score an experiment, or every experiment in a folder of them.

    Raises:
        ConfigError: nothing was sealed there.
    """
    plans = [folder / "plan.json"] if (folder / "plan.json").exists() else sorted(folder.glob("*/plan.json"))
    scores = [score for plan in plans for score in score_experiment(plan.parent)]
    if not scores:
        raise ConfigError(
            f"{folder}: holds no prediction; python -m results predict writes one before the held-out cells are trained"
        )
    return scores


def iter_scores(path: Path, experiment_dir: Path, plan: Plan, rows: Mapping[str, dict[Any, Any]]) -> Iterator[Score]:
    """Score the predictions of one seal."""
    seal = load_seal(path)
    commit = find_commit(path, seal["digest"])
    fitted_runs = {cell.run_id for cell in plan.cells if cell.cell_id in seal["fitted_cells"]}
    for one in seal["predictions"]:
        when, is_before = compare_times(seal, commit, find_start(experiment_dir / one["run_id"]), one["run_id"] in fitted_runs)
        yield score_prediction(path, seal, one, rows.get(one["cell_id"]), when, is_before)


def score_prediction(
    path: Path, seal: Mapping[str, Any], one: Mapping[str, Any], row: Mapping[Any, Any] | None, when: str, is_before: bool
) -> Score:
    """Set one prediction beside its cell."""
    problem = explain_unusable(seal, row)
    usable = row is not None and not problem
    observed = float(row["val_loss"]) if usable and row is not None else None
    error = None if observed is None else 100 * (one["loss"] / observed - 1)
    return Score(
        experiment=seal["experiment"],
        seal=path.stem,
        cell_id=one["cell_id"],
        predicted=one["loss"],
        low=one["low"],
        high=one["high"],
        observed=observed,
        error=error,
        covered=None if observed is None else one["low"] <= observed <= one["high"],
        skill=None if observed is None else measure_skill(one, observed),
        when=when,
        is_before=is_before,
        problem=problem,
    )


def explain_unusable(seal: Mapping[str, Any], row: Mapping[Any, Any] | None) -> str:
    """Say why a prediction cannot be scored, or nothing."""
    if row is None:
        return "the plan no longer has this cell"
    if row["state"] != "done":
        return f"not trained: {row['state']}"
    if row["metric_id"] != seal["metric_id"]:
        return f"another metric: {row['metric_id']}, predicted was {seal['metric_id']}"
    return (
        "" if row["exclusion_reason"] == HELD_OUT else row["exclusion_reason"] or "the cell is fitted: it is no longer held out"
    )


def measure_skill(one: Mapping[str, Any], observed: float) -> float:
    """Return 1 - error / error of the better baseline: the lowest loss seen before, or a power law of compute alone."""
    baselines = [abs(one[name] - observed) for name in ("best_seen", "power_law") if one[name] is not None]
    return float(1 - abs(one["loss"] - observed) / max(min(baselines), 1e-12))


@dataclass(frozen=True)
class Commit:
    """The earliest commit that holds a seal, by content or by naming its digest."""

    name: str
    time: datetime


def find_commit(path: Path, digest: str) -> Commit | None:
    """Find the earliest commit, on any branch, whose tree gained this very file or whose message names its digest."""
    root = path.resolve().parent
    blob = run_git(root, "hash-object", "--no-filters", str(path.resolve()))
    wanted = [*([f"--find-object={blob}"] if blob else []), f"--grep={digest}"]
    found = [run_git(root, "log", "--all", "--format=%H %cI", *more) for more in ((one,) for one in wanted)]
    lines = [line.split() for text in found if text for line in text.splitlines()]
    commits = [Commit(name, datetime.fromisoformat(time)) for name, time in lines]
    return min(commits, key=lambda commit: commit.time, default=None)


def find_start(run_dir: Path) -> datetime | None:
    """Return when a run's first attempt began; None where it has none or did not record it."""
    attempts = list_attempts(run_dir)
    try:
        return datetime.fromisoformat(read_json(attempts[0] / "attempt.json")["started_utc"]) if attempts else None
    except FileNotFoundError:
        return None


def compare_times(seal: Mapping[str, Any], commit: Commit | None, start: datetime | None, shares_trunk: bool) -> tuple[str, bool]:
    """Say whether the seal precedes the first attempt of the run, and whether a commit says so too."""
    if start is None:
        return "the run has no recorded start", False
    held = "no commit holds it" if commit is None else f"commit {commit.name[:12]} holds it"
    before = (commit.time if commit else datetime.fromisoformat(seal["created_utc"])) < start
    began = f"the run began {start:%Y-%m-%d %H:%M:%S}"
    if shares_trunk and not before:
        began += ", its trunk being that of fitted cells"
    if commit is None:
        by_itself = "by its own word alone, it is older" if before else "and it is younger by its own word"
        return f"{held}; {by_itself}: sealed {seal['created_utc'][:19].replace('T', ' ')}, {began}", False
    return f"{held}, {commit.time:%Y-%m-%d %H:%M:%S%z}, {'before' if before else 'not before'} {began}", before


def render_scores(scores: Sequence[Score]) -> str:
    """Write the history of predictions as a page."""
    lines = []
    for one in scores:
        said = f"{one.experiment} seal {one.seal}, {one.cell_id}: predicted {one.predicted:.4f} ({one.low:.4f} to {one.high:.4f})"
        lines.append(f"{said}, {describe_outcome(one)}")
        lines.append(f"  {one.when}")
    return "\n".join([*lines, "", summarise_scores(scores), CAVEAT])


def describe_outcome(one: Score) -> str:
    """Say what came of a prediction."""
    if one.observed is None or one.error is None or one.skill is None:
        return f"not scored: {one.problem}"
    inside = "inside" if one.covered else "outside"
    return f"measured {one.observed:.4f}: error {one.error:+.2f}%, {inside} the interval, skill {one.skill:.2f}"


def summarise_scores(scores: Sequence[Score]) -> str:
    """Write one line: how many predictions, how good, how many of them proven to be older than the training."""
    scored = [one for one in scores if one.observed is not None]
    if not scored:
        return f"{len(scores)} prediction(s), none scored yet."
    errors = np.array([one.error for one in scored], dtype=float)
    return (
        f"{len(scores)} prediction(s), {len(scored)} scored: mean error {np.abs(errors).mean():.2f}% "
        f"(bias {errors.mean():+.2f}%), "
        f"{sum(bool(one.covered) for one in scored)} inside their {LEVEL:.0%} interval, median skill "
        f"{float(np.median([one.skill for one in scored if one.skill is not None])):.2f}; "
        f"{sum(one.is_before for one in scored)} held by a commit from before the training."
    )
