"""Train one run under watch: start its ranks, see that they advance, settle how they ended, start again where that helps.

    python -m launch.supervise RUN_DIR [--nodes N --ranks-per-node R --head HOST] [--prefix "srun ..."]

The prefix is put before the command that starts a node's ranks; in a SLURM job, "srun --ntasks-per-node=1 ...".
Exit status: 0 done or stopped cleanly, 1 failed, 2 bad input.
"""

import argparse
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from harness.attempt import ATTEMPT_VARIABLE, claim_attempt, find_patience_s
from harness.config import run_command_line
from harness.ending import describe_rank, make_outcome, read_heartbeat, release_reserve, settle_outcome, write_outcome
from harness.records import RunRecord
from harness.runs import (
    find_cell_dir,
    find_code_root,
    is_process_alive,
    list_attempts,
    list_pending_cells,
    load_run,
    read_json,
    write_json,
)

POLL_S = 0.5
RELAUNCHES = 2  # after failures in a row that bring no further checkpoint
FAIL_GRACE_S = 30.0  # for the other ranks to end by themselves after one has
SLOW_RATIO, SLOW_S, SLOW_BEATS = 1.5, 0.02, 3  # a straggler: by this factor, by so many seconds a step, so often in a row
HANG_MARGIN_S = 2.0  # for a silent rank to write its stacks down first
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV")
ENVIRONMENT_PREFIXES = ("HARNESS_", "TORCH_", "CUDA_", "NCCL_", "GLOO_", "DS_", "PET_")
# torchrun's agent passes every stop signal on to the ranks and then waits for them, as long as a save may take.
AGENT_ENVIRONMENT = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2", "PET_SHUTDOWN_TIMEOUT": "3600"}
PORTS = range(20_000, 30_000)  # below the ephemeral ones


@dataclass(frozen=True)
class Place:
    """Where the ranks of a run are started, and by what."""

    code_dir: Path
    n_nodes: int = 1
    ranks_per_node: int = 1
    head: str = "localhost"  # the host of the rendezvous, where there are several nodes
    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "harness.train"
    allow_reshape: bool = False  # ZeRO's parts, where a checkpoint was written by another number of ranks

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.n_nodes * self.ranks_per_node


def build_environment(n_threads: int | None = None, gpu: str | None = None) -> dict[str, str]:
    """Return what a job gets to see of this process's environment: names of a list, so that no secret comes along."""
    seen = {key: value for key, value in os.environ.items() if key in ENVIRONMENT or key.startswith(ENVIRONMENT_PREFIXES)}
    threads = {"OMP_NUM_THREADS": str(n_threads), "MKL_NUM_THREADS": str(n_threads)} if n_threads is not None else {}
    return (
        AGENT_ENVIRONMENT
        | seen
        | threads
        | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        | {"PYTHONUNBUFFERED": "1"}
    )


def render_command(place: Place, run_dir: Path, attempt_dir: Path, micro_batch_size: int | None) -> list[str]:
    """Return the command that starts the ranks: the prefix, torchrun where there are several, and the trainer."""
    command = [*place.prefix, sys.executable, "-m"]
    if place.world_size > 1:
        command += ["torch.distributed.run", f"--nnodes={place.n_nodes}", f"--nproc-per-node={place.ranks_per_node}"]
        command += ["--max-restarts=0", *render_rendezvous(place, attempt_dir), "-m"]
    command += [place.module, str(run_dir), "--attempt-dir", str(attempt_dir)]
    if not place.prefix:
        command += ["--parent-pid", str(os.getpid())]
    command += ["--allow-reshape"] if place.allow_reshape else []
    return command + (["--micro-batch-size", str(micro_batch_size)] if micro_batch_size is not None else [])


def render_rendezvous(place: Place, attempt_dir: Path) -> list[str]:
    """Return torchrun's options of a rendezvous that no other attempt shares."""
    if place.n_nodes == 1:
        return ["--standalone"]
    name = f"{attempt_dir.parent.parent.name}.{attempt_dir.name}"
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={place.head}:{find_port(name)}", f"--rdzv-id={name}"]


def find_port(name: str) -> int:
    """Return a port that follows from a name, the next one where it is taken on this host."""
    first = zlib.crc32(name.encode()) % len(PORTS)
    for offset in range(100):
        port = PORTS[(first + offset) % len(PORTS)]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    return PORTS[first]


@dataclass
class Supervision:
    """A run, as long as this process trains it; `poll` moves it on and never waits."""

    run_dir: Path
    run: RunRecord
    place: Place
    take_over: bool = False
    attempt_dir: Path = field(default=Path(), init=False)
    process: subprocess.Popen[bytes] = field(init=False, repr=False)
    stopping: bool = field(default=False, init=False)
    n_fruitless: int = field(default=0, init=False)  # failures since the last progress
    mark: tuple[int, int] = field(default=(0, 0), init=False)  # progress when the present attempt began
    beats: dict[int, Any] = field(default_factory=dict, init=False)
    last_change: float = field(default=0.0, init=False)
    ended_at: float | None = field(default=None, init=False)  # when a rank was first seen to have failed, or the command ended
    n_slow: tuple[int | None, int] = field(default=(None, 0), init=False)  # the slowest rank, and for how many beats in a row
    verdict: str | None = field(default=None, init=False)  # why this process killed the ranks

    def start(self) -> None:
        """Claim the next attempt and start its ranks.

        Raises:
            RunBusyError: another process trains this run.
        """
        self.attempt_dir = claim_attempt(self.run_dir, take_over=self.take_over).resolve()
        self.take_over = False
        self.mark = measure_progress(self.run_dir, self.run)
        self.beats, self.last_change, self.ended_at, self.verdict = {}, time.monotonic(), None, None
        micro_batch_size = choose_micro_batch(self.run_dir, self.run, self.place.world_size)
        command = render_command(self.place, self.run_dir.resolve(), self.attempt_dir, micro_batch_size)
        environment = {**self.place.environment, ATTEMPT_VARIABLE: str(self.attempt_dir)}
        self.process = start_process(command, self.place.code_dir, environment, self.attempt_dir)

    def stop(self) -> None:
        """Ask the ranks to save and end; the second time, end them."""
        if self.stopping:
            self.kill("ended at once by a second wish to stop")
        else:
            (self.attempt_dir / "stop_requested").touch()
        self.stopping = True

    def poll(self) -> bool:
        """Watch the ranks; when they have ended, settle the outcome, and start again where that helps. False: it is over."""
        if self.process.poll() is None or (self.verdict is None and find_processes(self.attempt_dir)):
            self.watch()
            return True
        for pid in find_processes(self.attempt_dir):
            os.kill(pid, signal.SIGKILL)
        outcome = self.settle()
        if self.stopping or not self.is_worth_another(outcome):
            return False
        print(
            f"{self.run.run_id}: attempt {self.attempt_dir.name} {outcome['state']}: {outcome['reason']}; once more", flush=True
        )
        self.start()
        return True

    def watch(self) -> None:
        """Kill the ranks where none has advanced for too long, or one has failed and the others do not end."""
        now, beats = time.monotonic(), read_heartbeats(self.attempt_dir)
        if beats != self.beats:
            self.beats, self.last_change = beats, now
            self.tell_straggler()
        phase = next((beat["phase"] for beat in beats.values()), "start")
        patience_s = find_patience_s(phase, self.run.how.engine.hang_after_s) + HANG_MARGIN_S
        if now - self.last_change > patience_s:
            self.kill(f"hang: no rank went on for {now - self.last_change:.0f} s in {phase}; stacks: {self.attempt_dir}/stacks-*")
        if self.ended_at is None and self.has_lost_rank():
            self.ended_at = now
        if self.ended_at is not None and now - self.ended_at > FAIL_GRACE_S:
            self.kill("")

    def tell_straggler(self) -> None:
        """Name a rank that keeps the others waiting, once an attempt; it goes on, since who is slow may not stay so."""
        rank = find_straggler({rank: beat["own_s"] for rank, beat in self.beats.items()})
        self.n_slow = (self.n_slow[0], self.n_slow[1] + 1) if rank == self.n_slow[0] else (rank, 1)
        if rank is not None and self.n_slow[1] == SLOW_BEATS:
            own = ", ".join(f"rank {r} {beat['own_s']:.3f} s" for r, beat in sorted(self.beats.items()))
            line = (
                f"straggler: {describe_rank(self.attempt_dir, rank)} keeps the others waiting; before they meet in a step: {own}"
            )
            print(f"{self.run.run_id}: {line}", flush=True)
            with (self.attempt_dir / "log").open("a") as log:
                log.write(f"{line}\n")

    def has_lost_rank(self) -> bool:
        """Say whether the command has ended, a rank has recorded a failure, or a rank of this host is gone."""
        if self.process.poll() is not None or any(self.attempt_dir.glob("outcome*.json")):
            return True
        here = [beat for beat in self.beats.values() if beat["host"] == os.uname().nodename]
        return any(not is_process_alive(beat["pid"], beat["pid_start"]) for beat in here)

    def kill(self, verdict: str) -> None:
        """End every process of the attempt on this host at once."""
        self.verdict = self.verdict or verdict
        for pid in find_processes(self.attempt_dir):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()

    def settle(self) -> dict[str, Any]:
        """Return the attempt's outcome; where the ranks left none, write the one that can be told from outside."""
        release_reserve(self.attempt_dir)
        for stacks in self.attempt_dir.glob("stacks-*"):
            if stacks.stat().st_size == 0:
                stacks.unlink()  # of a rank that did not hang
        path = self.attempt_dir / "outcome.json"
        if path.exists():
            return read_json(path)  # type: ignore[no-any-return]
        if self.verdict and self.verdict.startswith("hang"):
            step = max((beat["step"] for beat in self.beats.values()), default=None)
            outcome = make_outcome("failed", self.verdict, step, None, "hang", None)
        else:
            outcome = settle_outcome(self.attempt_dir, self.place.world_size, self.describe_death())
        try:
            write_json(path, outcome)
        except OSError as error:  # the disk that failed the job
            print(f"{self.run.run_id}: {outcome['reason']}; its outcome cannot be recorded: {error}", file=sys.stderr)
        return outcome

    def describe_death(self) -> str:
        """Say why a command that left no record ended: the wish, its signal, or its status and last words."""
        status, where = self.process.returncode, describe_rank(self.attempt_dir, 0)
        if self.verdict:
            return self.verdict
        if status < 0:
            return f"{where}: killed by {signal.Signals(-status).name}"
        lines = (self.attempt_dir / "log").read_text(errors="replace").splitlines()
        words = next((line for line in reversed(lines) if any(letter.isalpha() for letter in line)), "no output")
        return f"exit status {status}: {words.strip()}"

    def is_worth_another(self, outcome: dict[str, Any]) -> bool:
        """Say whether to start again: out of memory with smaller micro-batches, after a failure that may pass."""
        if outcome["state"] == "oom":
            return can_shrink(self.run, self.attempt_dir, self.place.world_size)
        lost_agent = outcome["state"] == "preempted" and self.process.returncode == -signal.SIGKILL
        if outcome["cause"] not in ("exception", "peer", "killed", "hang") and not lost_agent:
            return False
        progressed = measure_progress(self.run_dir, self.run) > self.mark
        self.n_fruitless = 0 if progressed else self.n_fruitless + 1
        return self.n_fruitless <= RELAUNCHES


def start_process(
    command: list[str], code_dir: Path, environment: Mapping[str, str], attempt_dir: Path
) -> subprocess.Popen[bytes]:
    """Start a command that writes to the attempt's log; Ctrl-C reaches only this process, which passes it on.

    Raises:
        OSError: it cannot be started, as the attempt's outcome then says.
    """
    with (attempt_dir / "log").open("ab") as log:
        try:
            return subprocess.Popen(
                command,
                cwd=code_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            write_outcome(attempt_dir, "failed", f"{command[0]}: {error}", None, "config")
            raise


def read_heartbeats(attempt_dir: Path) -> dict[int, Any]:
    """Return each rank's last sign of life, with its time, so that two equal ones differ."""
    beats = {}
    for path in attempt_dir.glob("heartbeat-*"):
        if beat := read_heartbeat(path):
            beats[int(path.name.rpartition("-")[2])] = {**beat, "at": path.stat().st_mtime_ns}
    return beats


def find_straggler(own_s: Mapping[int, float]) -> int | None:
    """Return the rank that takes much longer by itself than the others do in the middle, None where none does."""
    if len(own_s) < 2:
        return None
    slowest = max(own_s, key=lambda rank: own_s[rank])
    usual = statistics.median(seconds for rank, seconds in own_s.items() if rank != slowest)
    return slowest if own_s[slowest] > max(SLOW_RATIO * usual, usual + SLOW_S) else None


def find_processes(attempt_dir: Path) -> list[int]:
    """Return the processes of an attempt on this host, by the mark in their environment; none where there is no /proc."""
    mark, found = f"{ATTEMPT_VARIABLE}={attempt_dir}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return found


def measure_progress(run_dir: Path, run: RunRecord) -> tuple[int, int]:
    """Return how far a run is for good: its finished cells, and the newest checkpoint on its way."""
    pending = list_pending_cells(run_dir, run)
    folders = [run_dir / "checkpoints", *(find_cell_dir(run_dir, cell) / "checkpoints" for cell in pending)]
    steps = [max((int(p.name) for p in folder.glob("[0-9]*")), default=0) for folder in folders]
    return len(run.cells) - len(pending), sum(steps)


def choose_micro_batch(run_dir: Path, run: RunRecord, world_size: int) -> int | None:
    """Return a smaller micro-batch where an earlier attempt ran out of memory, None where the plan's will do."""
    failed = [attempt for attempt in list_attempts(run_dir) if read_state(attempt) == "oom"]
    return shrink_micro_batch(run, failed[-1], world_size) if failed else None


def read_state(attempt_dir: Path) -> str | None:
    """Return the state of an attempt's outcome."""
    path = attempt_dir / "outcome.json"
    return read_json(path)["state"] if path.exists() else None


def shrink_micro_batch(run: RunRecord, attempt_dir: Path, world_size: int) -> int:
    """Return the largest micro-batch of at most half that of an attempt; accumulation doubles, the order of samples stays."""
    share = run.what.optim.global_batch_size // world_size
    had = read_json(attempt_dir / "attempt.json").get("micro_batch_size") or run.how.engine.micro_batch_size or share
    return max(size for size in range(1, max(2, had // 2 + 1)) if share % size == 0)


def can_shrink(run: RunRecord, attempt_dir: Path, world_size: int) -> bool:
    """Say whether an attempt that ran out of memory had more than one sequence at a time."""
    had = read_json(attempt_dir / "attempt.json").get("micro_batch_size") or run.how.engine.micro_batch_size
    return (had or run.what.optim.global_batch_size // world_size) > 1


@contextmanager
def passing_on(supervision: Supervision) -> Iterator[None]:
    """Turn signals to this process into a wish to stop; a second one ends the ranks."""

    def hear(_number: int, _frame: FrameType | None) -> None:
        supervision.stop()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(run_dir: Path, place: Place, take_over: bool = False) -> int:
    """Train a run to its end or as far as it goes; return the exit status."""
    run = load_run(run_dir)
    if not list_pending_cells(run_dir, run):
        print(f"{run.run_id}: done")
        return 0
    supervision = Supervision(run_dir, run, place, take_over)
    supervision.start()
    with passing_on(supervision):
        while supervision.poll():
            time.sleep(POLL_S)
    outcome = supervision.settle()
    print(f"{run.run_id}: {outcome['state']}: {outcome['reason']}".rstrip(": "), flush=True)
    return 0 if outcome["state"] in ("done", "preempted") else 2 if outcome["cause"] in ("config", "data") else 1


def main() -> None:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="runs/<experiment>/<run_id>, as the plan wrote it")
    parser.add_argument("--code-dir", type=Path, default=find_code_root(), help="where the ranks' code lies (default: here)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--head", default="localhost", help="host of the rendezvous, where there are several nodes")
    parser.add_argument("--threads", type=int, help="CPU threads of each rank")
    parser.add_argument("--take-over", action="store_true", help="also from an attempt that seems alive: it must end")
    parser.add_argument("--allow-reshape", action="store_true", help="cut ZeRO's parts anew for another number of ranks")
    parser.add_argument("--prefix", default="", help="put before the command that starts a node's ranks, such as srun")
    given = parser.parse_args()
    place = Place(
        given.code_dir,
        given.nodes,
        given.ranks_per_node,
        given.head,
        tuple(shlex.split(given.prefix)),
        build_environment(given.threads),
        allow_reshape=given.allow_reshape,
    )
    sys.exit(supervise(given.run_dir, place, given.take_over))


if __name__ == "__main__":
    run_command_line(main)
