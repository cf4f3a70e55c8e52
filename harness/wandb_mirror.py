"""A copy of a run's rows for wandb, made by a process of its own that reads metrics.jsonl: it cannot stop or slow training.

One wandb run for each cell, in a group for the experiment, tokens as the horizontal axis. metrics.jsonl stays the truth: whatever
happens to wandb is told in one line, and `python -m harness mirror RUN_DIR` sends everything again. No torch.
"""

import argparse
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.records import CellRecord, RunRecord
from harness.runs import find_cell_dir, is_cell_done, list_attempts, load_run, read_json, write_json

PROJECT = "scaling-harness"  # unless WANDB_PROJECT names another
POLL_S = 1.0
GRACE_S = 10.0  # for the last rows after training has ended
LEFT_OUT = ("kind", "cell_id", "receipt")  # of a row; the rest are numbers

Mode = Literal["offline", "online"]


@dataclass(frozen=True)
class Mirror:
    """The mirror's process, seen from the trainer."""

    process: subprocess.Popen[bytes]
    run_dir: Path

    def close(self) -> None:
        """Wait a little for the last rows, which the mirror reads once the outcome is written; then leave without it."""
        try:
            status = self.process.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if status < 0:
            warn(f"the mirror's process ended by {signal.Signals(-status).name}", self.run_dir)


def start_mirror(run: RunRecord, run_dir: Path, attempt_dir: Path) -> Mirror | None:
    """Start mirroring an attempt, where the experiment asks for it, from rank 0."""
    if run.how.track.wandb == "off":
        return None
    if importlib.util.find_spec("wandb") is None:
        warn("it is not installed (pip install wandb)", run_dir)
        return None
    command = [sys.executable, "-m", "harness.wandb_mirror", str(run_dir), "--mode", run.how.track.wandb]
    command += ["--attempt-dir", str(attempt_dir), "--parent-pid", str(os.getpid())]
    try:
        with (attempt_dir / "wandb.log").open("ab") as chatter:
            return Mirror(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=chatter), run_dir)
    except OSError as error:
        warn(f"its process could not be started: {error}", run_dir)
        return None


def warn(reason: str, run_dir: Path) -> None:
    """Say in one line that the mirror is off, and how to send the rows later."""
    print(
        f"wandb: {reason}; training goes on without it and metrics.jsonl is whole: python -m harness mirror {run_dir} sends it",
        flush=True,
    )


class Tail:
    """The rows of a growing JSON-lines file, each once."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are complete and were not read before."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written, or torn by a kill
                self.offset += len(line)
                yield json.loads(line)


class Curve:
    """A cell's rows as they come: the trunk's up to its branch point, then its own.

    Work that is done again after a crash gives the same rows again; they are told once, so that the same cell always has
    the same rows in the same order.
    """

    def __init__(self, run_dir: Path, cell: CellRecord) -> None:
        self.cell = cell
        self.tails = [Tail(attempt / "metrics.jsonl") for attempt in list_attempts(run_dir)]
        self.seen: set[tuple[str, int]] = set()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are new."""
        for tail in self.tails:
            for row in tail.read():
                is_own = row["cell_id"] == self.cell.cell_id
                is_trunk = row["cell_id"] is None and row["step"] <= self.cell.branch_step
                if (is_own or is_trunk) and (row["kind"], row["step"]) not in self.seen:
                    self.seen.add((row["kind"], row["step"]))
                    yield row


@dataclass(frozen=True)
class Watch:
    """Whether the attempt that is mirrored still runs; without one everything is there already."""

    attempt_dir: Path | None
    parent_pid: int | None

    def is_over(self) -> bool:
        """Say whether no more rows will come."""
        if self.attempt_dir is None or (self.attempt_dir / "outcome.json").exists():
            return True
        return self.parent_pid is not None and os.getppid() != self.parent_pid

    def limit(self) -> None:
        """From a thread of its own: end this process when it hangs for long after the attempt is over."""
        while not self.is_over():
            time.sleep(POLL_S)
        time.sleep(GRACE_S)
        warn("did not take the last rows in time", Path(self.attempt_dir or ".").parent.parent)
        os._exit(1)


def mirror_run(run_dir: Path, mode: Mode, watch: Watch) -> None:
    """Copy the run's cells one after the other, following an attempt until it is over."""
    run = load_run(run_dir)
    for cell in sorted(run.cells, key=lambda cell: (cell.branch_step, cell.n_steps)):
        record = find_cell_dir(run_dir, cell) / "wandb.json"
        identity: dict[str, Any] = read_json(record) if record.exists() else {"id": uuid.uuid4().hex[:12], "is_complete": False}
        if watch.attempt_dir is not None and identity["is_complete"]:
            continue
        write_json(record, identity)
        if not mirror_cell(run, run_dir, cell, mode, identity["id"], watch):
            return
        write_json(record, {**identity, "is_complete": True})


def mirror_cell(run: RunRecord, run_dir: Path, cell: CellRecord, mode: Mode, identity: str, watch: Watch) -> bool:
    """Copy one cell; return whether it is done and copied whole.

    Note: the rows of a cell have a fixed order and each is one wandb step, so what the server holds says where to go on.
    Offline nothing is held, and every attempt's folder has the whole curve so far.
    """
    target = open_wandb_run(run, cell, mode, identity, watch.attempt_dir or run_dir)
    curve, n_known = Curve(run_dir, cell), int(target.step)
    while True:
        is_done, is_over = is_cell_done(run_dir, cell), watch.is_over()  # before the rows, so that none is missed
        for row in curve.read():
            if n_known > 0:
                n_known -= 1
            else:
                target.log({key: value for key, value in row.items() if key not in LEFT_OUT and value is not None})
        if is_done:
            summary = read_json(find_cell_dir(run_dir, cell) / "summary.json")
            target.summary.update({key: value for key, value in summary.items() if value is not None})
        if is_done or is_over:
            target.finish()
            check_written(target)
            return is_done
        time.sleep(POLL_S)


def open_wandb_run(run: RunRecord, cell: CellRecord, mode: Mode, identity: str, folder: Path) -> Any:  # noqa: ANN401 - wandb's
    """Open wandb's run of a cell. It gets the plan's numbers only: no paths, no host, no code, no environment."""
    import wandb

    target = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=run.experiment,
        name=cell.cell_id,
        id=identity,
        job_type=cell.role,
        mode=mode,
        resume="allow" if mode == "online" else None,
        dir=os.environ.get("WANDB_DIR", str(folder)),
        config={"cell": cell.model_dump(mode="json"), "what": run.what.model_dump(mode="json")},
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
    target.define_metric("tokens")
    target.define_metric("*", step_metric="tokens")
    return target


def check_written(target: Any) -> None:  # noqa: ANN401 - wandb's
    """Notice what wandb does not report: that its file could not be written.

    Raises:
        OSError: there is no file, or it is empty.
    """
    path = Path(target.settings.sync_file)
    if target.settings._offline and (not path.exists() or path.stat().st_size == 0):
        raise OSError(f"{path} was not written")


def main() -> None:
    """Mirror as the trainer asks; every failure is one line, and none is anybody else's."""
    parser = argparse.ArgumentParser(prog="python -m harness.wandb_mirror", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--mode", choices=["offline", "online"], default="offline")
    parser.add_argument("--attempt-dir", type=Path)
    parser.add_argument("--parent-pid", type=int)
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # they are the trainer's, whose end this process waits for
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    logging.raiseExceptions = False  # or a full disk is told a hundred times
    watch = Watch(arguments.attempt_dir, arguments.parent_pid)
    threading.Thread(target=watch.limit, daemon=True).start()
    try:
        mirror_run(arguments.run_dir, arguments.mode, watch)
    except Exception as error:
        warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", arguments.run_dir)
        sys.stdout.flush()
        os._exit(1)  # wandb's own clean-up may wait for a service that is gone
    os._exit(0)


if __name__ == "__main__":
    main()
