"""Train one run: `python -m harness.train <run dir>`, alone or under torchrun. This is the page to read first.

A run is a trunk and its cells: for each unfinished cell, train the trunk to the cell's branch point, then the cell's
cooldown, evaluate, and write its row. A schedule without cooldown is a trunk whose only cell branches off at its last step.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data_prep.shards import TokenShards
from harness.allocator import keep_freed_memory
from harness.attempt import DivergedError, Ending, StoppedError, StopWish, claim_attempt, write_attempt
from harness.batches import Batches, chain_receipt, open_data
from harness.checkpoint import TrainState, find_on_the_way, load_checkpoint, publish_checkpoint, remove_checkpoints
from harness.config import run_command_line
from harness.distributed import Ranks, describe_machine, join_ranks
from harness.engine import Engine, TorchEngine, open_engine, seed_step
from harness.evaluate import evaluate_state, is_evaluation_due
from harness.metrics import MetricsWriter, StepWindow, write_summary
from harness.records import CellRecord, RunRecord
from harness.runs import find_cell_dir, list_pending_cells, load_run
from harness.schedule import compute_lr


@dataclass
class Training:
    """A run in training: the fixed parts, and the state that moves."""

    run: RunRecord
    run_dir: Path
    ranks: Ranks
    batches: Batches
    val: TokenShards
    engine: Engine
    metrics: MetricsWriter
    stop: StopWish
    state: TrainState = field(default_factory=TrainState)
    last_save: float = field(default_factory=time.monotonic)


def train_run(t: Training) -> None:
    """Train every unfinished cell of the run, shortest first."""
    for cell in list_pending_cells(t.run_dir, t.run):
        restore(t, cell)
        if t.state.step < cell.branch_step:
            train_segment(t, None, cell.branch_step)
        if t.state.step == cell.branch_step and cell.n_cooldown_steps:
            save(t, None)  # the branch point: the next cell, or a longer budget later, goes on from here
        train_segment(t, cell, cell.n_steps)
        finish_cell(t, cell)


def train_segment(t: Training, cell: CellRecord | None, end_step: int) -> None:
    """Take optimiser steps up to `end_step`: on the trunk (no cell), or in a cell's cooldown. This is the loop."""
    what, n_micro_steps = t.run.what, t.batches.n_micro_steps
    window = StepWindow(t.run, cell)
    for step in range(t.state.step, end_step):
        started = time.perf_counter()
        lr = compute_lr(step, what.optim.lr, what.schedule, what.n_steps, cell)
        seed_step(what.seed, step, t.ranks.rank)
        data_s, loss = 0.0, torch.zeros((), device=t.ranks.device)
        for micro_step in range(n_micro_steps):
            asked = time.perf_counter()
            ids, targets = t.batches.batch(step, micro_step)
            data_s += time.perf_counter() - asked
            loss += t.engine.backward(ids, targets, micro_step=micro_step, n_micro_steps=n_micro_steps)
        grad_norm = float(t.engine.clip())
        mean_loss, stop_now, save_now, limbs = agree(t, float(loss))
        if not math.isfinite(mean_loss + grad_norm):
            raise DivergedError(f"loss {mean_loss:g}, gradient norm {grad_norm:g} at step {step + 1}, not finite")
        t.engine.step(lr)

        seconds = time.perf_counter() - started
        t.state = replace(
            t.state,
            step=step + 1,
            receipt=chain_receipt(t.state.receipt, step, limbs),
            train_loss=mean_loss,
            train_s=t.state.train_s + seconds,
        )
        window.add(seconds, data_s)
        if step == 0 or (step + 1) % t.run.how.track.log_every_steps == 0 or step + 1 == end_step:
            window.write(t.metrics, t.state, lr, grad_norm)
        if is_evaluation_due(t.run, step) or step + 1 == end_step:
            t.state = evaluate_state(t.engine, t.val, t.run, cell, t.state, t.metrics)
        if stop_now or save_now:
            save(t, cell)
        if stop_now:
            raise StoppedError(t.stop.reason or "another rank was asked to stop")


def agree(t: Training, loss: float) -> tuple[float, bool, bool, np.ndarray]:
    """Return what all ranks hold in common: mean loss, whether to stop, whether to save, the step's data digest."""
    is_save_due = t.ranks.rank == 0 and time.monotonic() - t.last_save >= t.run.how.engine.checkpoint_every_s
    mine = np.array([loss, float(t.stop.look()), float(is_save_due)])
    total = t.ranks.sum(np.concatenate([mine, t.batches.read_digest()]))
    return float(total[0]) / t.ranks.world_size, bool(total[1]), bool(total[2]), total[3:]


def finish_cell(t: Training, cell: CellRecord) -> None:
    """Write a cell's weights and then its row, which says done. The last step was evaluated as the segment's end."""
    if t.state.val_loss is None or not math.isfinite(t.state.val_loss):
        raise DivergedError(f"validation loss {t.state.val_loss} at step {t.state.step}, not finite")
    model = t.engine.whole_model()
    if t.ranks.rank == 0:
        write_summary(find_cell_dir(t.run_dir, cell), t.run, cell, t.state, model, t.ranks, t.stop.attempt_number)
        remove_checkpoints(find_cell_dir(t.run_dir, cell) / "checkpoints")
    t.ranks.share("cell finished")


def save(t: Training, cell: CellRecord | None) -> None:
    """Publish a checkpoint of the trunk or of a cell's cooldown, from rank 0 while the others wait."""
    assert isinstance(t.engine, TorchEngine), "checkpoints go through write_state next"
    if t.ranks.rank == 0:
        publish_checkpoint(t.run_dir, t.run, cell, t.state, t.engine.state_dict())
    t.ranks.share("saved")
    t.last_save = time.monotonic()


def restore(t: Training, cell: CellRecord) -> None:
    """Go to the newest valid checkpoint on the way to a cell, which rank 0 chooses; else to step 0."""
    chosen = t.ranks.share(str(find_on_the_way(t.run_dir, cell) or "") if t.ranks.rank == 0 else "")
    if chosen:
        assert isinstance(t.engine, TorchEngine), "checkpoints go through read_state next"
        t.state, engine_state = load_checkpoint(Path(chosen), t.ranks.device)
        t.engine.load_state_dict(engine_state)
        t.metrics.note(f"from checkpoint {Path(chosen).relative_to(t.run_dir)}")
    elif t.state.step:  # the weights are another segment's
        t.state, t.engine = TrainState(), open_engine(t.run, t.ranks)


def run_attempt(run_dir: Path, attempt_dir: Path | None, parent_pid: int | None) -> int:
    """Train a run to its end, or as far as it goes; record how it ended and return the exit status."""
    run = load_run(run_dir)
    ranks = join_ranks(run.how.engine.device, run.how.engine.world_size)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if ranks.rank == 0:
        attempt_dir = attempt_dir or claim_attempt(run_dir)
        write_attempt(attempt_dir, describe_machine(ranks, run.how.engine))
    stop = StopWish(attempt_dir, parent_pid) if ranks.rank == 0 else StopWish()
    with stop.listening(), Ending(stop.attempt_dir) as ending:
        train_opened(run, run_dir, ranks, stop, ending)
    ranks.close()
    return ending.status


def train_opened(run: RunRecord, run_dir: Path, ranks: Ranks, stop: StopWish, ending: Ending) -> None:
    """Open data, model and record, and train; all of it is let go again before the ranks part."""
    val, batches = open_data(run, ranks)
    engine = open_engine(run, ranks)
    with MetricsWriter(stop.attempt_dir) as metrics:
        t = Training(run, run_dir, ranks, batches, val, engine, metrics, stop)
        ending.watch(lambda: t.state.step)
        train_run(t)


def main() -> None:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser(prog="python -m harness.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="runs/<experiment>/<run_id>, as the plan wrote it")
    parser.add_argument("--attempt-dir", type=Path, help="the attempt's folder, where the caller has claimed one")
    parser.add_argument("--parent-pid", type=int, help="stop cleanly when this process, the caller, is gone")
    arguments = parser.parse_args()
    sys.exit(run_attempt(arguments.run_dir, arguments.attempt_dir, arguments.parent_pid))


if __name__ == "__main__":
    run_command_line(main)
