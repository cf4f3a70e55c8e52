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
from harness.attempt import Attempt, claim_attempt, write_attempt
from harness.batches import Batches, chain_receipt, open_data
from harness.checkpoint import (
    Origin,
    TrainState,
    describe_origin,
    find_folder,
    find_on_the_way,
    prune_checkpoints,
    publish_checkpoint,
    remove_checkpoints,
    staged_result,
    take_over,
)
from harness.config import ConfigError, run_command_line
from harness.console import count_steps_left
from harness.devices import Devices, open_devices
from harness.distributed import Ranks, describe_machine, join_ranks
from harness.ending import DivergedError, StoppedError, write_outcome
from harness.engine import Engine, open_engine, seed_step
from harness.evaluate import check_probe, evaluate_state, is_evaluation_due, score_probe
from harness.health import judge_step
from harness.metrics import MetricsWriter, StepWindow, write_summary
from harness.records import CellRecord, RunRecord
from harness.runs import find_cell_dir, list_pending_cells, load_run
from harness.schedule import compute_lr
from harness.wandb_mirror import start_mirror


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
    attempt: Attempt
    origin: Origin
    devices: Devices
    counted_to: float = field(default_factory=time.monotonic)  # the moment up to which state.wall_s has counted
    allow_reshape: bool = False
    state: TrainState = field(default_factory=TrainState)
    last_save: float = field(default_factory=time.monotonic)
    agreed_at: float = field(default_factory=time.perf_counter)  # from here to a step's last batch a rank waits for no other


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
    window = StepWindow(t.run, cell, t.devices, t.metrics)
    t.metrics.expect(count_steps_left(list_pending_cells(t.run_dir, t.run), cell, t.state.step))
    for step in range(t.state.step, end_step):
        window.begin_step()
        lr = compute_lr(step, what.optim.lr, what.schedule, what.n_steps, cell)
        seed_step(what.seed, step, t.ranks.rank)
        loss = torch.zeros((), device=t.ranks.device)
        for micro_step in range(n_micro_steps):
            window.lap("compute")
            ids, targets = t.batches.batch(step, micro_step)
            window.lap("data")
            loss += t.engine.backward(ids, targets, micro_step=micro_step, n_micro_steps=n_micro_steps)
        grad_norm, own_loss = float(t.engine.clip()), float(loss)  # waits for the device, once a step
        window.lap("compute")
        mean_loss, is_finite, stop_now, save_now, limbs = agree(t, own_loss, grad_norm)
        window.lap("agree")
        t.state, is_sound = judge_step(t.state, mean_loss, is_finite, t.run)
        if is_sound:
            t.engine.step(lr)
        else:
            t.engine.skip()

        seconds = window.end_step()
        t.state = replace(
            t.state,
            step=step + 1,
            receipt=chain_receipt(t.state.receipt, step, limbs),
            train_s=t.state.train_s + seconds,
        )
        window.show(t.state)
        if step == 0 or (step + 1) % t.run.how.track.log_every_steps == 0 or step + 1 == end_step:
            window.write(t.state, lr, grad_norm)
        if is_evaluation_due(t.run, step) or step + 1 == end_step:
            score(t, cell)
        if stop_now or save_now:
            save(t, cell)
        if stop_now:
            raise StoppedError(t.attempt.stop.reason or "another rank was asked to stop")


def agree(t: Training, loss: float, grad_norm: float) -> tuple[float, bool, bool, bool, np.ndarray]:
    """Return what all ranks hold in common: mean loss, whether all is finite, to stop, to save, and the step's data digest."""
    t.attempt.heart.beat("step", t.state.step, t.batches.last_given - t.agreed_at)
    is_save_due = t.ranks.rank == 0 and time.monotonic() - t.last_save >= t.run.how.engine.checkpoint_every_s
    mine = np.array([loss, not math.isfinite(loss + grad_norm), t.attempt.stop.look(), is_save_due], dtype=np.float64)
    total = t.ranks.sum(np.concatenate([mine, t.batches.read_digest()]))
    t.agreed_at = time.perf_counter()
    return float(total[0]) / t.ranks.world_size, not total[1], bool(total[2]), bool(total[3]), total[4:]


def score(t: Training, cell: CellRecord | None) -> None:
    """Score the whole validation split."""
    t.attempt.heart.beat("evaluate", t.state.step)
    t.state = evaluate_state(t.engine, t.val, t.run, cell, t.state, t.metrics)


def finish_cell(t: Training, cell: CellRecord) -> None:
    """Write a cell's weights and then its row, which says done. The last step was evaluated as the segment's end."""
    if t.state.val_loss is None or not math.isfinite(t.state.val_loss):
        raise DivergedError(f"validation loss {t.state.val_loss} at step {t.state.step}, not finite")
    count_wall(t)
    cell_dir, model = find_cell_dir(t.run_dir, cell), t.engine.whole_model()

    def publish() -> None:
        with staged_result(cell_dir, t.attempt.folder) as staging:
            write_summary(staging, t.run, cell, t.state, model, t.ranks, t.devices, t.origin.attempt)
        remove_checkpoints(cell_dir / "checkpoints")

    t.ranks.decide(publish)


def save(t: Training, cell: CellRecord | None) -> None:
    """Publish a checkpoint of the trunk or of a cell's cooldown, and drop those that are not needed any more."""
    count_wall(t)
    t.attempt.heart.beat("save", t.state.step)
    folder, probe_loss = find_folder(t.run_dir, cell), score_probe(t.engine, t.val, t.run)
    publish_checkpoint(folder, t.attempt.folder, t.ranks, t.engine, t.state, t.origin, probe_loss)
    t.ranks.decide(lambda: prune_checkpoints(t.run_dir, t.run, folder))
    t.last_save = time.monotonic()


def count_wall(t: Training) -> None:
    """Bring the seconds of the path from step 0 up to now; what an attempt did after its last save is lost with it."""
    now = time.monotonic()
    passed, t.counted_to = now - t.counted_to, now
    t.state = replace(t.state, wall_s=t.state.wall_s + passed, device_s=t.state.device_s + passed * t.ranks.world_size)


def restore(t: Training, cell: CellRecord) -> None:
    """Go to the newest valid checkpoint on the way to a cell, which rank 0 chooses; else to step 0."""
    found = t.ranks.decide(lambda: find_on_the_way(t.run_dir, cell))
    if found is not None:
        t.state, probe_loss = take_over(found, t.engine, t.ranks, t.origin, t.allow_reshape)
        check_probe(found, score_probe(t.engine, t.val, t.run), probe_loss, t.run)
        t.metrics.note(f"from checkpoint {found.relative_to(t.run_dir)}")
    elif t.state.step:  # the weights are another segment's
        t.state, t.engine = TrainState(), open_engine(t.run, t.ranks)


def run_attempt(
    run_dir: Path,
    attempt_dir: Path | None,
    parent_pid: int | None,
    micro_batch_size: int | None = None,
    allow_reshape: bool = False,
) -> int:
    """Train a run to its end, or as far as it goes; record how it ended and return the exit status."""
    run, started = load_run(run_dir), time.monotonic()
    if micro_batch_size is not None:
        run = run.with_engine(micro_batch_size=micro_batch_size)
    try:
        ranks = join_ranks(run.how.engine.device, run.how.engine.world_size)
    except ConfigError as error:
        if attempt_dir is not None:  # whoever claimed it is to hear why
            write_outcome(attempt_dir, "failed", str(error), None, "config")
        raise
    if ranks.device.type == "cpu":
        keep_freed_memory()
    folder = ranks.decide(lambda: attempt_dir or claim_attempt(run_dir))
    hang_after_s, mirror = run.how.engine.hang_after_s, None
    with Attempt.joined(folder, ranks.rank, ranks.world_size, hang_after_s, parent_pid) as attempt, attempt.ending:
        mirror = start_mirror(run, run_dir, attempt.folder) if ranks.rank == 0 else None
        train_opened(run, run_dir, ranks, attempt, started, allow_reshape)
    if attempt.ending.status == 0:  # else some rank may be gone, and parting would wait for it
        ranks.close()
    if mirror is not None:
        mirror.close()
    return attempt.ending.status


def train_opened(run: RunRecord, run_dir: Path, ranks: Ranks, attempt: Attempt, started: float, allow_reshape: bool) -> None:
    """Open data, model and record, and train; all of it is let go again before the ranks part."""
    attempt.heart.beat("start", 0)
    origin = describe_origin(run, ranks, attempt.number)
    facts = {**describe_machine(ranks, run.how.engine), "micro_batch_size": run.how.engine.micro_batch_size}
    ranks.decide(lambda: write_attempt(attempt.folder, facts))
    val, batches = ranks.together(lambda: open_data(run, ranks))
    engine = open_engine(run, ranks)
    with MetricsWriter(attempt.folder if ranks.rank == 0 else None) as metrics:
        devices = open_devices(ranks, run.what.precision)
        t = Training(run, run_dir, ranks, batches, val, engine, metrics, attempt, origin, devices, started, allow_reshape)
        attempt.ending.watch(lambda: t.state.step)
        train_run(t)


def main() -> None:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser(prog="python -m harness.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="runs/<experiment>/<run_id>, as the plan wrote it")
    parser.add_argument("--attempt-dir", type=Path, help="the attempt's folder, where the caller has claimed one")
    parser.add_argument("--parent-pid", type=int, help="stop cleanly when this process, the caller, is gone")
    parser.add_argument("--micro-batch-size", type=int, help="sequences per rank and micro-step, instead of the plan's")
    parser.add_argument("--allow-reshape", action="store_true", help="cut ZeRO's parts anew for another number of ranks")
    arguments = parser.parse_args()
    sys.exit(run_attempt(**vars(arguments)))


if __name__ == "__main__":
    run_command_line(main)
