"""The run's own record: one JSON object per line, appended by rank 0 as it happens, and one row per finished cell.

Nothing is ever read back out of a log.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_model
from torch import nn

from harness.attempt import utc_now
from harness.checkpoint import TrainState
from harness.distributed import Ranks, describe_machine
from harness.records import CellRecord, RunRecord
from harness.runs import write_json


class MetricsWriter:
    """Appends rows to an attempt's metrics.jsonl and prints them in short.

    Each row is one write, so that a kill tears the last one only. Ranks above 0 have no attempt folder and write nothing.
    """

    def __init__(self, attempt_dir: Path | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.descriptor = None if attempt_dir is None else os.open(attempt_dir / "metrics.jsonl", flags, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def write(self, kind: str, cell_id: str | None, **values: Any) -> None:  # noqa: ANN401 - numbers and strings
        """Append a row; a number that is not finite becomes null."""
        row = {"kind": kind, "cell_id": cell_id, **{key: drop_non_finite(value) for key, value in values.items()}}
        if self.descriptor is not None:
            os.write(self.descriptor, json.dumps(row, allow_nan=False).encode() + b"\n")
        self.note(render_row(row))

    def note(self, line: str) -> None:
        """Print a line for people."""
        if self.descriptor is not None:
            print(line, flush=True)


class StepWindow:
    """Times of the steps since the last written row."""

    def __init__(self, run: RunRecord, cell: CellRecord | None) -> None:
        self.run = run
        self.cell_id = cell.cell_id if cell is not None and cell.n_cooldown_steps else None
        self.seconds, self.data_s, self.n_steps = 0.0, 0.0, 0

    def add(self, seconds: float, data_s: float) -> None:
        """Count one step."""
        self.seconds, self.data_s, self.n_steps = self.seconds + seconds, self.data_s + data_s, self.n_steps + 1

    def write(self, metrics: MetricsWriter, state: TrainState, lr: float, grad_norm: float) -> None:
        """Write one training row, times as means over the window, and begin the next window."""
        per_step, batch = self.run.tokens_per_step, self.run.what.optim.global_batch_size
        metrics.write(
            "train",
            self.cell_id,
            step=state.step,
            tokens=state.step * per_step,
            flops=state.step * per_step * self.run.cells[0].flops_per_token,
            train_loss=state.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            step_s=self.seconds / self.n_steps,
            data_s=self.data_s / self.n_steps,
            tokens_per_s=self.n_steps * per_step / self.seconds,
            skipped_steps=state.skipped_steps,
            sample_start=(state.step - self.n_steps) * batch,
            sample_end=state.step * batch,
            receipt=state.receipt,
        )
        self.seconds, self.data_s, self.n_steps = 0.0, 0.0, 0


def drop_non_finite(value: Any) -> Any:  # noqa: ANN401 - numbers and strings
    """Return None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_row(row: dict[str, Any]) -> str:
    """Render a row as one line of a log."""
    where = f"step {row['step']:>7,}  {row['tokens'] / 1e6:8.3f}M tokens"
    if row["kind"] == "eval":
        return f"{where}  val_loss {number(row['val_loss'])}  ({number(row['val_bpb'])} bits per byte)"
    rate = f"{row['tokens_per_s']:>10,.0f} tokens/s" if row["tokens_per_s"] is not None else ""
    return f"{where}  loss {number(row['train_loss'])}  lr {row['lr']:.2e}  {rate}"


def number(value: float | None) -> str:
    """Render a loss, or say that it is not a number."""
    return "not finite" if value is None else f"{value:.4f}"


def write_summary(
    cell_dir: Path, run: RunRecord, cell: CellRecord, state: TrainState, model: nn.Module, ranks: Ranks, n_attempts: int
) -> None:
    """Write a finished cell's weights, then its row, achieved beside planned (harness/FORMAT.md, summary.json)."""
    weights = cell_dir / "model.safetensors"
    save_model(model, str(weights))
    tokens = state.step * run.tokens_per_step
    assert state.val_loss is not None, "a finished cell was evaluated"
    planned = cell.model_dump(mode="json", exclude={"n_steps"})
    row = {
        "format": "scaling-harness-summary",
        "format_version": 1,
        "state": "done",
        **planned,
        "planned_steps": cell.n_steps,
        "planned_tokens": cell.tokens,
        "planned_flops": cell.flops,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "tokens": tokens,
        "flops": tokens * cell.flops_per_token,
        "flops_6nd": 6 * cell.n_params * tokens,
        "flops_6nd_non_embedding": 6 * cell.n_params_non_embedding * tokens,
        "unique_tokens": min(tokens, run.data.epoch_tokens),
        "epochs": tokens / run.data.epoch_tokens,
        "val_loss": state.val_loss,
        "val_loss_best": state.val_loss_best,
        "val_bpb": convert_to_bpb(state.val_loss, run.data.val_tokens, run.data.val_bytes),
        "train_loss": state.train_loss,
        "metric_id": run.data.metric_id,
        "val_tokens_scored": run.data.val_tokens - 1,
        "data_content_id": run.what.data_content_id,
        "data_source": run.data.source,
        "tokenizer": run.data.tokenizer,
        "receipt": state.receipt,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "train_s": state.train_s,
        "tokens_per_s": tokens / state.train_s,
        "attempts": n_attempts,
        **describe_machine(ranks, run.how.engine),
        "finished_utc": utc_now(),
    }
    write_json(cell_dir / "summary.json", row)


def convert_to_bpb(val_loss: float, val_tokens: int, val_bytes: int) -> float:
    """Return bits per byte of text from nats per token.

    Note: the first token, which is not scored, is taken to cost the mean.
    """
    return val_loss * val_tokens / val_bytes / math.log(2.0)
