"""Checkpoints that a kill cannot spoil: staged, hashed, published by one rename; verified before they are believed.

`state.pt` holds weights, optimiser and counters; `manifest.json` its size and SHA-256. A folder counts
only when both agree.
"""

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.shards import sync_directory
from harness.batches import EMPTY_RECEIPT
from harness.records import CellRecord, RunRecord
from harness.runs import find_cell_dir, list_pending_cells, read_json, write_json

KEEP_LAST = 2  # valid checkpoints besides those that a branch still needs


@dataclass
class TrainState:
    """Where a run stands besides its weights. Resuming needs no more: data and dropout are functions of the step."""

    step: int = 0
    skipped_steps: int = 0
    receipt: str = EMPTY_RECEIPT
    train_s: float = 0.0  # seconds in training steps on the path from step 0
    wall_s: float = 0.0  # all seconds on that path: starts, evaluations and saves too, but not work that was lost
    device_s: float = 0.0  # the same, times the devices of each moment
    train_loss: float | None = None
    val_loss: float | None = None  # of the newest evaluation
    val_loss_best: float | None = None


def write_checkpoint(folder: Path, state: TrainState, engine_state: dict[str, Any], run_id: str) -> Path:
    """Publish a checkpoint at `folder`/<step>; one that is there already and valid is left alone.

    Raises:
        OSError: the disk refused; nothing is published and the staging folder is gone.
    """
    target = folder / str(state.step)
    if find_fault(target) is None:
        return target
    staging = folder / f".staging-{state.step}-{os.getpid()}"
    staging.mkdir(parents=True, exist_ok=True)
    try:
        path = staging / "state.pt"
        with path.open("wb") as file:
            torch.save({"engine": engine_state, "state": asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"run_id": run_id, "step": state.step, "files": {"state.pt": describe_file(path)}}
        write_json(staging / "manifest.json", manifest)
        if target.exists():  # a spoilt one of the same step
            shutil.rmtree(target)
        staging.rename(target)
        sync_directory(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"n_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None where its files are as its manifest says."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        for name, expected in manifest["files"].items():
            if describe_file(checkpoint / name) != expected:
                return f"{name} does not match its manifest"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the published checkpoints, valid or not, in order."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def find_newest(folder: Path, at_most: int) -> Path | None:
    """Return the newest valid checkpoint at or before a step; a spoilt one is named and passed over."""
    for step in reversed(list_checkpoints(folder)):
        if step <= at_most:
            fault = find_fault(folder / str(step))
            if fault is None:
                return folder / str(step)
            print(f"checkpoint {folder / str(step)} is not usable ({fault}); falling back to an older one", flush=True)
    return None


def load_checkpoint(checkpoint: Path, device: torch.device) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint that `find_newest` has verified; no code in it can run."""
    content = torch.load(checkpoint / "state.pt", map_location=device, weights_only=True)
    return TrainState(**content["state"]), content["engine"]


def find_on_the_way(run_dir: Path, cell: CellRecord) -> Path | None:
    """Return the newest valid checkpoint on the way to a cell: of its cooldown, else of the trunk before it branches."""
    own = find_newest(find_cell_dir(run_dir, cell) / "checkpoints", cell.n_steps)
    return own or find_newest(run_dir / "checkpoints", cell.branch_step)


def publish_checkpoint(
    run_dir: Path, run: RunRecord, cell: CellRecord | None, state: TrainState, engine_state: dict[str, Any]
) -> None:
    """Write a checkpoint where its segment keeps them, then drop those that no unfinished cell needs."""
    in_cooldown = cell is not None and cell.n_cooldown_steps > 0
    folder = (find_cell_dir(run_dir, cell) if cell is not None and in_cooldown else run_dir) / "checkpoints"
    write_checkpoint(folder, state, engine_state, run.run_id)
    needed = {pending.branch_step for pending in list_pending_cells(run_dir, run)}
    for step in list_checkpoints(folder)[:-KEEP_LAST]:
        if step not in needed:
            remove_checkpoint(folder / str(step))


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no half of it counts."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_checkpoints(folder: Path) -> None:
    """Delete a finished cell's checkpoints; its weights and row are written."""
    for step in list_checkpoints(folder):
        remove_checkpoint(folder / str(step))
    shutil.rmtree(folder, ignore_errors=True)
