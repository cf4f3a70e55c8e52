"""Where an experiment's files are and what they say: the plan, derived states, merged metrics, the code's identity.

No torch: `launch` and `results` read experiments through this module. The formats stand in harness/FORMAT.md.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from data_prep.shards import sync_directory
from harness.config import ConfigError
from harness.records import CellRecord, Plan, RunRecord, hash_record

State = Literal["planned", "running", "done", "diverged", "preempted", "failed", "oom", "disk_full", "cancelled"]
CODE_PACKAGES = ("model", "data_prep", "harness")  # what a job runs
STALE_S = 120.0  # a heartbeat older than this, from another host, is not alive


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a file that readers see whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def current_umask() -> int:
    """Read the process's umask (which POSIX only lets one read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file; one that is not JSON is named.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it or remove the folder it stands in") from None


def find_experiment_dir(runs_dir: Path, experiment: str) -> Path:
    """Return the folder of an experiment."""
    return runs_dir / experiment


def write_plan(plan: Plan, runs_dir: Path) -> Path:
    """Freeze a plan: plan.json, and run.json and cell.json of every run. Returns the experiment's folder.

    Note: what is finished stays; a longer plan extends a run's list of cells.
    Raises:
        ConfigError: a run's folder holds another run.
    """
    experiment_dir = find_experiment_dir(runs_dir, plan.experiment)
    for run in plan.runs:
        run_dir = experiment_dir / run.run_id
        if (run_dir / "run.json").exists():
            check_same_run(load_run(run_dir), run, run_dir)
        write_json(run_dir / "run.json", run.model_dump(mode="json"))
        for cell in run.cells:
            write_json(find_cell_dir(run_dir, cell) / "cell.json", cell.model_dump(mode="json"))
    write_json(experiment_dir / "plan.json", plan.model_dump(mode="json"))
    return experiment_dir


def check_same_run(found: RunRecord, planned: RunRecord, run_dir: Path) -> None:
    """Refuse to write one run's plan over another's."""
    if found.what != planned.what:
        raise ConfigError(f"{run_dir}: run_id={found.run_id}, holds another run than the plan's; move that folder away")


def load_plan(experiment_dir: Path) -> Plan:
    """Read an experiment's frozen plan.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    path = experiment_dir / "plan.json"
    try:
        return Plan.model_validate(read_json(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no plan; run python -m harness plan <experiment.toml> first") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: is not a plan of this version ({error.error_count()} faults); plan again") from None


def load_run(run_dir: Path) -> RunRecord:
    """Read a run's frozen plan and check that it is the run that its folder is named after.

    Raises:
        ConfigError: there is none, it is not one, or it was edited.
    """
    path = run_dir / "run.json"
    try:
        run = RunRecord.model_validate(read_json(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such run; give a folder runs/<experiment>/<run_id>") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: is not a run of this version ({error.error_count()} faults); plan again") from None
    digest = hash_record(run.what.model_dump(mode="json"))[:10]
    if run_dir.resolve().name != run.run_id or not run.run_id.endswith(digest):
        raise ConfigError(
            f"{path}: run_id={run.run_id}, does not match its folder or its content (hash {digest}): this is the folder "
            "of another plan or was edited; plan the experiment again"
        )
    return run


def find_cell_dir(run_dir: Path, cell: CellRecord) -> Path:
    """Return the folder of a cell."""
    return run_dir / "cells" / cell.cell_id


def is_cell_done(run_dir: Path, cell: CellRecord) -> bool:
    """Say whether a cell's summary, which is written last, is there."""
    return (find_cell_dir(run_dir, cell) / "summary.json").exists()


def list_pending_cells(run_dir: Path, run: RunRecord) -> list[CellRecord]:
    """Return the cells without a summary, by branch point."""
    pending = [cell for cell in run.cells if not is_cell_done(run_dir, cell)]
    return sorted(pending, key=lambda cell: (cell.branch_step, cell.n_steps))


def list_attempts(run_dir: Path) -> list[Path]:
    """Return the folders of a run's attempts, oldest first."""
    folder = run_dir / "attempts"
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if folder.is_dir() else []


@dataclass(frozen=True)
class RunState:
    """What the records say of a run. `step` is the last one recorded, None where unknown."""

    state: State
    reason: str
    step: int | None
    n_attempts: int


def run_state(run_dir: Path, run: RunRecord) -> RunState:
    """Derive a run's state: its summaries, else the newest outcome, else a live attempt, else planned."""
    attempts = list_attempts(run_dir)
    if not list_pending_cells(run_dir, run):
        return RunState("done", "", run.n_trunk_steps, len(attempts))
    if not attempts:
        return RunState("planned", "", None, 0)
    newest = attempts[-1]
    if (newest / "outcome.json").exists():
        outcome = read_json(newest / "outcome.json")
        if outcome["state"] == "done":  # and yet cells are pending: the plan was extended since
            return RunState("planned", "extended", outcome["step"], len(attempts))
        return RunState(outcome["state"], outcome["reason"], outcome["step"], len(attempts))
    if is_attempt_live(newest):
        return RunState("running", "", None, len(attempts))
    return RunState("failed", "ended without an outcome record: killed, or the machine went down", None, len(attempts))


def is_attempt_live(attempt_dir: Path) -> bool:
    """Say whether an attempt without an outcome still runs: its process on this host, else a fresh heartbeat."""
    try:
        attempt = read_json(attempt_dir / "attempt.json")
    except FileNotFoundError:
        return age_of(attempt_dir) < STALE_S  # claimed a moment ago, its record not yet written
    if attempt["host"] == os.uname().nodename:
        return is_process_alive(attempt["pid"], attempt["pid_start"])
    beats = list(attempt_dir.glob("heartbeat-*"))
    return bool(beats) and min(age_of(beat) for beat in beats) < STALE_S


def age_of(path: Path) -> float:
    """Return the seconds since a file or folder was last changed, by this host's clock."""
    import time

    return time.time() - path.stat().st_mtime


def read_process_start(pid: int) -> str | None:
    """Return a process's start in clock ticks since boot, which tells a reused pid apart; None if gone or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def is_process_alive(pid: int, pid_start: str | None) -> bool:
    """Say whether the process that recorded this pid still runs on this host."""
    if Path("/proc/self/stat").exists():
        return read_process_start(pid) == pid_start is not None
    try:  # no /proc (macOS): a reused pid cannot be told apart
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def iter_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield a run's metric rows in order of step, attempts merged: for work done twice the highest attempt wins.

    Note: a torn last line, left by a kill, is dropped.
    """
    merged: dict[tuple[str | None, str, int], dict[str, Any]] = {}
    for attempt in list_attempts(run_dir):
        for row in read_rows(attempt / "metrics.jsonl"):
            merged[(row["cell_id"], row["kind"], row["step"])] = row
    yield from sorted(merged.values(), key=lambda row: (row["step"], row["kind"], row["cell_id"] or ""))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file up to its first torn line."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


@dataclass(frozen=True)
class Code:
    """Which code runs: a hash of its files, and where it comes from in git (None outside a repository)."""

    code_hash: str
    commit: str | None
    dirty: bool | None


def list_code_files(root: Path) -> list[Path]:
    """Return the Python files that a job can import, by name."""
    return sorted(path for package in CODE_PACKAGES for path in (root / package).rglob("*.py"))


def hash_code(root: Path) -> str:
    """Return a digest of the paths and contents of the code files."""
    digest = hashlib.sha256()
    for path in list_code_files(root):
        digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def describe_code(root: Path) -> Code:
    """Say which code stands at `root`: a snapshot by its record, a checkout by git."""
    code_hash, record = hash_code(root), root / "snapshot.json"
    if record.exists():
        snapshot = read_json(record)
        if snapshot["code_hash"] != code_hash:
            raise ConfigError(f"{root}: code_hash={code_hash}, the snapshot was edited; remove that folder and submit again")
        return Code(code_hash, snapshot["commit"], snapshot["dirty"])
    commit, status = run_git(root, "rev-parse", "HEAD"), run_git(root, "status", "--porcelain", "--", *CODE_PACKAGES)
    return Code(code_hash, commit, None if commit is None or status is None else bool(status))


def run_git(root: Path, *arguments: str) -> str | None:
    """Return what a git command prints, or None where there is no git or no repository."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def snapshot_code(experiment_dir: Path, root: Path | None = None) -> Path:
    """Copy the code that jobs will run to code/<code_hash>/, uncommitted changes included, and return that folder."""
    root = root or find_code_root()
    code = describe_code(root)
    target = experiment_dir / "code" / code.code_hash
    if (target / "snapshot.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staging-"))
    try:
        for path in list_code_files(root):
            copy = staging / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        write_json(staging / "snapshot.json", {"code_hash": code.code_hash, "commit": code.commit, "dirty": code.dirty})
        staging.rename(target)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not (target / "snapshot.json").exists():  # else another submission has just published the same copy
            raise
    return target


def find_code_root() -> Path:
    """Return the folder that holds the packages that are running now."""
    return Path(__file__).resolve().parent.parent
