"""Progress is read from files alone, and says no more than they do."""

import json
import shutil
from pathlib import Path

from rich.console import Console

from harness.attempt import claim_attempt
from harness.ending import write_outcome
from harness.records import Plan
from harness.runs import find_cell_dir, load_plan, write_json
from launch.progress import (
    describe_counts,
    estimate_seconds_left,
    read_newest_row,
    read_progress,
    render_line,
    render_page,
)


def write_rows(attempt_dir: Path, *rows: tuple[int, str | None], torn: str = "") -> None:
    lines = [
        json.dumps({"kind": "train", "cell_id": cell, "step": step, "train_loss": 2.5, "tokens_per_s": 1000.0})
        for step, cell in rows
    ]
    (attempt_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)


def render(plan: Plan, experiment_dir: Path) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    console.print(render_page(plan.experiment, read_progress(experiment_dir, plan)))
    text = console.export_text()
    console.file.close()
    return text


def test_nothing_started(tiny_dir: Path) -> None:
    plan = load_plan(tiny_dir)
    progress = read_progress(tiny_dir, plan)
    assert describe_counts(progress) == "0 of 4 cells done, 4 planned"
    assert estimate_seconds_left(progress) is None
    assert "0/4" not in render(plan, tiny_dir)


def test_a_running_run_counts_trunk_and_cooldowns(tiny_dir: Path) -> None:
    plan = load_plan(tiny_dir)
    run = plan.runs[0]
    run_dir, (first, second) = tiny_dir / run.run_id, run.cells
    attempt = claim_attempt(run_dir)
    write_rows(attempt, (3, None))
    assert read_progress(tiny_dir, plan)[0].n_steps_done == 3
    write_rows(attempt, (6, None), (7, first.cell_id), torn='{"kind": "tr')
    (progress, other) = read_progress(tiny_dir, plan)
    assert (progress.n_steps_done, progress.n_steps) == (7, 12 + 2 + 4)
    assert progress.flops_per_s == 1000.0 * first.flops_per_token
    left = (progress.run.flops * 11 / 18 + other.run.flops) / progress.flops_per_s
    assert estimate_seconds_left([progress, other]) == left
    assert "loss 2.500; 1,000 tokens/s; about" in render_line([progress, other])
    write_json(find_cell_dir(run_dir, first) / "summary.json", {})
    write_rows(attempt, (8, first.cell_id), (10, None))
    assert read_progress(tiny_dir, plan)[0].n_steps_done == 10 + 2
    assert second.branch_step == 12


def test_a_failure_is_named(tiny_dir: Path) -> None:
    plan = load_plan(tiny_dir)
    write_outcome(claim_attempt(tiny_dir / plan.runs[0].run_id), "diverged", "loss [b]nan[/b] at step 3", 2)
    page = render(plan, tiny_dir)
    assert "diverged" in page
    assert "loss [b]nan[/b] at step 3" in page, "text from records is not markup"
    assert "0 of 4 cells done, 2 diverged, 2 planned" in page


def test_the_newest_row_is_found_across_attempts(tiny_dir: Path) -> None:
    run_dir = tiny_dir / load_plan(tiny_dir).runs[0].run_id
    assert read_newest_row(run_dir) is None
    first = claim_attempt(run_dir)
    write_rows(first, *[(step, None) for step in range(1, 400)])
    row = read_newest_row(run_dir)
    assert row is not None
    assert row["step"] == 399
    write_outcome(first, "failed", "x", None)
    claim_attempt(run_dir)
    assert read_newest_row(run_dir) == row, "an attempt that has not logged yet does not hide the last one's row"
    shutil.rmtree(run_dir / "attempts")
