"""Measure a few steps of each size on this machine, for a forecast that does not rest on data sheets."""

import statistics
import time
from dataclasses import replace

import torch

from harness.allocator import keep_freed_memory
from harness.cost import Measured, SizeKey, key_of
from harness.distributed import Ranks, join_ranks
from harness.engine import open_engine
from harness.records import Plan, RunRecord

WARM_UP, MIN_STEPS, MAX_STEPS, ENOUGH_S = 2, 5, 40, 2.0


def probe_sizes(plan: Plan, n_threads: int = 1) -> dict[SizeKey, Measured]:
    """Time micro-steps and updates of each size of a plan, one rank's share of them, on made-up tokens.

    Note: on a CPU with as many threads as a run will have; launch/clusters/local.toml gives each one.
    """
    runs = {key_of(run): run for run in plan.runs}
    ranks = replace(join_ranks(plan.runs[0].how.engine.device), world_size=1)
    if ranks.device.type == "cpu":
        torch.set_num_threads(n_threads)
        keep_freed_memory()
    return {key: probe_run(run, ranks) for key, run in runs.items()}


def probe_run(run: RunRecord, ranks: Ranks) -> Measured:
    """Time one size; the median of its steps after two to warm up."""
    model, engine = run.what.model, open_engine(run, ranks)
    world_size = run.how.engine.world_size or 1
    micro_batch_size = run.how.engine.micro_batch_size or run.what.optim.global_batch_size // world_size
    ids = torch.randint(model.vocab_size, (micro_batch_size, model.seq_len + 1), device=ranks.device)
    micro_s, update_s, begun = [], [], time.perf_counter()
    for step in range(WARM_UP + MAX_STEPS):
        started = time.perf_counter()
        engine.backward(ids[:, :-1], ids[:, 1:], micro_step=0, n_micro_steps=1)
        synchronise(ranks)
        between = time.perf_counter()
        float(engine.clip())
        engine.step(run.what.optim.lr)
        synchronise(ranks)
        if step >= WARM_UP:
            micro_s.append(between - started)
            update_s.append(time.perf_counter() - between)
        if len(micro_s) >= MIN_STEPS and time.perf_counter() - begun > ENOUGH_S:
            break
    return Measured(statistics.median(micro_s), statistics.median(update_s))


def synchronise(ranks: Ranks) -> None:
    """Wait until the device has done what it was told."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
