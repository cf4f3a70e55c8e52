"""Does a run that was killed and stopped end as one that was left alone? Train a short cell both ways on each engine.

The processes are those of a job, under torchrun where there are several. `python -m harness.interruption` is the trainer
with one addition: its last rank is killed, or asked to stop, when it comes to a given step.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from harness.batches import Batches
from harness.config import ConfigError, EngineSection, Experiment, GridSection, TrackSection, run_command_line
from harness.grid import nearest_multiple
from harness.plan import plan_experiment
from harness.records import RunRecord
from harness.runs import (
    find_cell_dir,
    find_code_root,
    iter_metrics,
    list_attempts,
    list_pending_cells,
    load_run,
    read_json,
    write_plan,
)
from harness.train import run_attempt

BIT_EQUAL = ("train_loss", "grad_norm", "lr", "val_loss", "sample_end", "skipped_steps")
WORLD_SIZE, ACCUMULATION = 2, 2


@dataclass(frozen=True)
class Case:
    """One way to train the checked cell."""

    kind: Literal["torch", "deepspeed"]
    zero_stage: int
    world_size: int

    @property
    def engine(self) -> str:
        """The engine as the table names it."""
        return f"deepspeed stage {self.zero_stage}" if self.kind == "deepspeed" else "torch"

    @property
    def name(self) -> str:
        """The case's folder."""
        return f"{self.engine.replace(' ', '-')}-{self.world_size}"


CASES = (Case("torch", 0, 1), Case("torch", 0, WORLD_SIZE), *(Case("deepspeed", stage, WORLD_SIZE) for stage in range(4)))


def shorten(experiment: Experiment, case: Case, n_steps: int) -> Experiment:
    """Return an experiment with one short cell, of the smallest size in the file, on a case's engine."""
    cell = min(plan_experiment(experiment).cells, key=lambda cell: cell.flops)
    shape = min(experiment.grid.sizes, key=lambda size: size.n_layer * size.d_model**2)
    batch = nearest_multiple(cell.global_batch_size, WORLD_SIZE * ACCUMULATION)
    warmup_tokens = n_steps // 5 * batch * experiment.data.seq_len
    engine = EngineSection(
        kind=case.kind,
        zero_stage=case.zero_stage,
        device=experiment.engine.device,
        world_size=case.world_size,
        micro_batch_size=batch // (case.world_size * ACCUMULATION),
    )
    changes = {
        "data": experiment.data.model_copy(update={"max_epochs": 1e9}),
        "optim": experiment.optim.model_copy(update={"lr": cell.lr, "global_batch_size": batch}),
        "schedule": experiment.schedule.model_copy(update={"warmup_tokens": warmup_tokens}),
        "grid": GridSection(sizes=(shape,), steps=(n_steps,)),
        "engine": engine,
        "track": TrackSection(log_every_steps=1),
    }
    return experiment.model_copy(update=changes)


def verify_resume(experiment: Experiment, folder: Path, n_steps: int, cases: Iterable[Case] = CASES) -> list[dict[str, Any]]:
    """Train every case that the plan allows, left alone and interrupted, and return the table."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier check's
    rows = []
    for case in cases:
        row = {"precision": experiment.precision, "engine": case.engine, "ranks": case.world_size}
        try:
            plan = plan_experiment(shorten(experiment, case, n_steps))
        except ConfigError as error:
            rows.append({**row, "verdict": f"not possible: {error}"})
            continue
        print(f"training {n_steps} steps on {case.engine}, {case.world_size} ranks, twice", flush=True)
        calm, broken = (write_plan(plan, folder / case.name / way) / plan.runs[0].run_id for way in ("calm", "interrupted"))
        start_ranks(calm, case.world_size)
        kill_at, stop_at = n_steps // 3, 2 * n_steps // 3
        start_ranks(broken, case.world_size, "--kill-at", str(kill_at))
        start_ranks(broken, case.world_size, "--stop-at", str(stop_at))
        start_ranks(broken, case.world_size)
        rows.append({**row, "killed_at": kill_at, "stopped_at": stop_at, **compare(calm, broken)})
    return rows


def start_ranks(run_dir: Path, world_size: int, *options: str) -> None:
    """Train a run, as far as it goes, in the processes of a job; what they say goes to a log beside the attempts."""
    command = [sys.executable, "-m"]
    if world_size > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", "-m"]
    command += ["harness.interruption", str(run_dir.resolve()), *options]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(find_code_root())}
    with (run_dir / "verify.log").open("ab") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)


def compare(calm: Path, broken: Path) -> dict[str, Any]:
    """Return how an interrupted run compares with one that was left alone."""
    run = load_run(calm)
    if list_pending_cells(calm, run) or list_pending_cells(broken, run):
        return {"verdict": f"FAILS: did not finish, see {broken}/verify.log"}
    if (n_attempts := len(list_attempts(broken))) != 3:
        return {"verdict": f"FAILS: {n_attempts} attempts instead of 3, see {broken}/verify.log"}
    rows = list(zip(iter_metrics(calm), iter_metrics(broken), strict=False))
    same_length = sum(1 for _ in iter_metrics(calm)) == sum(1 for _ in iter_metrics(broken))
    facts = {
        "receipts_equal": same_length and all(one.get("receipt") == other.get("receipt") for one, other in rows),
        "n_rows": len(rows),
        "n_equal": sum(all(one.get(key) == other.get(key) for key in BIT_EQUAL) for one, other in rows),
        "weights_equal": read_weights(calm, run) == read_weights(broken, run),
        "weights_sha256": read_weights(calm, run)[0],
    }
    return {**facts, "verdict": judge(facts, read_json(list_attempts(calm)[0] / "attempt.json")["device"])}


def read_weights(run_dir: Path, run: RunRecord) -> list[str]:
    """Return the hash of each cell's final weights."""
    return [read_json(find_cell_dir(run_dir, cell) / "summary.json")["weights_sha256"] for cell in run.cells]


def judge(facts: dict[str, Any], device: str) -> str:
    """Say whether a row holds; on a GPU, whose sums differ from run to run, the bits are measured only."""
    if not facts["receipts_equal"]:
        return "FAILS: other samples"
    if facts["n_equal"] == facts["n_rows"] and facts["weights_equal"]:
        return "holds"
    return "FAILS: other numbers" if device == "cpu" else "measured"


def render_markdown(rows: list[dict[str, Any]]) -> str:
    """Render the table for BENCHMARKS.md."""
    lines = [
        "| precision | engine | ranks | killed at step | stopped at step | receipts | rows equal to a bit | weights | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['precision']} | {row['engine']} | {row['ranks']} |"
        if "n_rows" not in row:
            lines.append(f"{start} | | | | | {row['verdict']} |")
            continue
        weights = f"equal, {row['weights_sha256'][:8]}" if row["weights_equal"] else "DIFFER"
        lines.append(
            f"{start} {row['killed_at'] + 1} | {row['stopped_at'] + 1} | {'equal' if row['receipts_equal'] else 'DIFFER'} | "
            f"{row['n_equal']} of {row['n_rows']} | {weights} | {row['verdict']} |"
        )
    return "\n".join(lines)


def interrupt_at(step: int, number: signal.Signals) -> None:
    """Have the last rank send itself a signal when it asks for the batch of a step."""
    if int(os.environ.get("RANK", "0")) != int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return
    read_batch = Batches.batch

    def batch(self: Batches, at: int, micro_step: int) -> tuple[Tensor, Tensor]:
        if at == step and micro_step == 0:
            os.kill(os.getpid(), number)
        return read_batch(self, at, micro_step)

    Batches.batch = batch  # type: ignore[assignment,method-assign]


def main() -> None:
    """Read the command line of the processes that `start_ranks` starts."""
    parser = argparse.ArgumentParser(prog="python -m harness.interruption", description="Train a run of harness verify resume.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stop-at", type=int)
    arguments = parser.parse_args()
    for step, number in ((arguments.kill_at, signal.SIGKILL), (arguments.stop_at, signal.SIGTERM)):
        if step is not None:
            interrupt_at(step, number)
    sys.exit(run_attempt(arguments.run_dir, None, None))


if __name__ == "__main__":
    run_command_line(main)
