"""Run an experiment on this machine: longest runs first, one per slot, each a process that runs the code snapshot."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live

from harness.attempt import RunBusyError
from harness.records import Plan, RunRecord
from harness.runs import list_attempts, list_pending_cells, run_state, snapshot_code
from launch.cluster import Cluster, list_slots
from launch.progress import RunProgress, describe_counts, read_progress, render_line, render_page
from launch.supervise import POLL_S, Place, Supervision, build_environment

PLAIN_LINE_S = 10.0  # between lines where the output is not a terminal


@dataclass
class Local:
    """An experiment being run on this machine."""

    experiment_dir: Path
    plan: Plan
    code_dir: Path
    slots: list[str | None]
    n_threads: int | None
    queue: list[RunRecord]
    jobs: dict[int, Supervision] = field(default_factory=dict)  # by slot
    stopping: bool = False

    def hear_stop(self, _number: int, _frame: FrameType | None) -> None:
        """Pass a wish to stop on to the jobs, which save and end; a second one kills them."""
        for job in self.jobs.values():
            job.stop()
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
            cluster.n_threads,
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
    for slot in sorted(set(range(len(local.slots))) - set(local.jobs)):
        for _ in range(len(local.queue)):
            if local.stopping:
                return
            run = local.queue.pop(0)
            run_dir = local.experiment_dir / run.run_id
            if not list_pending_cells(run_dir, run):
                continue  # another process has finished it meanwhile
            job = Supervision(run_dir, run, describe_place(local, run, slot))
            try:
                job.start()
            except RunBusyError:
                local.queue.append(run)
                continue
            local.jobs[slot] = job
            break


def describe_place(local: Local, run: RunRecord, slot: int) -> Place:
    """Return where a slot's run trains: the code snapshot, on this machine."""
    environment = build_environment(local.n_threads, local.slots[slot])
    return Place(local.code_dir, ranks_per_node=run.how.engine.world_size or 1, environment=environment)


def reap(local: Local) -> None:
    """Move every job on, and take those that are over off their slots."""
    for slot, job in list(local.jobs.items()):
        try:
            is_over = not job.poll()
        except (RunBusyError, OSError) as error:  # it was to start again, and another process was quicker, or the disk is full
            print(f"{job.run.run_id}: {error}", file=sys.stderr)
            is_over = True
        if is_over:
            del local.jobs[slot]


def report_end(progress: list[RunProgress], experiment_dir: Path) -> int:
    """Print what is done and name the cause of everything that is not; return the exit status."""
    print(describe_counts(progress))
    failed = [run for run in progress if run.state.state != "done"]
    for run in failed:
        logs = [attempt / "log" for attempt in list_attempts(experiment_dir / run.run.run_id)]
        where = f" (log: {logs[-1]})" if logs else ""
        print(f"{run.run.run_id}: {run.state.state}: {run.state.reason}{where}", file=sys.stderr)
    return 1 if failed else 0
