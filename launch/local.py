"""Run an experiment on this machine: longest runs first, one per slot, each a process that runs the code snapshot."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live

from harness.attempt import RunBusyError, claim_attempt, write_outcome
from harness.records import Plan, RunRecord
from harness.runs import list_attempts, list_pending_cells, run_state, snapshot_code
from launch.cluster import Cluster, list_slots
from launch.progress import RunProgress, describe_counts, read_progress, render_line, render_page

POLL_S = 0.5
PLAIN_LINE_S = 10.0  # between lines where the output is not a terminal
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV")
ENVIRONMENT_PREFIXES = ("HARNESS_", "TORCH_", "CUDA_", "NCCL_")


@dataclass
class Job:
    """A run that this process started."""

    run: RunRecord
    attempt_dir: Path
    process: subprocess.Popen[bytes]
    slot: int


@dataclass
class Local:
    """An experiment being run on this machine."""

    experiment_dir: Path
    plan: Plan
    code_dir: Path
    slots: list[str | None]
    threads_per_slot: int
    queue: list[RunRecord]
    jobs: list[Job] = field(default_factory=list)
    stopping: bool = False

    def hear_stop(self, _number: int, _frame: FrameType | None) -> None:
        """Pass a wish to stop on to the jobs, which save and end; a second one kills them."""
        for job in self.jobs:
            (job.process.kill if self.stopping else job.process.terminate)()
        self.stopping = True


def submit(plan: Plan, experiment_dir: Path, cluster: Cluster) -> int:
    """Run all that is unfinished; when one fails the others go on. Returns the exit status, 1 if a cell is missing."""
    pending = [run for run in plan.runs if list_pending_cells(experiment_dir / run.run_id, run)]
    diverged = [run for run in pending if run_state(experiment_dir / run.run_id, run).state == "diverged"]
    queue = sorted((run for run in pending if run not in diverged), key=lambda run: run.flops, reverse=True)
    if queue:
        local = Local(
            experiment_dir,
            plan,
            snapshot_code(experiment_dir),
            list_slots(cluster),
            cluster.threads_per_slot,
            queue,
        )
        with listening(local):
            work(local)
        if local.stopping:
            print(f"stopped: {describe_counts(read_progress(experiment_dir, plan))}; submit again to go on")
            return 0
    return report_end(read_progress(experiment_dir, plan), experiment_dir)


@contextlib.contextmanager
def listening(local: Local) -> Iterator[None]:
    """Hear Ctrl-C and SIGTERM for as long as jobs run."""
    before = {number: signal.signal(number, local.hear_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(local: Local) -> None:
    """Keep the slots busy until the queue is empty and every job has ended."""
    console, last_line = Console(), 0.0
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while local.jobs or (local.queue and not local.stopping):
            fill_slots(local)
            time.sleep(POLL_S)
            reap(local)
            if live is None and time.monotonic() - last_line < PLAIN_LINE_S:
                continue
            last_line = time.monotonic()
            progress = read_progress(local.experiment_dir, local.plan)
            if live is not None:
                live.update(render_page(local.plan.experiment, progress), refresh=True)
            else:
                print(render_line(progress), flush=True)


def fill_slots(local: Local) -> None:
    """Start queued runs on free slots; one that another process is running waits at the end of the queue."""
    for slot in sorted(set(range(len(local.slots))) - {job.slot for job in local.jobs}):
        for _ in range(len(local.queue)):
            if local.stopping:
                return
            run = local.queue.pop(0)
            run_dir = local.experiment_dir / run.run_id
            if not list_pending_cells(run_dir, run):
                continue  # another process has finished it meanwhile
            try:
                attempt_dir = claim_attempt(run_dir)
            except RunBusyError:
                local.queue.append(run)
                continue
            local.jobs.append(Job(run, attempt_dir, start_job(local, run_dir, attempt_dir, slot), slot))
            break


def start_job(local: Local, run_dir: Path, attempt_dir: Path, slot: int) -> subprocess.Popen[bytes]:
    """Start the training process of one attempt, with the code snapshot and an allow-listed environment."""
    gpu, threads = local.slots[slot], str(local.threads_per_slot)
    environment = {key: value for key, value in os.environ.items() if key in ENVIRONMENT or key.startswith(ENVIRONMENT_PREFIXES)}
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, "-m", "harness.train", str(run_dir.resolve())]
    command += ["--attempt-dir", str(attempt_dir.resolve()), "--parent-pid", str(os.getpid())]
    with (attempt_dir / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=local.code_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
        )


def reap(local: Local) -> None:
    """Take ended jobs off their slots; one that left no outcome gets one that says how it died."""
    for job in [job for job in local.jobs if job.process.poll() is not None]:
        local.jobs.remove(job)
        if not (job.attempt_dir / "outcome.json").exists():
            reason = describe_death(job)
            try:
                write_outcome(job.attempt_dir, "failed", reason, None)
            except OSError as error:  # the disk that failed the job
                print(f"{job.run.run_id}: {reason}; its outcome cannot be recorded: {error}", file=sys.stderr)


def describe_death(job: Job) -> str:
    """Say why a process that left no record ended: its signal, or its status and last words."""
    status = job.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    words = (job.attempt_dir / "log").read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit status {status}: {words[0] if words else 'no output'}"


def report_end(progress: list[RunProgress], experiment_dir: Path) -> int:
    """Print what is done and name the cause of everything that is not; return the exit status."""
    print(describe_counts(progress))
    failed = [run for run in progress if run.state.state != "done"]
    for run in failed:
        logs = [attempt / "log" for attempt in list_attempts(experiment_dir / run.run.run_id)]
        where = f" (log: {logs[-1]})" if logs else ""
        print(f"{run.run.run_id}: {run.state.state}: {run.state.reason}{where}", file=sys.stderr)
    return 1 if failed else 0
