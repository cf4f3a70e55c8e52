"""What can go wrong while ranks train: real processes, real torchrun, real signals, a real full disk.

Each case ends in the table of an undisturbed run, or in an outcome that names its cause. `faulty.py` lets the faults happen.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, plan_into, read_summaries
from watched import describe, place_ranks, read_log, read_outcome, read_table, train_watched

from data_prep.shards import load_manifest
from harness.checkpoint import describe_file, find_fault, list_checkpoints, list_corrupt, read_manifest
from harness.records import hash_record
from harness.runs import iter_metrics, list_attempts, read_json, write_json

pytestmark = pytest.mark.timeout(900)  # a minute where nothing else runs

CPU = {"device": "cpu"}
HOOKS = ("save_begin", "file_written", "before_manifest", "before_publish", "after_publish", "before_row")
QUICK_SAVES = {"device": "cpu", "checkpoint_every_s": 0.001}  # at every step


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": stage, "device": "cpu", **more}


Calm = Callable[..., list[list[Any]]]


@pytest.fixture(scope="session")
def calm(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """Return the table of an undisturbed run with these ranks and sections; each is trained once."""
    tables: dict[str, list[list[Any]]] = {}

    def train(n_ranks: int = 1, **sections: Any) -> list[list[Any]]:
        key = json.dumps([n_ranks, sections], sort_keys=True)
        if key not in tables:
            run_dir = plan_into(tmp_path_factory.mktemp("calm"), data_dir, **sections)
            assert train_watched(run_dir, place_ranks(n_ranks)) == ["done"], read_log(run_dir)
            tables[key] = read_table(run_dir)
        return tables[key]

    return train


# Kills


def test_a_killed_rank_is_named_and_the_run_goes_on(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """Rank 1 of two is killed in step 9 of 12: the other notices, both start again, and nothing differs in the end."""
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    place = place_ranks(2, {"at": "step:8", "do": "kill", "rank": 1, "attempt": 1})
    assert train_watched(run_dir, place) == ["failed/killed", "done"]
    outcome = read_outcome(run_dir, 0)
    assert outcome["rank"] == 1
    assert "rank 1 (pid" in outcome["reason"]
    assert "died without a record" in outcome["reason"]
    assert read_table(run_dir) == calm(2, engine=CPU)


def test_a_kill_at_any_place_of_a_save_costs_nothing(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """One after another, in one run that saves at every step: wherever it is killed, it goes on and ends as if calm."""
    run_dir = plan_into(tmp_path, data_dir, engine=QUICK_SAVES)
    kills = [{"at": hook, "do": "kill", "attempt": n, "n": 1 if n % 2 else 0} for n, hook in enumerate(HOOKS[:-1], start=1)]
    kills.append({"at": "before_row", "do": "kill", "attempt": len(HOOKS)})
    states: list[str] = []
    while "done" not in states and len(states) < 12:
        states += train_watched(run_dir, place_ranks(1, *kills))
    assert states == ["failed/killed"] * len(HOOKS) + ["done"]
    assert read_table(run_dir) == calm(1, engine=CPU)
    assert not list(run_dir.rglob(".corrupt-*")), "a kill spoils no checkpoint"


@pytest.mark.ranks
@pytest.mark.parametrize("engine", [zero(1), zero(3)])
def test_every_rank_killed_at_any_place_of_a_save(calm: Calm, data_dir: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={**engine, "checkpoint_every_s": 0.001})
    kills = [{"at": hook, "do": "kill", "attempt": n, "n": n % 2} for n, hook in enumerate(HOOKS, start=1)]
    kills += [{"at": "before_row", "do": "kill", "attempt": len(HOOKS), "n": 0}]
    states: list[str] = []
    while "done" not in states and len(states) < 12:
        states += train_watched(run_dir, place_ranks(2, *kills))
    assert states[-1] == "done"
    assert states.count("failed/killed") == len(HOOKS)
    assert read_table(run_dir) == calm(2, engine=engine)
    assert not list(run_dir.rglob(".corrupt-*"))


@pytest.mark.ranks
def test_rank_0_killed(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    assert train_watched(run_dir, place_ranks(2, {"at": "step:8", "do": "kill", "rank": 0, "attempt": 1}))[-1] == "done"
    assert read_outcome(run_dir, 0)["rank"] == 0
    assert read_table(run_dir) == calm(2, engine=CPU)


@pytest.mark.ranks
def test_the_agent_killed_leaves_no_orphans(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """Ranks without their agent save at the same step and leave, and the run is started again."""
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    kill = {"at": "step:8", "do": "signal", "signal": "SIGKILL", "to": "agent", "rank": 0, "attempt": 1, "s": 1.1}
    assert train_watched(run_dir, place_ranks(2, kill)) == ["preempted", "done"]
    assert read_outcome(run_dir, 0)["reason"] in ("torchrun's agent is gone", "another rank was asked to stop")
    assert read_table(run_dir) == calm(2, engine=CPU)


@pytest.mark.ranks
def test_a_slow_rank_killed_while_it_saves_publishes_nothing(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """The other rank's file is there already: half a checkpoint, which DeepSpeed's own `latest` would name."""
    run_dir = plan_into(tmp_path, data_dir, engine=zero(1, checkpoint_every_s=0.001))
    faults = [{"at": "file_written", "do": "sleep", "s": 1.0, "rank": 1, "n": 3, "attempt": 1}]
    faults += [{"at": "file_written", "do": "kill", "rank": 1, "n": 3, "attempt": 1}]
    assert train_watched(run_dir, place_ranks(2, *faults)) == ["failed/killed", "done"]
    assert "in save" in read_outcome(run_dir, 0)["reason"]
    assert read_table(run_dir) == calm(2, engine=zero(1))


def test_a_run_that_always_fails_at_one_step_is_given_up(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    states = train_watched(run_dir, place_ranks(1, {"at": "step:2", "do": "raise"}))
    assert states == ["failed/exception"] * 3
    outcome = read_outcome(run_dir)
    assert outcome["reason"] == "ZeroDivisionError: says the test"
    assert outcome["step"] == 2
    assert any("faulty.py" in line for line in outcome["error"])


# Signals


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("number", "to"),
    [
        ("SIGTERM", "rank"),
        ("SIGTERM", "agent"),
        ("SIGINT", "agent"),
        ("SIGUSR2", "agent"),
        ("SIGHUP", "rank"),
        ("SIGTERM", "all"),
    ],
)
def test_a_signal_to_anyone_stops_all_ranks_at_one_step(calm: Calm, data_dir: Path, tmp_path: Path, number: str, to: str) -> None:
    """Where all are signalled, torchrun passes it on once more: still one wish."""
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    faults = [{"at": "step:8", "do": "signal", "signal": number, "to": who, "rank": 1, "s": 0.5} for who in ("agent", "rank")]
    asked = faults if to == "all" else [fault for fault in faults if fault["to"] == to]
    assert train_watched(run_dir, place_ranks(2, *asked)) == ["preempted"]
    (step,) = [step for step in list_checkpoints(run_dir / "checkpoints") if step > 6]
    assert step >= 9
    assert read_outcome(run_dir)["step"] == step
    assert train_watched(run_dir, place_ranks(2)) == ["done"]
    assert read_table(run_dir) == calm(2, engine=CPU)


@pytest.mark.ranks
def test_a_signal_during_a_save_does_not_spoil_it(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=zero(2, checkpoint_every_s=0.001))
    signals = [{"at": "file_written", "do": "signal", "signal": "SIGTERM", "rank": rank, "n": 2} for rank in (0, 1)]
    assert train_watched(run_dir, place_ranks(2, *signals)) == ["preempted"]
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert find_fault(run_dir / "checkpoints" / str(newest)) is None
    assert train_watched(run_dir, place_ranks(2)) == ["done"]
    assert read_table(run_dir) == calm(2, engine=zero(2))


@pytest.mark.ranks
def test_too_little_time_for_a_save_is_told_and_the_last_checkpoint_stands(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    faults = [{"at": "step:8", "do": "signal", "signal": "SIGTERM", "to": "agent", "rank": 0, "attempt": 1}]
    faults += [{"at": "file_written", "do": "sleep", "s": 20.0, "rank": 0, "n": 1, "attempt": 1}]
    place = place_ranks(2, *faults, environment={"PET_SHUTDOWN_TIMEOUT": "2"})
    assert train_watched(run_dir, place, once=True) == ["failed/killed"]
    assert "a save needs more time" in read_outcome(run_dir, 0)["reason"]
    assert train_watched(run_dir, place_ranks(2))[-1] == "done"
    assert read_table(run_dir) == calm(2, engine=CPU)


# Hangs


@pytest.mark.ranks
def test_a_stopped_rank_is_taken_for_a_hang(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={**CPU, "hang_after_s": 3.0})
    started = time.monotonic()
    states = train_watched(run_dir, place_ranks(2, {"at": "step:8", "do": "pause", "rank": 1, "attempt": 1}))
    assert states == ["failed/hang", "done"]
    assert time.monotonic() - started < 60
    assert "agree" in (list_attempts(run_dir)[0] / "stacks-0").read_text() or "backward" in read_stacks(run_dir, 0)
    assert read_table(run_dir) == calm(2, engine=CPU)


@pytest.mark.ranks
def test_a_hang_shows_where_every_rank_is(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={**CPU, "hang_after_s": 3.0})
    states = train_watched(run_dir, place_ranks(2, {"at": "step:8", "do": "loop", "rank": 1, "attempt": 1}))
    assert states == ["failed/hang", "done"]
    assert "spin_for_ever" in read_stacks(run_dir, 1)
    assert "train_segment" in read_stacks(run_dir, 0)
    assert "no rank went on for" in read_outcome(run_dir, 0)["reason"]
    assert read_table(run_dir) == calm(2, engine=CPU)


def read_stacks(run_dir: Path, rank: int) -> str:
    return (list_attempts(run_dir)[0] / f"stacks-{rank}").read_text()


@pytest.mark.ranks
def test_a_straggler_is_named_and_waited_for(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    slow = [{"at": f"step:{step}", "do": "sleep", "s": 0.6, "rank": 1} for step in range(16)]
    assert train_watched(run_dir, place_ranks(2, *slow)) == ["done"]
    assert "straggler: rank 1 (pid" in read_log(run_dir)
    assert f"on {os.uname().nodename}" in read_log(run_dir)
    assert read_table(run_dir) == calm(2, engine=CPU)


# Numbers, memory, disk


def spoil(what: str, steps: list[int], rank: int = 1) -> list[dict[str, Any]]:
    return [{"at": f"step:{step}", "do": "spoil", "what": what, "rank": rank} for step in steps]


@pytest.mark.ranks
def test_a_bad_number_on_one_rank_is_left_out_by_all(data_dir: Path, tmp_path: Path) -> None:
    """A NaN loss and an infinite gradient, each on rank 1 only: no update, counted, receipts whole, and the ranks stay equal."""
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    place = place_ranks(2, *spoil("loss", [3]), *spoil("gradient", [8]))
    assert train_watched(run_dir, place) == ["done"], read_log(run_dir)
    rows = [row for row in iter_metrics(run_dir) if row["kind"] == "train" and row["cell_id"] is None]
    assert [row["skipped_steps"] for row in rows] == [0] * 3 + [1] * 5 + [2] * 4
    assert rows[3]["train_loss"] is None
    assert [summary["skipped_steps"] for summary in read_summaries(run_dir)] == [1, 2]


def test_bad_numbers_without_end_are_divergence(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={**CPU, "max_skipped_steps": 2})
    assert train_watched(run_dir, place_ranks(1, *spoil("gradient", [1, 2, 3], rank=0))) == ["diverged"]
    assert read_outcome(run_dir)["reason"] == "step 4: loss=" + read_outcome(run_dir)["reason"].split("loss=")[1]
    assert "max_skipped_steps=2 is used up" in read_outcome(run_dir)["reason"]
    assert [row["skipped_steps"] for row in iter_metrics(run_dir) if row["kind"] == "train"] == [0, 1, 2], "kept as data"


@pytest.mark.ranks
def test_out_of_memory_on_one_rank_halves_the_micro_batch(data_dir: Path, tmp_path: Path) -> None:
    whole = plan_into(tmp_path / "whole", data_dir, engine=CPU)
    assert train_watched(whole, place_ranks(2)) == ["done"]
    run_dir = plan_into(tmp_path / "broken", data_dir, engine=CPU)
    states = train_watched(run_dir, place_ranks(2, {"at": "step:8", "do": "oom", "rank": 1, "attempt": 1}))
    assert states == ["oom", "done"]
    assert read_outcome(run_dir, 0)["rank"] == 1
    assert read_json(run_dir / "attempts/2/attempt.json")["micro_batch_size"] == 2
    for one, other in zip(iter_metrics(whole), iter_metrics(run_dir), strict=True):
        assert one.get("receipt") == other.get("receipt"), "the same samples in the same order"
        for key in {"train_loss", "val_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("engine", [CPU, zero(1)])
def test_one_ranks_full_disk_is_every_ranks(calm: Calm, data_dir: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={**engine, "checkpoint_every_s": 0.001})
    rank = 0 if engine is CPU else 1  # who writes files
    refuse = {"at": "file_written", "do": "refuse", "errno": "ENOSPC", "rank": rank, "n": 2, "attempt": 1}
    assert train_watched(run_dir, place_ranks(2, refuse)) == ["disk_full"], "not tried again"
    assert "make room and start again" in read_outcome(run_dir)["reason"]
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert find_fault(run_dir / "checkpoints" / str(newest)) is None
    assert train_watched(run_dir, place_ranks(2)) == ["done"]
    assert read_table(run_dir) == calm(2, engine=engine)


def test_an_odd_refusal_of_the_disk_is_tried_again(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=QUICK_SAVES)
    refuse = {"at": "file_written", "do": "refuse", "errno": "EIO", "n": 3, "attempt": 1}
    assert train_watched(run_dir, place_ranks(1, refuse)) == ["failed/exception", "done"]
    assert read_table(run_dir) == calm(1, engine=CPU)


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something at a folder, or skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.ranks
@pytest.mark.parametrize(("n_ranks", "engine"), [(1, CPU), (2, zero(2))])
def test_a_really_full_disk(calm: Calm, data_dir: Path, tmp_path: Path, n_ranks: int, engine: dict[str, Any]) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        run_dir = plan_into(disk, data_dir, engine={**engine, "checkpoint_every_s": 0.001})
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(ballast, ballast.stat().st_size - 40 * 4096)  # enough for records and about one checkpoint
        states = train_watched(run_dir, place_ranks(n_ranks))
        assert states == ["disk_full"], read_log(run_dir)
        for step in list_checkpoints(run_dir / "checkpoints"):
            assert find_fault(run_dir / "checkpoints" / str(step)) is None
        ballast.unlink()
        assert train_watched(run_dir, place_ranks(n_ranks)) == ["done"]
        assert read_table(run_dir) == calm(n_ranks, engine=engine)


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path / "runs", data_dir, engine=CPU)
    with mounted(tmp_path / "runs", "--bind", "-o", "ro", str(tmp_path / "runs")):
        command = [sys.executable, "-m", "launch.supervise", str(run_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list_attempts(run_dir) == []


# Data


def test_a_corrupt_shard_is_named_and_not_tried_again(data_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    (shard, *_) = load_manifest(copy).splits["train"].shards
    run_dir = plan_into(tmp_path / "runs", copy, engine=CPU)
    path = copy / "train" / "00000.bin"
    content = path.read_bytes()
    path.write_bytes(b"\xff\xff" * (len(content) // 2))
    assert train_watched(run_dir, place_ranks(1)) == ["failed/data"]
    assert "token id 65535 in samples 0 to 7, is not in the vocabulary" in read_outcome(run_dir)["reason"]
    path.write_bytes(content[:-2])
    assert train_watched(run_dir, place_ranks(1)) == ["failed/data"]
    assert "00000.bin: manifest says" in read_outcome(run_dir)["reason"]
    assert shard.tokens * 2 == len(content)


@pytest.mark.ranks
def test_data_that_one_rank_alone_cannot_read_stops_all(data_dir: Path, tmp_path: Path) -> None:
    """The bad ids lie where only rank 1 reads in the first step."""
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    run_dir = plan_into(tmp_path / "runs", copy, engine=CPU)
    from data_prep.sampler import WindowSampler

    n_tokens = load_manifest(copy).splits["train"].tokens
    start = int(WindowSampler(n_tokens, 16, 0).starts(np.array([6]))[0])
    path = copy / "train" / "00000.bin"
    content = bytearray(path.read_bytes())
    content[2 * start + 8 : 2 * start + 10] = b"\xff\xff"
    path.write_bytes(content)
    assert train_watched(run_dir, place_ranks(2)) == ["failed/data"]
    assert read_outcome(run_dir)["rank"] == 1
    assert "token id 65535" in read_outcome(run_dir)["reason"]


# Checkpoints that were spoilt, other worlds, two at once


@pytest.mark.ranks
@pytest.mark.parametrize(("n_ranks", "engine"), [(1, CPU), (2, zero(1)), (2, zero(3))])
def test_a_flipped_bit_in_any_file_costs_one_checkpoint(
    calm: Calm, data_dir: Path, tmp_path: Path, n_ranks: int, engine: dict[str, Any]
) -> None:
    stop = {"at": "step:8", "do": "signal", "signal": "SIGTERM", "rank": 0}
    stopped = plan_into(tmp_path / "stopped", data_dir, engine={**engine, "checkpoint_every_s": 0.001})
    assert train_watched(stopped, place_ranks(n_ranks, stop)) == ["preempted"]
    newest = list_checkpoints(stopped / "checkpoints")[-1]
    names = sorted(p.relative_to(stopped) for p in (stopped / "checkpoints" / str(newest)).rglob("*") if p.is_file())
    assert len(names) >= 3
    for name in names:
        content = bytearray((stopped / name).read_bytes())
        content[len(content) // 2] ^= 1
        spoilt = tmp_path / name.as_posix().replace("/", "-") / stopped.name
        shutil.copytree(stopped, spoilt)
        (spoilt / name).write_bytes(content)
        fault = find_fault(spoilt / "checkpoints" / str(newest))
        assert fault is not None
        assert name.name in fault
    assert train_watched(spoilt, place_ranks(n_ranks)) == ["done"]
    assert f"{newest} is not usable" in read_log(spoilt)
    assert len(list_corrupt(spoilt / "checkpoints")) == 1
    assert read_table(spoilt) == calm(n_ranks, engine=engine)


@pytest.mark.ranks
def test_code_planted_in_a_zero_checkpoint_is_never_run(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """DeepSpeed's loader would run it; here with a manifest that agrees, as somebody who can write the folder would leave it."""
    run_dir = plan_into(tmp_path / "runs", data_dir, engine=zero(1, checkpoint_every_s=0.001))
    assert train_watched(run_dir, place_ranks(2, {"at": "step:8", "do": "signal", "signal": "SIGTERM", "rank": 0})) == [
        "preempted"
    ]
    newest = run_dir / "checkpoints" / str(list_checkpoints(run_dir / "checkpoints")[-1])
    planted = next(newest.rglob("*_optim_states.pt"))
    content = torch.load(planted, weights_only=False)
    canary = tmp_path / "canary"
    torch.save({**content, "extra": Malice(f"open({str(canary)!r}, 'w').close()")}, planted)
    torch.load(planted, weights_only=False)
    assert canary.exists(), "what is planted works"
    canary.unlink()
    manifest = read_manifest(newest)
    manifest["files"][planted.relative_to(newest).as_posix()] = describe_file(planted)
    write_json(newest / "manifest.json", {**manifest, "digest": hash_record(manifest)})
    assert train_watched(run_dir, place_ranks(2)) == ["done"]
    assert "names builtins.eval, which no checkpoint needs" in read_log(run_dir)
    assert not canary.exists()
    assert read_table(run_dir) == calm(2, engine=zero(1))


class Malice:
    """Pickles as a call of eval."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, (self.text,))


@pytest.mark.ranks
@pytest.mark.parametrize("engine", [CPU, *(zero(stage) for stage in range(4))])
def test_a_run_stopped_again_and_again_ends_to_the_bit(
    calm: Calm, data_dir: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """At the first step, before and after the branch point and in either cooldown; accumulation and dropout on."""
    sections = {"engine": {**engine, "micro_batch_size": 2}, "model": {"preset": "nanogpt", "dropout": 0.1}}
    run_dir = plan_into(tmp_path, data_dir, **sections)
    asked = {"do": "signal", "signal": "SIGTERM", "rank": 1}
    stops = [{**asked, "at": f"step:{step}", "attempt": n} for n, step in enumerate([0, 4, 6, 9, 13], start=1)]
    states = [state for _ in range(6) for state in train_watched(run_dir, place_ranks(2, *stops))]
    assert states == ["preempted"] * 5 + ["done"]
    assert read_table(run_dir) == calm(2, **sections)


def test_a_run_whose_checkpoints_are_all_spoilt_does_not_begin_anew(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=QUICK_SAVES)
    assert train_watched(run_dir, place_ranks(1, {"at": "step:4", "do": "signal", "signal": "SIGTERM"})) == ["preempted"]
    for path in run_dir.glob("checkpoints/*/engine.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        assert train_watched(run_dir, place_ranks(1)) == ["failed/config"]
        assert "none is valid" in read_outcome(run_dir)["reason"]


@pytest.mark.ranks
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_torch_goes_on_at_another_world_size(data_dir: Path, tmp_path: Path, before: int, after: int) -> None:
    check_reshape(data_dir, tmp_path, CPU, before, after, allow_reshape=False)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "before", "after", "precision"),
    [
        (1, 2, 1, "fp32"),
        (2, 1, 2, "fp32"),
        (3, 2, 1, "fp32"),
        (3, 1, 2, "fp32"),
        (1, 2, 1, "bf16_native"),
        (3, 2, 1, "bf16_native"),
    ],
)
def test_zero_goes_on_at_another_world_size_when_told(
    data_dir: Path, tmp_path: Path, stage: int, before: int, after: int, precision: str
) -> None:
    check_reshape(data_dir, tmp_path, zero(stage), before, after, allow_reshape=True, precision=precision)


def check_reshape(
    data_dir: Path, tmp_path: Path, engine: dict[str, Any], before: int, after: int, *, allow_reshape: bool, **sections: Any
) -> None:
    """Stop on some ranks, go on with others, and compare every step with a run that was never stopped."""
    whole = plan_into(tmp_path / "whole", data_dir, engine=engine, **sections)
    assert train_watched(whole, place_ranks(before)) == ["done"]
    run_dir = plan_into(tmp_path / "changed", data_dir, engine=engine, **sections)
    stop = {"at": "step:8", "do": "signal", "signal": "SIGTERM", "rank": 0}
    assert train_watched(run_dir, place_ranks(before, stop)) == ["preempted"]
    if allow_reshape:
        assert train_watched(run_dir, place_ranks(after)) == ["failed/config"]
        assert f"start it on {before}, or with --allow-reshape" in read_outcome(run_dir)["reason"]
    assert train_watched(run_dir, place_ranks(after, allow_reshape=allow_reshape)) == ["done"], read_log(run_dir)
    tolerance = 1e-5 if sections.get("precision", "fp32") == "fp32" else 1e-2
    for one, other in zip(iter_metrics(whole), iter_metrics(run_dir), strict=True):
        assert one.get("receipt") == other.get("receipt")
        for key in {"train_loss", "val_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)


@pytest.mark.ranks
def test_another_engine_in_mid_run_is_refused(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    assert train_watched(run_dir, place_ranks(1, {"at": "step:8", "do": "signal", "signal": "SIGTERM"})) == ["preempted"]
    plan_into(tmp_path, data_dir, engine=zero(1))
    assert train_watched(run_dir, place_ranks(1)) == ["failed/config"]
    assert "engine=torch, this run has deepspeed" in read_outcome(run_dir)["reason"]


@pytest.mark.ranks
def test_the_stale_of_two_attempts_stops_and_publishes_nothing(calm: Calm, data_dir: Path, tmp_path: Path) -> None:
    """As when a scheduler gives a node up whose processes live on: both train at the same time, one is fenced off."""
    from harness.runs import load_run
    from launch.supervise import Supervision

    run_dir = plan_into(tmp_path, data_dir, engine=QUICK_SAVES)
    slow = [{"at": f"step:{step}", "do": "sleep", "s": 0.5, "attempt": 1} for step in range(3, 16)]
    stale = Supervision(run_dir, load_run(run_dir), place_ranks(1, *slow))
    stale.start()
    while not (run_dir / "checkpoints/3").exists():
        assert stale.poll()
        time.sleep(0.05)
    fresh = Supervision(run_dir, load_run(run_dir), place_ranks(1), take_over=True)
    fresh.start()
    while stale.poll():
        time.sleep(0.05)
    while fresh.poll():
        time.sleep(0.05)
    assert [describe(attempt) for attempt in list_attempts(run_dir)] == ["failed/lease", "done"]
    assert "a later attempt has taken this run over" in read_outcome(run_dir, 0)["reason"]
    assert read_table(run_dir) == calm(1, engine=CPU)
    assert {summary["attempts"] for summary in read_summaries(run_dir)} == {2}


def test_a_second_signal_ends_a_job_at_once(data_dir: Path, tmp_path: Path) -> None:
    """`launch.supervise` is asked twice while its rank would take a minute to stop."""
    run_dir = plan_into(tmp_path, data_dir, engine=CPU)
    code = "import sys; from pathlib import Path; from watched import place_ranks; from launch.supervise import supervise\n"
    code += "place = place_ranks(1, {'at': 'step:2', 'do': 'sleep', 's': 60.0})\nsys.exit(supervise(Path(sys.argv[1]), place))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(iter_metrics(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None, "the rank sleeps in its step"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 1
    assert "second wish to stop" in read_outcome(run_dir)["reason"]
