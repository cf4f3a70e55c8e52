"""Speed of a cell on this machine: over engines, precisions, compilation and micro-batches, and several at a time.

Each variant is a process of its own with the real data; they take blocks of steps in turn, so that whatever else the
machine does meets all of them. A step here is the loop's without its rows: batch, forward, backward, clip, update.
"""

import contextlib
import io
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.allocator import keep_freed_memory
from harness.attempt import Attempt, claim_attempt
from harness.batches import Batches, open_data
from harness.checkpoint import describe_origin
from harness.config import ConfigError
from harness.devices import Devices, open_devices
from harness.distributed import Ranks, join_ranks, read_device_name
from harness.engine import Engine, open_engine
from harness.metrics import MetricsWriter
from harness.records import RunRecord

BLOCK_S = 0.5  # a block has as many steps as fill this, at least one
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Variant:
    """One way to train the same cell: `zeroN` is DeepSpeed at that stage."""

    engine: str
    precision: str
    compile: bool

    def apply(self, run: RunRecord) -> RunRecord:
        """Return the run trained this way."""
        changes: dict[str, object] = {"compile": self.compile, "kind": "torch"}
        if self.engine != "torch":
            changes |= {"kind": "deepspeed", "zero_stage": int(self.engine.removeprefix("zero"))}
        what = run.what.model_copy(update={"precision": self.precision})
        return run.with_engine(**changes).model_copy(update={"what": what})


@dataclass(frozen=True)
class Block:
    """What a worker answers for a block of steps; no seconds where it ran out of memory."""

    seconds: float | None
    memory_peak_bytes: int | None


@dataclass(frozen=True)
class Failure:
    """Why a worker cannot answer."""

    reason: str


class Worker:
    """A variant in its process, taking steps when asked to."""

    def __init__(self, run: RunRecord, n_threads: int, pipe: Connection) -> None:
        torch.set_num_threads(n_threads)
        self.run, self.pipe, self.step = run, pipe, 0
        self.ranks = join_ranks(run.how.engine.device)
        if self.ranks.device.type == "cpu":
            keep_freed_memory()
        self.devices: Devices = open_devices(self.ranks, run.what.precision)
        self.engine: Engine = open_engine(run, self.ranks)
        self.batches: dict[int, Batches] = {}

    def take(self, micro_batch_size: int, n_steps: int) -> Block:
        """Take a block of steps at a micro-batch; the global batch stays what it is."""
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)
        if micro_batch_size not in self.batches:
            self.batches[micro_batch_size] = open_data(self.run.with_engine(micro_batch_size=micro_batch_size), self.ranks)[1]
        started = time.perf_counter()
        try:
            for _ in range(n_steps):
                take_step(self.engine, self.batches[micro_batch_size], self.step, self.run.what.optim.lr)
                self.step += 1
            self.wait()
        except (MemoryError, torch.OutOfMemoryError):
            self.engine.skip()
            torch.cuda.empty_cache()
            return Block(None, None)
        return Block(time.perf_counter() - started, self.devices.read_memory_peak())

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def profile(self, micro_batch_size: int, n_steps: int) -> str:
        """Return where the time of some steps goes, the costliest operations first."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.ranks.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            self.take(micro_batch_size, n_steps)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return str(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))

    def serve(self) -> None:
        """Answer until told to end: first the peak of the device, then a block for every request."""
        self.pipe.send(self.devices.peak_flops_per_s)
        while (request := self.pipe.recv()) is not None:
            kind, *arguments = request
            self.pipe.send(self.profile(*arguments) if kind == "profile" else self.take(*arguments))


def take_step(engine: Engine, batches: Batches, step: int, lr: float) -> Tensor:
    """Take one optimiser step as the loop does; return the loss."""
    loss = torch.zeros((), device=batches.device)
    for micro_step in range(batches.n_micro_steps):
        ids, targets = batches.batch(step, micro_step)
        loss += engine.backward(ids, targets, micro_step=micro_step, n_micro_steps=batches.n_micro_steps)
    float(engine.clip())  # the loop waits for the device here, once a step
    engine.step(lr)
    batches.read_digest()
    return loss


def serve_worker(run: RunRecord, n_threads: int, pipe: Connection) -> None:
    """Run a worker; what goes wrong is sent instead of an answer."""
    try:
        Worker(run, n_threads, pipe).serve()
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        if not isinstance(error, ConfigError | NotImplementedError):
            traceback.print_exc()


@dataclass
class Side:
    """A worker seen from here."""

    variant: Variant
    pipe: Connection
    process: Any
    peak_flops_per_s: float | None = None

    def ask(self, *request: object) -> Any:  # noqa: ANN401 - a block or a text
        """Have the worker do something and return its answer."""
        self.pipe.send(request)
        return self.hear()

    def hear(self) -> Any:  # noqa: ANN401 - a block, a text or a peak
        """Wait for an answer.

        Raises:
            ConfigError: the variant cannot run here.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = Failure("its process ended")
        if isinstance(answer, Failure):
            raise ConfigError(f"{self.variant}: cannot be timed ({answer.reason}); leave it out")
        return answer

    def close(self) -> None:
        """End the worker."""
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(30)
        self.process.kill()


def open_side(run: RunRecord, variant: Variant, n_threads: int) -> Side:
    """Start a worker and wait until it is ready."""
    context = get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=serve_worker, args=(variant.apply(run), n_threads, far_end), daemon=True)
    process.start()
    far_end.close()
    side = Side(variant, pipe, process)
    side.peak_flops_per_s = side.hear()
    return side


@dataclass
class Row:
    """One variant at one micro-batch: tokens per second of each block."""

    variant: Variant
    micro_batch_size: int
    n_cells: int = 1
    speeds: list[float] = field(default_factory=list)
    mfu: float | None = None
    memory_peak_bytes: int | None = None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Median between the quartiles of the blocks."""
        low, median, high = statistics.quantiles(self.speeds, n=4)
        return low, median, high


def bench_cell(
    run: RunRecord, variants: Sequence[Variant], micro_batches: Sequence[int], *, n_blocks: int, n_threads: int
) -> list[Row]:
    """Time every variant at every micro-batch, block by block in turn; what runs out of memory has no speeds."""
    sides = [open_side(run, variant, n_threads) for variant in variants]
    try:
        pairs = [(side, Row(side.variant, size)) for size in sorted(micro_batches) for side in sides]
        n_steps = {id(row): warm_up(side, row) for side, row in pairs}  # upwards, so that a peak is this micro-batch's
        pairs = [(side, row) for side, row in pairs if n_steps[id(row)]]
        for block in range(n_blocks):
            for side, row in pairs if block % 2 else reversed(pairs):
                answer: Block = side.ask("block", row.micro_batch_size, n_steps[id(row)])
                if answer.seconds is not None:
                    row.speeds.append(n_steps[id(row)] * run.tokens_per_step / answer.seconds)
        return [finish_row(side, row, run) for side, row in pairs if len(row.speeds) > 1]
    finally:
        for side in sides:
            side.close()


def warm_up(side: Side, row: Row) -> int:
    """Take a first step, which compiles and allocates, and a second; return how many make a block, 0 out of memory."""
    for _ in range(2):
        answer: Block = side.ask("block", row.micro_batch_size, 1)
        if answer.seconds is None:
            return 0
    row.memory_peak_bytes = answer.memory_peak_bytes
    return max(1, round(BLOCK_S / (answer.seconds or BLOCK_S)))


def finish_row(side: Side, row: Row, run: RunRecord) -> Row:
    """Add what follows from the speeds."""
    if side.peak_flops_per_s is not None:
        row.mfu = statistics.median(row.speeds) * run.cells[0].flops_per_token / side.peak_flops_per_s
    return row


def bench_sharing(run: RunRecord, variant: Variant, micro_batch_size: int, counts: Sequence[int], n_blocks: int) -> list[Row]:
    """Time several processes of one cell at a time, one thread each: the speed is that of all together."""
    sides = [open_side(run, variant, 1) for _ in range(max(counts))]
    try:
        rows = [Row(variant, micro_batch_size, n_cells=count) for count in counts]
        n_steps = min([warm_up(side, rows[0]) for side in sides])
        if not n_steps:
            raise ConfigError(f"{max(counts)} cells at a time do not fit this device; use fewer")
        for _ in range(n_blocks):
            for row in rows:
                started = time.perf_counter()
                for side in sides[: row.n_cells]:
                    side.pipe.send(("block", micro_batch_size, n_steps))
                blocks = [side.hear() for side in sides[: row.n_cells]]
                seconds = time.perf_counter() - started
                row.speeds.append(row.n_cells * n_steps * run.tokens_per_step / seconds)
                row.memory_peak_bytes = max(block.memory_peak_bytes or 0 for block in blocks) or None
        return [finish_row(sides[0], row, run) for row in rows]
    finally:
        for side in sides:
            side.close()


def list_micro_batches(run: RunRecord) -> list[int]:
    """Return the micro-batches that a search tries: the global batch halved, and halved again."""
    sizes = [run.what.optim.global_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def describe_row(run: RunRecord, row: Row, n_threads: int) -> dict[str, Any]:
    """Return a row as a mapping, for a file of rows."""
    device = torch.device("cuda" if torch.cuda.is_available() and run.how.engine.device != "cpu" else "cpu")
    low, median, high = row.quartiles
    return {
        "size": run.size,
        "vocab_size": run.what.model.vocab_size,
        "seq_len": run.what.model.seq_len,
        "global_batch_size": run.what.optim.global_batch_size,
        "engine": row.variant.engine,
        "precision": row.variant.precision,
        "compile": row.variant.compile,
        "micro_batch_size": row.micro_batch_size,
        "n_cells": row.n_cells,
        "n_blocks": len(row.speeds),
        "tokens_per_s": median,
        "tokens_per_s_quartiles": [low, high],
        "mfu": row.mfu,
        "memory_peak_bytes": row.memory_peak_bytes,
        "device_name": read_device_name(device),
        "n_threads": n_threads,
        "torch_version": torch.__version__,
    }


HEADER = "| engine | precision | compile | micro-batch | cells | tokens/s, median (quartiles) | beside the first | MFU | memory |"


def render_rows(rows: Sequence[Row]) -> str:
    """Write the rows as a table in Markdown."""
    lines = [HEADER, "|---" * 9 + "|"]
    first = statistics.median(rows[0].speeds)
    for row in rows:
        low, median, high = row.quartiles
        memory = "" if row.memory_peak_bytes is None else f"{row.memory_peak_bytes / 2**20:,.0f} MiB"
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        what = (
            f"{row.variant.engine} | {row.variant.precision} | {'yes' if row.variant.compile else 'no'} | {row.micro_batch_size}"
        )
        speed = f"{median:,.0f} ({low:,.0f} to {high:,.0f}) | {median / first:.2f}"
        lines.append(f"| {what} | {row.n_cells} | {speed} | {mfu} | {memory} |")
    return "\n".join(lines)


def probe_step(run: RunRecord, n_steps: int) -> float:
    """Return the median seconds of a step of this run as it is planned, with every thread that torch takes. Trains nothing."""
    ranks = join_ranks(run.how.engine.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    batches, engine = open_data(run, ranks)[1], open_engine(run, ranks)
    seconds = []
    for step in range(n_steps):
        started = time.perf_counter()
        take_step(engine, batches, step, run.what.optim.lr)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:] or seconds)


class EnoughStepsError(Exception):
    """The loop has been around often enough."""


class NullEngine:
    """An engine that does nothing, so that what is left of a step is the harness's own work."""

    def __init__(self, ranks: Ranks, n_steps: int) -> None:
        self.ranks, self.n_left, self.skipped_steps = ranks, n_steps, 0
        self.zero, self.one = torch.zeros(()), torch.ones(())

    def backward(self, _ids: Tensor, _targets: Tensor, *, micro_step: int, n_micro_steps: int) -> Tensor:
        """Return no loss."""
        return self.zero

    def clip(self) -> Tensor:
        """Return a norm."""
        return self.one

    def step(self, _lr: float) -> None:
        """Count."""
        self.n_left -= 1
        if self.n_left == 0:
            raise EnoughStepsError


def measure_own_work(run: RunRecord, n_steps: int) -> float:
    """Return the seconds that the loop itself takes for a step: batch, receipt, agreement, heartbeat, rows, progress."""
    from harness.train import Training, train_segment

    how = run.how.model_copy(update={"eval": run.how.eval.model_copy(update={"every_tokens": None})})
    run = run.model_copy(update={"how": how}).with_engine(checkpoint_every_s=1e9)
    ranks = Ranks(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        val, batches = open_data(run, ranks)
        attempt_dir = claim_attempt(Path(folder))
        with Attempt.joined(attempt_dir, 0, 1, 1e9, None) as attempt, MetricsWriter(attempt.folder) as metrics:
            origin, devices = describe_origin(run, ranks, 1), Devices(ranks.device, 1, 1e12, None)
            engine: Any = NullEngine(ranks, n_steps)
            t = Training(run, Path(folder), ranks, batches, val, engine, metrics, attempt, origin, devices)
            started = time.perf_counter()
            with contextlib.suppress(EnoughStepsError):
                train_segment(t, None, 10 * n_steps)
            return (time.perf_counter() - started) / n_steps
