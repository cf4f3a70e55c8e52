"""The full deterministic pass over the validation split: every token but the first is scored exactly once."""

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.shards import TokenShards
from harness.checkpoint import TrainState
from harness.config import ConfigError
from harness.engine import Engine
from harness.metrics import MetricsWriter, convert_to_bpb
from harness.records import CellRecord, RunRecord

PROBE_WINDOWS = 8
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative; another device or number of ranks rounds otherwise
MAX_LOGITS = 2**27  # held at a time: half a GiB in float32


def is_evaluation_due(run: RunRecord, step: int) -> bool:
    """Say whether the step from `step` to `step + 1` crossed a multiple of eval.every_tokens."""
    every, per_step = run.how.eval.every_tokens, run.tokens_per_step
    return every is not None and (step + 1) * per_step // every > step * per_step // every


def evaluate_state(
    engine: Engine,
    val: TokenShards,
    run: RunRecord,
    cell: CellRecord | None,
    state: TrainState,
    metrics: MetricsWriter,
) -> TrainState:
    """Score the whole validation split, write a row, and return the state with the newest and the best loss."""
    started, what = time.perf_counter(), run.what
    val_loss = evaluate(engine, val, seq_len=what.model.seq_len, stride=what.eval_stride, batch_size=run.how.eval.batch_size)
    tokens = state.step * run.tokens_per_step
    metrics.write(
        "eval",
        cell.cell_id if cell is not None and cell.n_cooldown_steps else None,
        step=state.step,
        tokens=tokens,
        flops=tokens * run.cells[0].flops_per_token,
        val_loss=val_loss,
        val_bpb=convert_to_bpb(val_loss, run.data.val_tokens, run.data.val_bytes),
        eval_s=time.perf_counter() - started,
    )
    best = val_loss if state.val_loss_best is None else min(val_loss, state.val_loss_best)
    return replace(state, val_loss=val_loss, val_loss_best=best)


def evaluate(engine: Engine, val: TokenShards, *, seq_len: int, stride: int, batch_size: int) -> float:
    """Return the mean loss over the validation split.

    Windows begin every `stride` tokens; each scores the targets that the one before did not, so with stride < seq_len
    every target behind the first window has at least seq_len - stride tokens of context. The last window may be shorter.

    Units: nats per token, summed in float64.
    """
    starts = np.arange(0, max(1, val.n_tokens - 1 - seq_len + stride), stride, dtype=np.int64)
    starts = starts[starts + 1 < val.n_tokens]
    whole = starts[starts + seq_len + 1 <= val.n_tokens]
    shares = np.array_split(np.arange(0, len(whole), batch_size), engine.ranks.world_size)
    mine, total = shares[engine.ranks.rank].tolist(), 0.0
    engine.model.eval()
    with torch.no_grad():
        for turn, another in enumerate(shares[0].tolist()):  # the longest share
            first = mine[turn] if turn < len(mine) else another  # as many forward passes on every rank: ZeRO-3 gathers in each
            windows = torch.from_numpy(val.gather(whole[first : first + batch_size], seq_len + 1)).to(engine.ranks.device)
            losses = score_windows(engine, windows)
            if turn >= len(mine):
                break
            if first == 0:  # the very first window scores all of its targets
                total += losses[0, : seq_len - stride].double().sum().item()
            total += losses[:, seq_len - stride :].double().sum().item()
        tail = score_tail(engine, val, starts, whole, seq_len, stride)
        if engine.ranks.rank == engine.ranks.world_size - 1:
            total += tail
    engine.model.train()
    return float(engine.ranks.sum(np.array([total]))[0]) / (val.n_tokens - 1)


def score_probe(engine: Engine, val: TokenShards, run: RunRecord) -> float | None:
    """Return the loss on the first few validation windows, None where it is not finite.

    It goes into each checkpoint, and the weights that are loaded from there must give it again.
    """
    seq_len = run.what.model.seq_len
    starts = np.arange(min(PROBE_WINDOWS, (val.n_tokens - 1) // seq_len), dtype=np.int64) * seq_len
    engine.model.eval()
    with torch.no_grad():
        windows = torch.from_numpy(val.gather(starts, seq_len + 1)).to(engine.ranks.device)
        loss = score_windows(engine, windows).double().mean().item()
    engine.model.train()
    return loss if math.isfinite(loss) else None


def check_probe(checkpoint: Path, loss: float | None, stored: float | None, run: RunRecord) -> None:
    """Refuse weights that do not give the loss which the checkpoint's writer saw.

    Raises:
        ConfigError: they do not; they were loaded wrongly, or belong to another model.
    """
    tolerance = PROBE_TOLERANCE["fp32" if run.what.precision == "fp32" else "bf16"]
    if loss != stored and (loss is None or stored is None or abs(loss - stored) > tolerance * abs(stored)):
        raise ConfigError(
            f"{checkpoint}: probe_loss={stored}, the loaded weights give {loss}; move this one away to go on from an older"
        )


def score_windows(engine: Engine, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss at every target, a few windows at a time where the vocabulary is large. Shapes: (n, T + 1) -> (n, T)."""
    n_logits = (windows.shape[1] - 1) * engine.model.config.vocab_size  # of one window
    return torch.cat([score_part(engine, part) for part in torch.split(windows, max(1, MAX_LOGITS // n_logits))])


def score_part(engine: Engine, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss at every target of some windows."""
    with engine.autocast():
        logits, _ = engine.model(windows[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1)


def score_tail(engine: Engine, val: TokenShards, starts: np.ndarray, whole: np.ndarray, seq_len: int, stride: int) -> float:
    """Return the summed loss of the targets behind the last whole window."""
    if len(starts) == len(whole):
        return 0.0
    start = int(starts[len(whole)])
    scored_to = int(whole[-1]) + seq_len if len(whole) else 0  # the last target scored so far
    window = torch.from_numpy(val.read(start, val.n_tokens).astype(np.int64))[None].to(engine.ranks.device)
    return score_windows(engine, window)[0, scored_to - start :].double().sum().item()
