"""Runs under watch for the tests: real ranks, real torchrun, faults where the test says."""

import json
import os
import time
from pathlib import Path
from typing import Any

from conftest import ROOT, read_summaries

from harness.runs import list_attempts, load_run, read_json
from launch import supervise
from launch.supervise import Place, Supervision, find_processes

TESTS = Path(__file__).parent
DETERMINISTIC = ("cell_id", "steps", "tokens", "flops", "train_loss", "val_loss", "val_loss_best", "receipt", "weights_sha256")


def place_ranks(n_ranks: int, *faults: dict[str, Any], **options: Any) -> Place:
    """Return this machine with so many one-thread ranks, in which the faults happen."""
    environment = {
        **supervise.build_environment(n_threads=1),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
        "HARNESS_FAULTS": json.dumps(faults),
        **options.pop("environment", {}),
    }
    return Place(ROOT, ranks_per_node=n_ranks, environment=environment, module="faulty", **options)


def train_watched(run_dir: Path, place: Place, *, once: bool = False, timeout_s: float = 600.0) -> list[str]:
    """Train a run as `launch.supervise` does, and return how each attempt ended: its state, or "failed/<cause>".

    `once`: whatever happens, it is not started again.
    """
    before = len(list_attempts(run_dir))
    supervision = Supervision(run_dir, load_run(run_dir), place)
    supervision.start()
    supervision.stopping = once
    deadline = time.monotonic() + timeout_s
    while supervision.poll():
        assert time.monotonic() < deadline, f"not over after {timeout_s} s; {read_log(run_dir)}"
        time.sleep(0.05)
    assert find_processes(supervision.attempt_dir) == [], "nothing of an attempt outlives it"
    ended = [describe(attempt) for attempt in list_attempts(run_dir)[before:]]
    assert ended[-1] == "failed/killed" or not list(run_dir.rglob(".staging-*")), "only a kill leaves what the next claim sweeps"
    return ended


def describe(attempt_dir: Path) -> str:
    outcome = read_json(attempt_dir / "outcome.json")
    return outcome["state"] + (f"/{outcome['cause']}" if outcome["state"] == "failed" else "")


def read_outcome(run_dir: Path, attempt: int = -1) -> dict[str, Any]:
    """Return an attempt's outcome; by default the newest one's."""
    return read_json(list_attempts(run_dir)[attempt] / "outcome.json")  # type: ignore[no-any-return]


def read_log(run_dir: Path) -> str:
    return (list_attempts(run_dir)[-1] / "log").read_text()


def read_table(run_dir: Path) -> list[list[Any]]:
    """Return what must not depend on faults, of every cell."""
    return [[summary[key] for key in DETERMINISTIC] for summary in read_summaries(run_dir)]
