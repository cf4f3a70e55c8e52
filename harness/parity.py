"""Does every engine train as one plain torch process does? Train a short cell on each, and compare step by step.

Rank counts are launched with torchrun, all of one count's cases in one process group. The loop is the trainer's own.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_model

from harness.attempt import Attempt
from harness.batches import open_data
from harness.checkpoint import describe_origin
from harness.config import ConfigError, EngineSection, EvalSection, Precision, TrackSection
from harness.devices import open_devices
from harness.distributed import Ranks, join_ranks
from harness.engine import open_engine
from harness.grid import nearest_multiple
from harness.metrics import MetricsWriter
from harness.records import Plan, RunRecord
from harness.runs import find_code_root, read_json, read_rows, write_json
from harness.schedule import Schedule
from harness.train import Training, train_segment
from harness.zero import check_engine

GRAD_CLIP = 0.1  # below the norms of a model at its start, so that clipping is active
MIN_LR_FRACTION = 0.1
MAX_LR = 1e-3  # at 1e-2 a model of width 16 made a relative 1e-7 of rounding into 6e-4 within 50 steps: nothing could be told
LOSS_BOUNDS = {"fp32": 1e-5, "bf16_autocast": 3e-3}  # largest difference of a step's loss: relative in fp32, else absolute
NORM_BOUNDS = {"fp32": 1e-4, "bf16_autocast": 2e-2}  # of its gradient norm, relative: AdamW forgives a gradient's scale
ACCUMULATIONS, WORLD_SIZES = (1, 4), (1, 2)
NEVER_S = 1e9


@dataclass(frozen=True)
class Case:
    """One way to train the checked cell."""

    precision: Precision
    kind: Literal["torch", "deepspeed"]
    zero_stage: int
    world_size: int
    accumulation: int
    offload: bool = False

    @property
    def engine(self) -> str:
        """The engine as the table names it."""
        return (
            self.kind + (f" stage {self.zero_stage}" if self.kind == "deepspeed" else "") + (" offload" if self.offload else "")
        )

    @property
    def name(self) -> str:
        """The case's folder."""
        return f"{self.precision}-{self.engine.replace(' ', '-')}-{self.world_size}x{self.accumulation}"


def list_cases() -> list[Case]:
    """List every engine at one and two ranks, with and without accumulation; bf16_native last, in numerics of its own."""
    cases = []
    for precision in ("fp32", "bf16_autocast", "bf16_native"):
        for world_size, accumulation in product(WORLD_SIZES, ACCUMULATIONS):
            shape = (world_size, accumulation)
            cases.append(Case(precision, "torch", 0, *shape))
            cases += [Case(precision, "deepspeed", stage, *shape) for stage in range(4)]
        cases += [Case(precision, "deepspeed", stage, 2, 4, offload=True) for stage in (1, 2, 3)]
    return cases


def find_reference(case: Case) -> Case:
    """Return what a case is measured against: one plain torch process. bf16_native is shown beside bf16_autocast."""
    return Case("fp32" if case.precision == "fp32" else "bf16_autocast", "torch", 0, 1, 1)


def plan_case(plan: Plan, case: Case, n_steps: int) -> RunRecord:
    """Return the run of one case: the plan's cheapest cell, shortened, every part that can go wrong made active.

    Note: no dropout, since masks differ by rank; a rate that changes at every step; a batch that every case can divide.
    """
    run = min(plan.runs, key=lambda run: min(cell.flops for cell in run.cells))
    what, cell = run.what, min(run.cells, key=lambda cell: cell.flops)
    unit = max(WORLD_SIZES) * max(ACCUMULATIONS)
    batch = nearest_multiple(what.optim.global_batch_size, unit)
    lr = min(what.optim.lr, MAX_LR)
    optim = {"lr": lr, "grad_clip": GRAD_CLIP, "weight_decay": what.optim.weight_decay or 0.1, "global_batch_size": batch}
    what = what.model_copy(
        update={
            "precision": case.precision,
            "model": what.model.model_copy(update={"dropout": 0.0}),
            "optim": what.optim.model_copy(update=optim),
            "schedule": Schedule(kind="cosine", n_warmup_steps=n_steps // 5, min_lr_fraction=MIN_LR_FRACTION),
            "n_steps": n_steps,
        }
    )
    engine = EngineSection(
        kind=case.kind,
        zero_stage=case.zero_stage,
        offload_optimizer=case.offload,
        device=run.how.engine.device,
        micro_batch_size=batch // (case.world_size * case.accumulation),
        activation_checkpointing=run.how.engine.activation_checkpointing,
        checkpoint_every_s=NEVER_S,
    )
    how = {"engine": engine, "eval": EvalSection(), "track": TrackSection(log_every_steps=1)}
    cell = cell.model_copy(update={"n_steps": n_steps, "branch_step": n_steps, "n_cooldown_steps": 0})
    return run.model_copy(update={"what": what, "how": run.how.model_copy(update=how), "cells": (cell,)})


def verify_parallel(plan: Plan, folder: Path, n_steps: int) -> list[dict[str, Any]]:
    """Train every case that the engines allow and return the table."""
    cases = []
    for case in list_cases():
        run = plan_case(plan, case, n_steps)
        try:
            check_engine(run.what, run.how.engine)
        except ConfigError:
            continue
        shutil.rmtree(folder / case.name, ignore_errors=True)  # an earlier check's
        write_json(folder / case.name / "run.json", run.model_dump(mode="json"))
        cases.append(case)
    for world_size in WORLD_SIZES:
        mine = [case for case in cases if case.world_size == world_size]
        print(f"training {len(mine)} cases of {n_steps} steps on {world_size} rank{'s' * (world_size > 1)}", flush=True)
        launch(folder, [case.name for case in mine], world_size)
    return [compare(case, folder / case.name, folder / find_reference(case).name) for case in cases]


def launch(folder: Path, names: list[str], world_size: int, program: tuple[str, ...] = ("-m", "harness.parity")) -> int:
    """Train cases one after another under torchrun; its words go to a log beside them, its exit status back."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(find_code_root())}
    log = folder / f"ranks-{world_size}.log"
    with log.open("wb") as file:
        done = subprocess.run([*command, *program, str(folder), *names], env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        print(f"torchrun ended with status {done.returncode}; see {log}", file=sys.stderr)
    return done.returncode


def train_case(case_dir: Path, ranks: Ranks) -> None:
    """Train one case with the trainer's own loop; leave its rows and its weights."""
    run = load_case(case_dir)
    val, batches = open_data(run, ranks)
    engine = open_engine(run, ranks)
    with (
        MetricsWriter(case_dir if ranks.rank == 0 else None) as metrics,
        Attempt.joined(case_dir, ranks.rank, ranks.world_size, NEVER_S, None) as attempt,
    ):
        origin, devices = describe_origin(run, ranks, 1), open_devices(ranks, run.what.precision)
        training = Training(run, case_dir, ranks, batches, val, engine, metrics, attempt, origin, devices)
        train_segment(training, run.cells[0], run.cells[0].n_steps)
    model = engine.whole_model()
    if ranks.rank == 0:
        save_model(model, str(case_dir / "model.safetensors"))


def load_case(case_dir: Path) -> RunRecord:
    """Read the run of a case."""
    return RunRecord.model_validate(read_json(case_dir / "run.json"))


def compare(case: Case, case_dir: Path, reference_dir: Path) -> dict[str, Any]:
    """Return a case's row of the table: how far it is from its reference, and whether that will do."""
    row: dict[str, Any] = {
        "precision": case.precision,
        "engine": case.engine,
        "ranks": case.world_size,
        "accumulation": case.accumulation,
        "reference": case == find_reference(case),
    }
    mine, right = list(iter_rows(case_dir)), list(iter_rows(reference_dir))
    if len(mine) != len(right) or not right:
        return {**row, "verdict": "did not finish"}
    pairs = list(zip(mine, right, strict=True))
    losses = [(a["train_loss"], b["train_loss"]) for a, b in pairs if a["kind"] == "train"]
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in pairs if a["kind"] == "train"]
    row |= {
        "receipts_equal": all(a.get("receipt") == b.get("receipt") for a, b in pairs),
        "rates_equal": all(a.get("lr") == b.get("lr") for a, b in pairs),
        "loss_difference": find_largest_difference(losses, relative=case.precision == "fp32"),
        "grad_norm_difference": find_largest_difference(norms, relative=True),
        "val_loss_difference": abs(mine[-1]["val_loss"] - right[-1]["val_loss"]),
        "weights_distance": measure_distance(case_dir, reference_dir),
    }
    return {**row, "verdict": judge(row)}


def iter_rows(case_dir: Path) -> Iterator[dict[str, Any]]:
    """Read a case's rows, none where it was not finished."""
    if (case_dir / "model.safetensors").exists():
        yield from read_rows(case_dir / "metrics.jsonl")


def find_largest_difference(pairs: list[tuple[float | None, float | None]], *, relative: bool) -> float:
    """Return the largest difference of a number from what it should be; infinite where one is missing."""
    if any(a is None or b is None for a, b in pairs):
        return math.inf
    return max(abs(a - b) / (abs(b) if relative else 1.0) for a, b in pairs if a is not None and b is not None)


def measure_distance(case_dir: Path, reference_dir: Path) -> float:
    """Return how far final weights are from the reference's, relative to the norm of those."""
    mine, right = (load_file(folder / "model.safetensors") for folder in (case_dir, reference_dir))
    apart = sum((mine[name].double() - right[name].double()).square().sum() for name in right)
    return float(torch.as_tensor(apart).sqrt() / torch.stack([w.double().norm() for w in right.values()]).norm())


def judge(row: dict[str, Any]) -> str:
    """Say whether a row holds; bf16_native is measured only."""
    if not row["receipts_equal"]:
        return "FAILS: other samples"
    if not row["rates_equal"]:
        return "FAILS: other learning rates"
    bound = LOSS_BOUNDS.get(row["precision"])
    if bound is None:
        return "measured"
    if not row["loss_difference"] <= bound:
        return "FAILS: losses"
    return "holds" if row["grad_norm_difference"] <= NORM_BOUNDS[row["precision"]] else "FAILS: gradient norms"


def has_failed(rows: list[dict[str, Any]]) -> bool:
    """Say whether a row that must hold does not."""
    return any(row["verdict"] not in ("holds", "measured") for row in rows)


def render_markdown(rows: list[dict[str, Any]]) -> str:
    """Render the table for BENCHMARKS.md."""
    lines = [
        "| precision | engine | ranks | accumulation | receipts | loss of a step | gradient norm | weights | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['precision']} | {row['engine']} | {row['ranks']} | {row['accumulation']} |"
        if "loss_difference" not in row:
            lines.append(f"{start} | | | | {row['verdict']} |")
            continue
        unit = "relative" if row["precision"] == "fp32" else "nats"
        verdict = "the reference" if row["reference"] else row["verdict"]
        lines.append(
            f"{start} {'equal' if row['receipts_equal'] else 'DIFFER'} | {row['loss_difference']:.1e} {unit} | "
            f"{row['grad_norm_difference']:.1e} | {row['weights_distance']:.1e} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line of the processes that `launch` starts."""
    parser = argparse.ArgumentParser(prog="python -m harness.parity", description="Train cases of harness verify parallel.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    cases = [arguments.folder / name for name in arguments.names]
    ranks = join_ranks(load_case(cases[0]).how.engine.device)
    for case_dir in cases:
        train_case(case_dir, ranks)
    ranks.close()


if __name__ == "__main__":
    main()
