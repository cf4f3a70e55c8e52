"""What `harness bench` prints: the choice of what to time, the tables, and rows for a file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.bench import SHAPES, compare_speed, render_comparison
from harness.bench_cells import (
    ENGINES,
    Row,
    Variant,
    bench_cell,
    bench_sharing,
    describe_row,
    list_micro_batches,
    measure_own_work,
    open_side,
    probe_step,
    render_rows,
)
from harness.bench_trainer import BLOCK_STEPS, Setting, compare_trainers, render_trainers
from harness.config import ConfigError
from harness.console import count_steps_left, format_seconds
from harness.plan import check_micro_batch
from harness.records import Plan, RunRecord
from harness.runs import find_experiment_dir, iter_metrics, list_pending_cells

PRECISIONS = ("fp32", "bf16_autocast", "bf16_native")
N_PROBE_STEPS, N_OWN_STEPS = 20, 2000


@dataclass(frozen=True)
class Choice:
    """What to time, as it was typed; empty is the experiment's own."""

    size: str | None
    engines: str
    precisions: str
    compile: str
    micro_batches: str
    share: str

    def list_variants(self, run: RunRecord) -> list[Variant]:
        """Return the combinations that make sense."""
        how = run.how.engine
        own = how.kind if how.kind == "torch" else f"zero{how.zero_stage}"
        engines = read_names("--engines", self.engines or own, ENGINES)
        precisions = read_names("--precisions", self.precisions or run.what.precision, PRECISIONS)
        flags = {"off": [False], "on": [True], "both": [False, True]}.get(self.compile)
        if flags is None:
            raise ConfigError(f"--compile={self.compile}, is not one; use off, on or both")
        combined = [Variant(engine, precision, flag) for engine in engines for precision in precisions for flag in flags]
        sound = [one for one in combined if one.precision != "bf16_native" or one.engine in ("zero1", "zero2", "zero3")]
        if not sound:
            raise ConfigError("--precisions=bf16_native, takes --engines of zero1, zero2 or zero3")
        return sound

    def list_sizes(self, run: RunRecord) -> list[int]:
        """Return the micro-batches to time."""
        batch = run.what.optim.global_batch_size
        if self.micro_batches == "search":
            return list_micro_batches(run)
        if not self.micro_batches:
            return [run.how.engine.micro_batch_size or batch]
        return [check_micro_batch(batch, number, 1) for number in read_numbers("--micro-batches", self.micro_batches)]


def read_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Split a list with commas and refuse what is not known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}={name}, is not one; use {', '.join(known)}")
    return names


def read_numbers(option: str, text: str) -> list[int]:
    """Split a list of numbers with commas."""
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise ConfigError(f"{option}={text}, is not a list of numbers; write 1,2,4")
    return [int(part) for part in text.split(",")]


def find_run(plan: Plan, size: str | None) -> RunRecord:
    """Return the run of a size of the grid, the costliest where none is named."""
    runs = [run for run in plan.runs if size in (None, run.size)]
    if not runs:
        raise ConfigError(f"--size={size}, is not in the grid; use {', '.join(sorted({run.size for run in plan.runs}))}")
    return max(runs, key=lambda run: run.cells[0].flops_per_token)


def report_cell(plan: Plan, choice: Choice, *, n_blocks: int, n_threads: int, profiled: bool, json_file: Path | None) -> None:
    """Time a cell and print the table."""
    run = find_run(plan, choice.size)
    variants, sizes = choice.list_variants(run), choice.list_sizes(run)
    if choice.share:
        n_threads = 1
        rows = bench_sharing(run, variants[0], sizes[0], read_numbers("--share", choice.share), n_blocks)
    else:
        rows = bench_cell(run, variants, sizes, n_blocks=n_blocks, n_threads=n_threads)
    if not rows:
        raise ConfigError(f"{run.size}: runs out of memory at every micro-batch of {sizes}; try smaller ones")
    where = f"sequences of {run.what.model.seq_len}, global batch {run.what.optim.global_batch_size}, {n_threads} threads"
    print(f"{run.size}, {where}\n\n{render_rows(rows)}")
    if json_file is not None:
        with json_file.open("a") as file:
            file.writelines(json.dumps(describe_row(run, row, n_threads)) + "\n" for row in rows)
    if choice.micro_batches == "search":
        print(f"\\nfastest: engine.micro_batch_size = {find_fastest(rows).micro_batch_size}")
    if profiled:
        side = open_side(run, variants[0], n_threads)
        print(side.ask("profile", sizes[0], 2))
        side.close()


def find_fastest(rows: list[Row]) -> Row:
    """Return the row of the highest median."""
    return max(rows, key=lambda row: row.quartiles[1])


def report_probe(plan: Plan, runs_dir: Path) -> None:
    """Say from a few steps of its costliest run how long the rest of an experiment will take here."""
    left = {run.run_id: count_left(runs_dir, run) for run in plan.runs}
    if not any(left.values()):
        print(f"{plan.experiment}: everything is trained")
        return
    run = max((run for run in plan.runs if left[run.run_id]), key=lambda run: run.cells[0].flops_per_token)
    step_s = probe_step(run, N_PROBE_STEPS)
    step_flops = run.tokens_per_step * run.cells[0].flops_per_token
    flops = sum(left[one.run_id] * one.tokens_per_step * one.cells[0].flops_per_token for one in plan.runs)
    print(
        f"{plan.experiment}: a step of {run.size} takes {step_s:.3g} s here (median of {N_PROBE_STEPS}); "
        f"{sum(left.values()):,} steps are left, about {format_seconds(step_s * flops / step_flops)}, evaluations not counted",
        flush=True,
    )


def count_left(runs_dir: Path, run: RunRecord) -> int:
    """Return the steps that a run has still to take, by its newest rows."""
    run_dir = find_experiment_dir(runs_dir, run.experiment) / run.run_id
    pending = list_pending_cells(run_dir, run)
    trunk = [row["step"] for row in iter_metrics(run_dir) if row["kind"] == "train" and row["cell_id"] is None]
    return count_steps_left(pending, None, max(trunk, default=0)) if pending else 0


def report_own_work(plan: Plan, size: str | None) -> None:
    """Print what the loop itself takes for a step."""
    run = find_run(plan, size)
    seconds = measure_own_work(run, N_OWN_STEPS)
    print(f"{run.size}: the loop's own work, batches and rows included, takes {seconds * 1e6:,.0f} microseconds a step")


def report_nanogpt(
    nanogpt: Path, shape: str, n_blocks: int, n_threads: int, n_steps: int, *, at_once: int, data_dir: Path | None
) -> None:
    """Time ours beside nanoGPT's: the model alone, or with data the whole trainer."""
    if shape not in SHAPES:
        raise ConfigError(f"--shape={shape}, is not one; use {', '.join(SHAPES)}")
    if data_dir is not None:
        setting = Setting(SHAPES[shape], BLOCK_STEPS[shape], n_threads, at_once)
        ours, theirs = compare_trainers(setting, nanogpt, data_dir, n_blocks)
        print("| shape | processes x threads | nanoGPT tokens/s | harness tokens/s | ratio, median (quartiles) | blocks |")
        print("|---|---|---|---|---|---|")
        print(render_trainers(shape, setting, ours, theirs))
        return
    found = compare_speed(SHAPES[shape], nanogpt, n_blocks=n_blocks, n_threads=n_threads, n_steps=n_steps)
    print("| shape | threads | nanoGPT tokens/s | harness tokens/s | ratio, median (quartiles) | steps: losses |")
    print("|---|---|---|---|---|---|")
    print(render_comparison(shape, SHAPES[shape], found, n_threads))
