"""Checkpoints that a kill cannot spoil: staged, hashed, published by one rename; verified before they are believed.

Every rank writes files of its own into a staging folder; `manifest.json` holds the size and SHA-256 of each, and of
itself. A folder counts only when all of it is as the manifest says, with nothing missing and nothing added.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from data_prep.shards import sync_directory
from harness.attempt import check_lease
from harness.batches import EMPTY_RECEIPT
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.engine import Engine
from harness.fault import fault_point
from harness.records import CellRecord, RunRecord, hash_record
from harness.runs import describe_code, find_cell_dir, find_code_root, list_pending_cells, read_json, write_json

KEEP_LAST = 2  # valid checkpoints besides those that a branch still needs
KEEP_CORRUPT = 2  # spoilt ones, to be looked at
STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
# What the optimiser files of DeepSpeed hold besides tensors; its loader would run anything else that a file names.
ALLOWED_GLOBALS = frozenset(
    {
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    }
)


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
    recent_losses: tuple[float, ...] = ()  # what a spike is measured against
    loss_spikes: int = 0


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is of: run, engine, code and attempt, as its manifest says."""

    run_id: str
    data_content_id: str
    engine: str
    zero_stage: int | None
    world_size: int
    attempt: int
    code_hash: str
    torch_version: str
    deepspeed_version: str | None


def describe_origin(run: RunRecord, ranks: Ranks, attempt: int) -> Origin:
    """Return what this process's checkpoints are of."""
    engine = run.how.engine
    is_deepspeed = engine.kind == "deepspeed"
    return Origin(
        run_id=run.run_id,
        data_content_id=run.what.data_content_id,
        engine=engine.kind,
        zero_stage=engine.zero_stage if is_deepspeed else None,
        world_size=ranks.world_size,
        attempt=attempt,
        code_hash=describe_code(find_code_root()).code_hash,
        torch_version=torch.__version__,
        deepspeed_version=importlib.metadata.version("deepspeed") if is_deepspeed else None,
    )


def find_folder(run_dir: Path, cell: CellRecord | None) -> Path:
    """Return where a segment keeps its checkpoints: a cooldown in its cell, the trunk in the run."""
    in_cooldown = cell is not None and cell.n_cooldown_steps > 0
    return (find_cell_dir(run_dir, cell) if cell is not None and in_cooldown else run_dir) / "checkpoints"


def publish_checkpoint(
    folder: Path,
    attempt_dir: Path,
    ranks: Ranks,
    engine: Engine,
    state: TrainState,
    origin: Origin,
    probe_loss: float | None,
) -> Path:
    """Publish a checkpoint at `folder`/<step>, on all ranks; one that is there already and valid is left alone.

    Raises:
        OSError: the disk of some rank refused; on every rank. Nothing is published and the staging folder is gone.
        LostLeaseError: a later attempt has taken the run over.
    """
    target, staging = folder / str(state.step), folder / f".staging-{state.step}-{origin.attempt}"
    fault_point("save_begin")
    if ranks.decide(lambda: find_fault(target) is None):
        return target
    try:
        ranks.decide(lambda: make_empty(staging))
        own = staging / f".rank-{ranks.rank}"
        ranks.together(own.mkdir)  # all have one before any begins, since engines wait for each other when they write
        mine = ranks.together(lambda: write_files(staging, own, engine))
        files = {name: facts for part in ranks.gather(mine) for name, facts in part.items()}
        content = {**asdict(origin), "step": state.step, "probe_loss": probe_loss}
        ranks.decide(lambda: seal(staging, target, attempt_dir, state, {**content, "files": files}))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
    fault_point("after_publish")
    return target


def make_empty(folder: Path) -> None:
    """Make a folder, without what an earlier failure may have left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_files(staging: Path, own: Path, engine: Engine) -> dict[str, dict[str, Any]]:
    """Have the engine write one rank's files into a folder of its own, make them durable, move them up, and describe them."""
    engine.write_state(own)
    described = {}
    for path in sorted(p for p in own.rglob("*") if p.is_file()):
        fault_point("file_written")
        name = path.relative_to(own)
        described[name.as_posix()] = describe_file(path, sync=True)
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(staging / name)
    shutil.rmtree(own)
    return described


def seal(staging: Path, target: Path, attempt_dir: Path, state: TrainState, manifest: dict[str, Any]) -> None:
    """Complete a staged checkpoint with state and manifest, and give it its name, on rank 0."""
    write_json(staging / STATE_FILE, asdict(state))
    manifest["files"] |= {STATE_FILE: describe_file(staging / STATE_FILE)}
    fault_point("before_manifest")
    write_json(staging / MANIFEST_FILE, {**manifest, "digest": hash_record(manifest)})
    for path in staging.rglob("*/"):
        sync_directory(path)
    fault_point("before_publish")
    check_lease(attempt_dir)
    if target.exists():
        quarantine(target)
    staging.rename(target)
    sync_directory(target.parent)


def describe_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Return size and SHA-256 of a file, flushed to the disk first where asked for."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"n_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check it against its own digest.

    Raises:
        ValueError: it was altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{MANIFEST_FILE} is not JSON ({error})") from None
    digest = manifest.pop("digest", None)
    if digest != hash_record(manifest):
        raise ValueError(f"{MANIFEST_FILE} does not match its own digest")
    return manifest  # type: ignore[no-any-return]


def find_fault(checkpoint: Path, *, deep: bool = True) -> str | None:
    """Say what is wrong with a checkpoint, or None where all is as its manifest says; only sizes where not `deep`."""
    try:
        files = read_manifest(checkpoint)["files"]
        found = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST_FILE}
        if found != files.keys():
            return f"{min(found ^ files.keys())} is {'missing' if files.keys() - found else 'not in its manifest'}"
        for name, expected in files.items():
            path = checkpoint / name
            if path.stat().st_size != expected["n_bytes"] or (deep and describe_file(path) != expected):
                return f"{name} does not match its manifest"
            if deep and path.suffix == ".pt" and (code := find_code(path)):
                return f"{name} names {code}, which no checkpoint needs and which loading would run"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_code(path: Path) -> str | None:
    """Return a name that a file's pickle would import beyond tensors and what DeepSpeed is known to store."""
    return min(set(get_unsafe_globals_in_checkpoint(path)) - ALLOWED_GLOBALS, default=None)


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the published checkpoints, valid or not, in order."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def list_corrupt(folder: Path) -> list[Path]:
    """Return the spoilt checkpoints that were set aside, oldest step first."""
    return sorted(folder.glob(".corrupt-*"), key=lambda path: int(path.name.split("-")[1]))


def quarantine(checkpoint: Path) -> Path:
    """Set a spoilt checkpoint aside under a name that is never loaded."""
    numbers = (n for n in range(1000) if not checkpoint.with_name(f".corrupt-{checkpoint.name}-{n}").exists())
    return checkpoint.rename(checkpoint.with_name(f".corrupt-{checkpoint.name}-{next(numbers)}"))


def find_newest(folder: Path, at_most: int) -> Path | None:
    """Return the newest valid checkpoint at or before a step; a spoilt one is named, set aside and passed over."""
    for step in reversed(list_checkpoints(folder)):
        checkpoint = folder / str(step)
        if step <= at_most and (fault := find_fault(checkpoint)):
            aside = quarantine(checkpoint)
            print(f"checkpoint {checkpoint} is not usable: {fault}; set aside as {aside.name}", flush=True)
        elif step <= at_most:
            return checkpoint
    return None


def find_on_the_way(run_dir: Path, cell: CellRecord) -> Path | None:
    """Return the newest valid checkpoint on the way to a cell: of its cooldown, else of the trunk before it branches.

    Raises:
        ConfigError: there were some and none is valid; to begin anew is for a person to decide.
    """
    own = find_newest(find_folder(run_dir, cell), cell.n_steps)
    trunk = run_dir / "checkpoints"
    found = own or find_newest(trunk, cell.branch_step)
    spoilt = [path for path in list_corrupt(trunk) if int(path.name.split("-")[1]) <= cell.branch_step]
    if found is None and spoilt:
        raise ConfigError(
            f"{trunk}: {len(spoilt)} checkpoints up to step {cell.branch_step} and none is valid ({spoilt[-1].name}); restore "
            "one, or remove them all to train from the beginning"
        )
    return found


def take_over(
    checkpoint: Path, engine: Engine, ranks: Ranks, here: Origin, allow_reshape: bool
) -> tuple[TrainState, float | None]:
    """Load a checkpoint that `find_newest` has verified, on all ranks; return its counters and its probe loss.

    Raises:
        ConfigError: it was written by another engine, or as ZeRO's parts for another number of ranks.
    """
    manifest, state = ranks.together(lambda: (read_manifest(checkpoint), load_state(checkpoint)))
    if check_resumable(checkpoint, manifest, here, allow_reshape):
        from harness.reshape import read_reshaped  # here, since it needs deepspeed

        scratch = checkpoint.parent / f".staging-reshape-{here.attempt}"
        read_reshaped(engine, ranks, checkpoint, scratch, state.step - state.skipped_steps)
    else:
        engine.read_state(checkpoint)
    return state, manifest["probe_loss"]


def load_state(checkpoint: Path) -> TrainState:
    """Read the counters of a checkpoint that `find_newest` has verified."""
    state = TrainState(**read_json(checkpoint / STATE_FILE))
    return replace(state, recent_losses=tuple(state.recent_losses))


def check_resumable(checkpoint: Path, found: dict[str, Any], here: Origin, allow_reshape: bool) -> bool:
    """Refuse to go on from a checkpoint under another engine; say whether ZeRO's parts have to be cut anew, where allowed.

    Raises:
        ConfigError: this run cannot go on from it as it was started.
    """
    for key in ("run_id", "data_content_id", "engine", "zero_stage"):
        mine = getattr(here, key)
        if found[key] != mine:
            raise ConfigError(
                f"{checkpoint}: {key}={found[key]}, this run has {mine}; go on as it was begun, or move the checkpoints away "
                "to train from the beginning"
            )
    must_reshape = bool(here.zero_stage) and found["world_size"] != here.world_size
    if must_reshape and not allow_reshape:
        raise ConfigError(
            f"{checkpoint}: world_size={found['world_size']}, ZeRO's parts do not fit {here.world_size} ranks; start it on "
            f"{found['world_size']}, or with --allow-reshape"
        )
    return must_reshape


def prune_checkpoints(run_dir: Path, run: RunRecord, folder: Path) -> None:
    """Drop checkpoints that no unfinished cell needs, but the newest that are whole."""
    needed = {pending.branch_step for pending in list_pending_cells(run_dir, run)}
    valid = [step for step in list_checkpoints(folder) if find_fault(folder / str(step), deep=False) is None]
    for step in valid[:-KEEP_LAST]:
        if step not in needed:
            remove_checkpoint(folder / str(step))
    for path in list_corrupt(folder)[:-KEEP_CORRUPT]:
        shutil.rmtree(path)


@contextmanager
def staged_result(cell_dir: Path, attempt_dir: Path) -> Iterator[Path]:
    """Give a folder to write a finished cell's files into; they are moved to their place together, the row last, or not at all.

    Raises:
        LostLeaseError: a later attempt has taken the run over.
    """
    staging = cell_dir / f".staging-result-{attempt_dir.name}"
    make_empty(staging)
    try:
        yield staging
        fault_point("before_row")
        check_lease(attempt_dir)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "summary.json"):
            path.rename(cell_dir / path.name)
        sync_directory(cell_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no half of it counts."""
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_checkpoints(folder: Path) -> None:
    """Delete a finished cell's checkpoints; its weights and row are written."""
    for step in list_checkpoints(folder):
        remove_checkpoint(folder / str(step))
    shutil.rmtree(folder, ignore_errors=True)
