"""The run's own record: one JSON object per line, appended by rank 0 as it happens, and one row per finished cell.

Nothing is ever read back out of a log.
"""

import hashlib
import json
import math
import os
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_model
from torch import nn

from harness.checkpoint import TrainState
from harness.console import Console
from harness.devices import Devices
from harness.distributed import Ranks, describe_machine
from harness.ending import utc_now
from harness.records import CellRecord, RunRecord
from harness.runs import write_json


class MetricsWriter:
    """Appends rows to an attempt's metrics.jsonl and shows them in short.

    Each row is one write, so that a kill tears the last one only. Ranks above 0 have no attempt folder and write nothing.
    """

    def __init__(self, attempt_dir: Path | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.descriptor = None if attempt_dir is None else os.open(attempt_dir / "metrics.jsonl", flags, 0o644)
        self.console = None if attempt_dir is None else Console()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None and self.console is not None:
            os.close(self.descriptor)
            self.console.close()

    def write(self, kind: str, cell_id: str | None, **values: Any) -> None:  # noqa: ANN401 - numbers and strings
        """Append a row; a number that is not finite becomes null."""
        if self.descriptor is None or self.console is None:
            return
        row = {"kind": kind, "cell_id": cell_id, **{key: drop_non_finite(value) for key, value in values.items()}}
        os.write(self.descriptor, json.dumps(row, allow_nan=False).encode() + b"\n")
        self.console.show(row)

    def expect(self, n_steps: int) -> None:
        """Learn how many steps are left to do."""
        if self.console is not None:
            self.console.expect(n_steps)

    def note(self, line: str) -> None:
        """Write a line for people."""
        if self.console is not None:
            self.console.note(line)


PHASES = ("data", "compute", "agree")


class StepWindow:
    """The steps of a segment since the last written row: how long they took, and in which phase."""

    def __init__(self, run: RunRecord, cell: CellRecord | None, devices: Devices, metrics: MetricsWriter) -> None:
        self.run, self.devices, self.metrics = run, devices, metrics
        self.cell_id = cell.cell_id if cell is not None and cell.n_cooldown_steps else None
        self.phases, self.n_steps = dict.fromkeys(PHASES, 0.0), 0
        self.began = self.last_lap = time.perf_counter()

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self.began = self.last_lap = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Put the time since the last lap down to a phase."""
        now = time.perf_counter()
        self.phases[phase] += now - self.last_lap
        self.last_lap = now

    def end_step(self) -> float:
        """Count the step; return its seconds.

        Note: on CUDA the end of a step's work is seen when the next one reads its loss, so only means over steps count.
        """
        self.lap("compute")
        self.n_steps += 1
        return self.last_lap - self.began

    def show(self, state: TrainState) -> None:
        """Let the people see the newest step."""
        console, loss = self.metrics.console, state.train_loss
        if console is not None and loss is not None:
            flops_per_token = self.run.cells[0].flops_per_token
            console.tick(state.step, loss, self.run.tokens_per_step, flops_per_token, self.devices.peak_flops_per_s)

    def write(self, state: TrainState, lr: float, grad_norm: float) -> None:
        """Write one training row, times as means over the window, and begin the next window."""
        per_step, batch = self.run.tokens_per_step, self.run.what.optim.global_batch_size
        flops_per_token = self.run.cells[0].flops_per_token
        seconds, n_steps = sum(self.phases.values()), self.n_steps
        tokens_per_s = n_steps * per_step / seconds
        agree_s = self.phases["agree"] / n_steps if self.devices.world_size > 1 else None  # alone there is nobody to wait for
        self.metrics.write(
            "train",
            self.cell_id,
            step=state.step,
            tokens=state.step * per_step,
            flops=state.step * per_step * flops_per_token,
            train_loss=state.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped_steps=state.skipped_steps,
            step_s=seconds / n_steps,
            data_s=self.phases["data"] / n_steps,
            compute_s=(seconds - self.phases["data"]) / n_steps - (agree_s or 0.0),
            agree_s=agree_s,
            tokens_per_s=tokens_per_s,
            mfu=self.devices.compute_mfu(tokens_per_s * flops_per_token),
            memory_peak_bytes=self.devices.read_memory_peak(),
            sample_start=(state.step - n_steps) * batch,
            sample_end=state.step * batch,
            receipt=state.receipt,
        )
        self.phases, self.n_steps = dict.fromkeys(PHASES, 0.0), 0


def drop_non_finite(value: Any) -> Any:  # noqa: ANN401 - numbers and strings
    """Return None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(
    cell_dir: Path,
    run: RunRecord,
    cell: CellRecord,
    state: TrainState,
    model: nn.Module,
    ranks: Ranks,
    devices: Devices,
    n_attempts: int,
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
        "mfu": devices.compute_mfu(tokens * cell.flops_per_token / state.train_s),
        "peak_flops_per_s": devices.peak_flops_per_s,
        "peak_source": devices.peak_source,
        "memory_peak_bytes": devices.read_memory_peak(),
        "wall_s": state.wall_s,
        "device_s": state.device_s,
        "attempts": n_attempts,
        **describe_machine(ranks, run.how.engine),
        **describe_extras(run),
        "finished_utc": utc_now(),
    }
    write_json(cell_dir / "summary.json", row)


def describe_extras(run: RunRecord) -> dict[str, str | None]:
    """Return the versions of what not every run uses, None where this one does not."""
    return {
        "deepspeed_version": version("deepspeed") if run.how.engine.kind == "deepspeed" else None,
        "cuda_version": torch.version.cuda if torch.cuda.is_available() else None,
        "wandb_version": version("wandb") if run.how.track.wandb != "off" and find_spec("wandb") else None,
    }


def convert_to_bpb(val_loss: float, val_tokens: int, val_bytes: int) -> float:
    """Return bits per byte of text from nats per token.

    Note: the first token, which is not scored, is taken to cost the mean.
    """
    return val_loss * val_tokens / val_bytes / math.log(2.0)
