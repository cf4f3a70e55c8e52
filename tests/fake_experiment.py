"""A small, whole fake: an experiment's folder as a trainer would leave it, its losses drawn from a known law."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_experiment

from harness.plan import plan_experiment
from harness.records import CellRecord, Plan, RunRecord
from harness.runs import find_cell_dir, write_json, write_plan
from results.laws import Chinchilla

LAW = Chinchilla(E=1.1, A=8.0, B=90.0, alpha=0.35, beta=0.42)
SIZES = [{"n_layer": 1, "n_head": 2, "d_model": d_model} for d_model in (8, 16, 32, 64, 128)]
TOKENS = [128 * 100, 128 * 200, 128 * 400, 128 * 800]
GRID: dict[str, Any] = {"sizes": SIZES, "tokens": TOKENS, "repeats": {"cells": "cheapest", "n": 2}}


def write_experiment(folder: Path, data_dir: Path, grid: dict[str, Any] = GRID, noise: float = 0.002, **sections: Any) -> Path:
    """Plan a grid and write every record of a finished training; return the experiment's folder."""
    plan = plan_experiment(tiny_experiment(data_dir, name="fake", grid=grid, **sections))
    experiment_dir = write_plan(plan, folder / "runs")
    draw = np.random.default_rng(0)
    for run in plan.runs:
        luck = draw.normal()
        losses = {
            cell.cell_id: float(LAW.loss(cell.n_params, cell.tokens)) * float(np.exp(noise * (luck + draw.normal()) / 2**0.5))
            for cell in run.cells
        }
        write_attempt(experiment_dir / run.run_id, run, losses)
        for cell in run.cells:
            summary = make_summary(plan, cell, losses[cell.cell_id])
            write_json(find_cell_dir(experiment_dir / run.run_id, cell) / "summary.json", summary)
    return experiment_dir


def write_attempt(run_dir: Path, run: RunRecord, losses: dict[str, float]) -> None:
    """Write one attempt of ten minutes with a few metric rows on the trunk and one evaluation for each cell."""
    attempt = run_dir / "attempts" / "1"
    write_json(attempt / "attempt.json", {"pid": 1, "host": "h", "started_utc": "2026-01-01T00:00:00+00:00"})
    rows = []
    for step in range(50, run.n_trunk_steps + 1, 50):
        tokens = step * run.tokens_per_step
        loss = float(LAW.loss(run.cells[0].n_params, tokens)) + 0.1
        rows.append(make_row("train", None, step, tokens, train_loss=loss, lr=1e-3, grad_norm=1.0))
        rows.append(make_row("eval", None, step, tokens, val_loss=loss, val_bpb=loss))
    for cell in run.cells:
        rows.append(make_row("train", cell.cell_id, cell.n_steps, cell.tokens, train_loss=losses[cell.cell_id]))
        rows.append(make_row("eval", cell.cell_id, cell.n_steps, cell.tokens, val_loss=losses[cell.cell_id]))
    (attempt / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(
        attempt / "outcome.json",
        {"state": "done", "reason": "", "step": run.n_trunk_steps, "finished_utc": "2026-01-01T00:10:00+00:00", "error": None},
    )


def make_row(kind: str, cell_id: str | None, step: int, tokens: int, **values: float) -> dict[str, Any]:
    return {"kind": kind, "cell_id": cell_id, "step": step, "tokens": tokens, "flops": 1e3 * tokens, **values}


def make_summary(plan: Plan, cell: CellRecord, val_loss: float, **changes: Any) -> dict[str, Any]:
    """Return a finished cell's row; keyword arguments replace fields."""
    planned = cell.model_dump(mode="json", exclude={"n_steps"})
    summary = {
        "format": "scaling-harness-summary",
        "format_version": 1,
        "state": "done",
        **planned,
        "planned_steps": cell.n_steps,
        "planned_tokens": cell.tokens,
        "planned_flops": cell.flops,
        "steps": cell.n_steps,
        "skipped_steps": 0,
        "val_loss": val_loss,
        "val_loss_best": val_loss,
        "val_bpb": val_loss / np.log(2),
        "train_loss": val_loss,
        "metric_id": plan.data.metric_id,
        "val_tokens_scored": plan.data.val_tokens - 1,
        "data_content_id": plan.data.content_id,
        "data_source": plan.data.source,
        "tokenizer": plan.data.tokenizer,
        "receipt": "r" * 16,
        "weights_sha256": "w" * 64,
        "engine": "torch",
        "world_size": 1,
        "n_threads": 1,
        "device": "cpu",
        "device_name": "a processor",
        "train_s": 60.0,
        "tokens_per_s": cell.tokens / 60,
        "attempts": 1,
        "code_hash": "c0de",
        "commit": None,
        "dirty": None,
        "torch_version": "2.13.0",
        "python_version": "3.11.7",
        "finished_utc": "2026-01-01T00:10:00+00:00",
    }
    return summary | changes


def find_summaries(experiment_dir: Path) -> list[Path]:
    """Return the summaries of an experiment, by name."""
    return sorted(experiment_dir.glob("*/cells/*/summary.json"))


def change_summary(path: Path, **changes: Any) -> str:
    """Replace fields of a summary and return its cell's id."""
    write_json(path, json.loads(path.read_text()) | changes)
    return path.parent.name
