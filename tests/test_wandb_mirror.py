"""wandb's copy of a run is whole, and nothing that happens to wandb reaches the training. wandb itself runs, with no network."""

import contextlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, plan_into, read_summaries
from test_train import stop_at_look

from harness import wandb_mirror
from harness.runs import iter_metrics, load_run, read_json, read_rows, run_state
from harness.train import run_attempt
from harness.wandb_mirror import Curve

CANARY = "canary" + "0" * 34
OFFLINE = {"log_every_steps": 1, "wandb": "offline"}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    torch.set_num_threads(1)


def iter_records(path: Path) -> Iterator[Any]:
    """Read what wandb wrote: LevelDB's log format behind seven bytes of wandb's own, one protobuf message a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        part += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(part)
            part = b""


def read_copy(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return wandb's description of a run and its rows, without wandb's own keys."""
    run, rows = None, []
    for record in iter_records(path):
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    assert run is not None
    return {"name": run.display_name, "group": run.run_group, "id": run.run_id}, rows


def find_copies(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every copy below a folder, by the cell's id."""
    found = [read_copy(path) for path in sorted(folder.rglob("*.wandb"))]
    assert all(facts["group"] == "tiny" for facts, _ in found)
    return {facts["name"]: rows for facts, rows in found}


def read_curve(run_dir: Path, cell: Any) -> list[dict[str, Any]]:
    rows = Curve(run_dir, cell).read()
    return [{k: v for k, v in row.items() if k not in wandb_mirror.LEFT_OUT and v is not None} for row in rows]


def test_every_cell_is_copied_whole_across_attempts(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = plan_into(tmp_path, data_dir, track=OFFLINE)
    with monkeypatch.context() as patch:
        stop_at_look(patch, 10)  # in the trunk, on the way to the second cell
        assert run_attempt(run_dir, None, None) == 0
    run = load_run(run_dir)
    first, second = run.cells
    assert read_json(run_dir / "cells" / first.cell_id / "wandb.json")["is_complete"] is True
    before = read_json(run_dir / "cells" / second.cell_id / "wandb.json")
    assert before["is_complete"] is False
    run_attempt(run_dir, None, None)
    assert read_json(run_dir / "cells" / second.cell_id / "wandb.json") == {**before, "is_complete": True}, "the same wandb run"
    assert find_copies(run_dir / "attempts/1")[first.cell_id] == read_curve(run_dir, first)
    assert list(find_copies(run_dir / "attempts/2")) == [second.cell_id], "what is complete is not opened again"
    copy = find_copies(run_dir / "attempts/2")[second.cell_id]
    assert copy == read_curve(run_dir, second)
    steps = [row["step"] for row in copy if "train_loss" in row]
    assert steps == list(range(1, 17)), "each step once, the trunk's too"
    assert "wandb:" not in capfd.readouterr().out
    for path in run_dir.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


def send(run_dir: Path) -> None:
    command = [sys.executable, "-m", "harness", "mirror", str(run_dir), "--mode", "offline"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=100)


def test_a_run_can_be_sent_later(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir)
    run_attempt(run_dir, None, None)
    send(run_dir)
    assert find_copies(run_dir) == {cell.cell_id: read_curve(run_dir, cell) for cell in load_run(run_dir).cells}


def test_without_wandb_there_is_one_warning(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest))
    run_dir = plan_into(tmp_path, data_dir, track=OFFLINE)
    assert run_attempt(run_dir, None, None) == 0
    assert capfd.readouterr().out.count("wandb: it is not installed (pip install wandb); training goes on") == 1


def test_work_done_twice_is_told_once_and_in_the_same_order(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir)
    cell = load_run(run_dir).cells[0]  # branches off at step 6, ends at 8

    def write(attempt: int, *rows: tuple[str | None, int], torn: str = "") -> None:
        folder = run_dir / "attempts" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"kind": "train", "cell_id": cell_id, "step": step, "of": attempt}) for cell_id, step in rows]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines) + torn)

    write(1, (None, 1), (None, 2), (None, 3), torn='{"kind": "tr')
    write(2, (None, 2), (None, 3), (None, 4))
    curve = Curve(run_dir, cell)
    assert [(row["step"], row["of"]) for row in curve.read()] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert list(curve.read()) == []
    write(2, (None, 6), (None, 7), ("another cell", 7), (cell.cell_id, 7))
    assert [(row["step"], row["cell_id"]) for row in curve.read()] == [(6, None), (7, cell.cell_id)]


def list_children(pid: int) -> list[int]:
    """Return a process's children; none of one that is gone, such as a git command that the trainer asked."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def find_service(trainer: int, patience_s: float = 60.0) -> int:
    """Wait for wandb's own process, a child of the mirror, which is a child of the trainer."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        for mirror in list_children(trainer):
            for child in list_children(mirror):
                if "wandb-core" in read_name(child):
                    return child
        time.sleep(0.05)
    raise AssertionError("wandb's service did not start")


@contextlib.contextmanager
def training(run_dir: Path, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """Train for as long as the context lasts, then stop it cleanly."""
    command = [sys.executable, "-m", "harness.train", str(run_dir)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with (
        (run_dir / "output").open("w") as output,
        subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True) as trainer,
    ):
        try:
            yield trainer
            (run_dir / "attempts/1/stop_requested").touch()
            assert trainer.wait(timeout=100) == 0
        finally:
            trainer.kill()


def let_train_on(run_dir: Path, n_rows: int = 10, patience_s: float = 60.0) -> None:
    """Wait until the training has written that many rows more."""
    path, end = run_dir / "attempts/1/metrics.jsonl", time.monotonic() + patience_s
    wanted = len(read_rows(path)) + n_rows
    while len(read_rows(path)) < wanted:
        assert time.monotonic() < end, "the training stands still"
        time.sleep(0.1)


def check_unharmed(run_dir: Path) -> None:
    """The training went on to where it was stopped, its record is whole, and one line says what became of wandb."""
    state, output = run_state(run_dir, load_run(run_dir)), (run_dir / "output").read_text()
    assert state.state == "preempted"
    steps = [row["step"] for row in iter_metrics(run_dir) if row["kind"] == "train"]
    assert steps == [1, *range(20, steps[-1] + 1, 20)]
    assert state.step - steps[-1] < 20
    assert output.count("wandb:") == 1, output
    assert "metrics.jsonl is whole: python -m harness mirror" in output
    assert "Traceback" not in output


def plan_endless(tmp_path: Path, data_dir: Path, mode: str = "offline") -> Path:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "steps": [10**7]}
    sections = {"grid": grid, "schedule": {"kind": "constant"}, "eval": {}, "track": {"log_every_steps": 20, "wandb": mode}}
    return plan_into(tmp_path, data_dir, **sections, data={"dir": str(data_dir), "seq_len": 16, "max_epochs": 1e6})


def test_wandbs_own_process_is_killed(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_endless(tmp_path, data_dir)
    with training(run_dir) as trainer:
        service = find_service(trainer.pid)
        let_train_on(run_dir)
        os.kill(service, signal.SIGKILL)
        let_train_on(run_dir)
    check_unharmed(run_dir)
    send(run_dir)
    (cell,) = load_run(run_dir).cells
    assert find_copies(run_dir / "wandb")[cell.cell_id] == read_curve(run_dir, cell)


@pytest.mark.slow
def test_a_signal_to_everybody_is_the_trainers(data_dir: Path, tmp_path: Path) -> None:
    """A scheduler's SIGTERM reaches every process of a job, and ends wandb's."""
    run_dir = plan_endless(tmp_path, data_dir)
    with training(run_dir) as trainer:
        service = find_service(trainer.pid)
        let_train_on(run_dir)
        for pid in (service, *list_children(trainer.pid), trainer.pid):
            os.kill(pid, signal.SIGTERM)
        trainer.wait(timeout=60)
    check_unharmed(run_dir)


@pytest.mark.slow
def test_wandbs_own_process_hangs(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_endless(tmp_path, data_dir)
    with training(run_dir) as trainer:
        service = find_service(trainer.pid)
        os.kill(service, signal.SIGSTOP)
        let_train_on(run_dir)
    os.kill(service, signal.SIGKILL)
    check_unharmed(run_dir)


@pytest.mark.slow
def test_the_network_is_gone(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_endless(tmp_path, data_dir, "online")
    with training(run_dir, WANDB_BASE_URL="http://127.0.0.1:9") as trainer:
        find_service(trainer.pid)
        let_train_on(run_dir)
        started = time.monotonic()
    assert time.monotonic() - started < 40, "nobody waits for a network"
    check_unharmed(run_dir)


@pytest.mark.slow
def test_the_disk_of_wandb_is_full(data_dir: Path, tmp_path: Path) -> None:
    folder, run_dir = tmp_path / "small", plan_endless(tmp_path, data_dir)
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root")
    try:
        with (folder / "fill").open("wb", buffering=0) as file:
            file.write(b"0" * 65536)
        with training(run_dir, WANDB_DIR=str(folder)) as trainer:
            find_service(trainer.pid)
            let_train_on(run_dir)
        check_unharmed(run_dir)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_numbers_are_those_without_wandb(data_dir: Path, tmp_path: Path) -> None:
    plain, mirrored = plan_into(tmp_path / "a", data_dir), plan_into(tmp_path / "b", data_dir, track=OFFLINE)
    assert plain.name == mirrored.name, "a copy is no part of what a run is"
    for run_dir in (plain, mirrored):
        run_attempt(run_dir, None, None)
    keys = ("val_loss", "receipt", "weights_sha256")
    one, other = ([[summary[key] for key in keys] for summary in read_summaries(d)] for d in (plain, mirrored))
    assert one == other
    assert read_summaries(plain)[0]["wandb_version"] is None
    assert read_summaries(mirrored)[0]["wandb_version"] is not None
