"""How far an experiment is, read from its files only: cells by state, running runs, the rate and the time left."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.console import format_seconds
from harness.records import Plan, RunRecord
from harness.runs import RunState, is_cell_done, list_attempts, run_state

TAIL_BYTES = 4096  # a metrics row is under 500 bytes


@dataclass(frozen=True)
class RunProgress:
    """One run: its state, its newest training row, and the steps done of all that it has to do."""

    run: RunRecord
    state: RunState
    row: dict[str, Any] | None
    n_cells_done: int
    n_steps_done: int
    n_steps: int

    @property
    def flops_done(self) -> float:
        """Training FLOPs behind it."""
        return self.run.flops * self.n_steps_done / self.n_steps

    @property
    def flops_per_s(self) -> float:
        """Present rate; 0 unless running."""
        if self.state.state != "running" or self.row is None:
            return 0.0
        return float(self.row["tokens_per_s"]) * self.run.cells[0].flops_per_token


def read_progress(experiment_dir: Path, plan: Plan) -> list[RunProgress]:
    """Read how far every run is."""
    return [read_run_progress(experiment_dir / run.run_id, run) for run in plan.runs]


def read_run_progress(run_dir: Path, run: RunRecord) -> RunProgress:
    """Read how far one run is."""
    done = [cell for cell in run.cells if is_cell_done(run_dir, cell)]
    row = read_newest_row(run_dir)
    n_steps = run.n_trunk_steps + sum(cell.n_cooldown_steps for cell in run.cells)
    n_done = sum(cell.n_cooldown_steps for cell in done)
    trunk = max([cell.branch_step for cell in done], default=0)
    if row is not None and row["cell_id"] is None:
        trunk = max(trunk, row["step"])
    elif row is not None:
        cell = next((cell for cell in run.cells if cell.cell_id == row["cell_id"]), None)
        if cell is not None and cell not in done:
            trunk, n_done = max(trunk, cell.branch_step), n_done + row["step"] - cell.branch_step
    return RunProgress(run, run_state(run_dir, run), row, len(done), min(n_steps, trunk + n_done), n_steps)


def read_newest_row(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest training row of a run, without reading its whole record."""
    for attempt in reversed(list_attempts(run_dir)):
        path = attempt / "metrics.jsonl"
        if not path.exists():
            continue
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:  # cut by the seek, or torn by a kill
                continue
            if row["kind"] == "train":
                return dict(row)
    return None


def count_cells(progress: list[RunProgress]) -> Counter[str]:
    """Count cells by state; a run's unfinished cells share its state."""
    counts: Counter[str] = Counter()
    for run in progress:
        counts["done"] += run.n_cells_done
        if run.state.state != "done":
            counts[run.state.state] += len(run.run.cells) - run.n_cells_done
    return counts


def describe_counts(progress: list[RunProgress]) -> str:
    """Say how many cells are done, and in which states the others are: 12 of 22 cells done, 4 running, 6 planned."""
    counts = count_cells(progress)
    n_cells = sum(len(run.run.cells) for run in progress)
    others = [f"{count} {state}" for state, count in counts.items() if state != "done" and count]
    return ", ".join([f"{counts['done']} of {n_cells} cells done", *others])


def estimate_seconds_left(progress: list[RunProgress]) -> float | None:
    """Return the remaining FLOPs over the present rate, None where nothing runs."""
    rate = sum(run.flops_per_s for run in progress)
    waiting = [run for run in progress if run.state.state in ("running", "planned", "preempted")]
    return sum(run.run.flops - run.flops_done for run in waiting) / rate if rate else None


def render_line(progress: list[RunProgress]) -> str:
    """Render the progress as one plain line, for logs."""
    running = [run for run in progress if run.flops_per_s]
    parts = [describe_counts(progress)]
    parts += [f"{run.run.size} loss {run.row['train_loss']:.3f}" for run in running if run.row and run.row["train_loss"]]
    if running:
        parts.append(f"{sum(run.row['tokens_per_s'] for run in running if run.row):,.0f} tokens/s")
    left = estimate_seconds_left(progress)
    return "; ".join([*parts, *([f"about {format_seconds(left)} left"] if left else [])])


def render_page(experiment: str, progress: list[RunProgress]) -> Group:
    """Render the progress as a table of runs, with a bar for the whole."""
    table = Table(header_style="bold", title_justify="left", expand=False)
    for column, justify in (
        ("run", "left"),
        ("state", "left"),
        ("cells", "right"),
        ("steps", "right"),
        ("loss", "right"),
        ("tokens/s", "right"),
        ("attempts", "right"),
        ("cause", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=column == "run")  # type: ignore[arg-type]
    for run in progress:
        row = run.row or {}
        table.add_row(
            run.run.run_id,
            Text(run.state.state, style=STYLES.get(run.state.state, "red")),
            f"{run.n_cells_done}/{len(run.run.cells)}",
            f"{run.n_steps_done:,}/{run.n_steps:,}",
            f"{row['train_loss']:.4f}" if row.get("train_loss") else "",
            f"{row['tokens_per_s']:,.0f}" if run.flops_per_s else "",
            str(run.state.n_attempts),
            Text(run.state.reason),
        )
    total = sum(run.run.flops for run in progress)
    bar = ProgressBar(total=total, completed=sum(run.flops_done for run in progress), width=60)
    left = estimate_seconds_left(progress)
    line = f"{experiment}: {describe_counts(progress)}" + (f"; about {format_seconds(left)} left" if left else "")
    return Group(table, bar, Text(), Text(line))


STYLES = {"done": "green", "running": "cyan", "planned": "dim", "preempted": "yellow"}
