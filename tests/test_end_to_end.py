"""The whole way by the commands a user types, on a grid of seconds: calm, repeated, interrupted, killed, extended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_layering import run_blocked

SIZES = ["{ n_layer = 1, n_head = 2, d_model = 8 }", "{ n_layer = 1, n_head = 2, d_model = 16 }"]
TOKENS = [128 * 500, 128 * 1000]
DETERMINISTIC = (
    "val_loss",
    "val_loss_best",
    "train_loss",
    "receipt",
    "weights_sha256",
    "tokens",
    "steps",
    "skipped_steps",
)


def write_toml(folder: Path, data_dir: Path, sizes: list[str] = SIZES, tokens: list[int] = TOKENS, lr: str = "3e-3") -> Path:
    path = folder / "tiny.toml"
    path.write_text(
        f"""
name = "tiny"
precision = "fp32"
data = {{ dir = "{data_dir}", seq_len = 16, max_epochs = 50 }}
model = {{ preset = "nanogpt" }}
optim = {{ lr = {lr}, global_batch_size = 8 }}
schedule = {{ kind = "wsd", warmup_tokens = 1_280 }}
eval = {{ every_tokens = 12_800 }}
engine = {{ device = "cpu", checkpoint_every_s = 0.2 }}
track = {{ log_every_steps = 5 }}
[grid]
sizes = [{", ".join(sizes)}]
tokens = {tokens}
"""
    )
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def call(folder: Path, *arguments: str, status: int = 0) -> str:
    """Run a command of the project, demand its exit status, and return what it printed."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, f"{arguments}: {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in out + err
    return out + err


def read_table(folder: Path) -> dict[str, list[object]]:
    """Return the deterministic columns of every finished cell."""
    summaries = [json.loads(path.read_text()) for path in folder.glob("runs/tiny/*/cells/*/summary.json")]
    return {summary["cell_id"]: [summary[key] for key in DETERMINISTIC] for summary in summaries}


def count_attempts(folder: Path) -> int:
    return len(list(folder.glob("runs/tiny/*/attempts/*/attempt.json")))


def wait_for_steps(folder: Path, n_rows: int) -> None:
    """Wait until the running runs have logged some steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        logs = list(folder.glob("runs/tiny/*/attempts/*/metrics.jsonl"))
        if sum(len(path.read_text().splitlines()) for path in logs) >= n_rows:
            return
        time.sleep(0.05)
    raise AssertionError("no step was logged within a minute")


def iter_job_pids(folder: Path) -> Iterator[int]:
    for path in folder.glob("runs/tiny/*/attempts/*/attempt.json"):
        if not (path.parent / "outcome.json").exists():
            yield json.loads(path.read_text())["pid"]


@pytest.fixture(scope="module")
def calm(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment trained without disturbance."""
    folder = tmp_path_factory.mktemp("calm")
    write_toml(folder, data_dir)
    assert "4 of 4 cells done" in call(folder, "launch", "submit", "tiny.toml")
    return folder


def test_a_second_submit_trains_nothing(calm: Path) -> None:
    before, attempts, started = read_table(calm), count_attempts(calm), time.monotonic()
    assert call(calm, "launch", "submit", "tiny.toml").strip() == "4 of 4 cells done"
    assert time.monotonic() - started < 10
    assert count_attempts(calm) == attempts
    assert read_table(calm) == before
    assert "4 of 4 cells done" in call(calm, "launch", "status", "tiny.toml")


def test_the_report_is_written_without_torch(calm: Path) -> None:
    """Four cells cannot hold five parameters: the page says so, and is written all the same."""
    result = run_blocked(["torch", "deepspeed"], "results", "report", "tiny.toml", cwd=calm)
    assert result.returncode == 0, result.stderr
    summary = result.stdout.strip().splitlines()[-5:]
    assert [line.split(":")[0] for line in summary] == ["exponents", "E", "cells", "compute", "wall time"]
    assert "4 of 4 done" in summary[2]
    page = (calm / "runs/tiny/results/report.html").read_text()
    assert "too few" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert all(cell_id in page for cell_id in read_table(calm))
    assert "too few" in call(calm, "results", "fit", "tiny.toml", status=2)


def test_jobs_run_the_snapshot(calm: Path) -> None:
    (snapshot,) = calm.glob("runs/tiny/code/*/snapshot.json")
    code_hash = json.loads(snapshot.read_text())["code_hash"]
    rows = [json.loads(path.read_text()) for path in calm.glob("runs/tiny/*/cells/*/summary.json")]
    assert {row["code_hash"] for row in rows} == {code_hash} == {snapshot.parent.name}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_experiment_ends_with_the_same_table(
    calm: Path, data_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    write_toml(tmp_path, data_dir)
    process = start(tmp_path, "launch", "submit", "tiny.toml")
    wait_for_steps(tmp_path, 12)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0
        assert "stopped: " in out
        assert "submit again to go on" in out
    assert len(read_table(tmp_path)) < 4, "the signal came too late to test anything"
    assert "4 of 4 cells done" in call(tmp_path, "launch", "submit", "tiny.toml")
    assert read_table(tmp_path) == read_table(calm)
    outcomes = [json.loads(p.read_text())["state"] for p in tmp_path.glob("runs/tiny/*/attempts/*/outcome.json")]
    assert "preempted" in outcomes, "launcher gone or not, the jobs saved before they ended"


def test_a_killed_job_is_started_again_and_goes_on(calm: Path, data_dir: Path, tmp_path: Path) -> None:
    write_toml(tmp_path, data_dir)
    process = start(tmp_path, "launch", "submit", "tiny.toml")
    wait_for_steps(tmp_path, 12)
    victim = next(iter_job_pids(tmp_path))
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "killed by SIGKILL; once more" in out
    assert count_attempts(tmp_path) == 3, "the other run was left alone"
    assert read_table(tmp_path) == read_table(calm)


def test_a_grid_submitted_twice_at_once_is_trained_once(calm: Path, data_dir: Path, tmp_path: Path) -> None:
    write_toml(tmp_path, data_dir)
    first, second = (start(tmp_path, "launch", "submit", "tiny.toml") for _ in range(2))
    for process in (first, second):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, f"{out}\n{err}"
        assert "4 of 4 cells done" in out
    assert count_attempts(tmp_path) == 2, "one a run"
    assert read_table(tmp_path) == read_table(calm)


def test_a_larger_grid_trains_only_what_is_new(calm: Path, data_dir: Path, tmp_path: Path) -> None:
    sizes = [*SIZES, "{ n_layer = 2, n_head = 2, d_model = 16 }"]
    write_toml(tmp_path, data_dir)
    call(tmp_path, "launch", "submit", "tiny.toml")
    before, attempts = read_table(tmp_path), count_attempts(tmp_path)
    write_toml(tmp_path, data_dir, sizes=sizes)
    assert "6 of 6 cells done" in call(tmp_path, "launch", "submit", "tiny.toml")
    assert count_attempts(tmp_path) == attempts + 1, "one run for the new size"
    write_toml(tmp_path, data_dir, sizes=sizes, tokens=[*TOKENS, 128 * 1300])
    assert "9 of 9 cells done" in call(tmp_path, "launch", "submit", "tiny.toml")
    assert count_attempts(tmp_path) == attempts + 4, "each trunk goes on once"
    longer = [json.loads(p.read_text()) for p in tmp_path.glob("runs/tiny/*/cells/*166k*/summary.json")]
    assert len(longer) == 3
    for row in longer:  # 800: where the old trunk ended; 1,040: the new branch point
        path = tmp_path / f"runs/tiny/{row['run_id']}/attempts/{row['attempts']}/metrics.jsonl"
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert 800 < min(steps) <= 1040
    assert {key: read_table(tmp_path)[key] for key in before} == before == read_table(calm)


def test_bad_input_ends_in_one_line_and_status_2(data_dir: Path, tmp_path: Path) -> None:
    write_toml(tmp_path, data_dir)
    for arguments, expected in [
        (("launch", "submit", "no.toml"), "no.toml: there is no such file"),
        (("launch", "submit", "tiny.toml", "--cluster", "x"), "--cluster=x, there is no x.toml"),
        (("launch", "submit", "tiny.toml", "--set", "optim.l=1"), "unknown key optim.l; did you mean optim.lr?"),
        (("launch", "submit", "tiny.toml", "--set", 'data.dir="none"'), "none: no manifest.json"),
        (("launch", "status", "tiny.toml"), "there is no plan"),
        (("harness", "train", "runs/tiny/x"), "there is no such run"),
        (("harness.train", "runs/tiny/x"), "there is no such run"),
        (("harness", "sample", "runs/tiny/x"), "there is no such run"),
        (("model", "describe", "gpt5"), "is not a published size"),
    ]:
        text = call(tmp_path, *arguments, status=2)
        assert expected in text
        assert len(text.strip().splitlines()) == 1, text
        assert not (tmp_path / "runs").exists(), "nothing was written"


def test_a_damaged_shard_is_named_before_anything_is_trained(data_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    write_toml(tmp_path, copy)
    shard = copy / "train/00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    text = call(tmp_path, "launch", "submit", "tiny.toml", status=2)
    assert "train/00000.bin: manifest says" in text
    assert not (tmp_path / "runs").exists()
    shard.unlink()
    assert "but the file is missing" in call(tmp_path, "harness", "plan", "tiny.toml", status=2)


def test_a_trained_cell_writes_text(calm: Path) -> None:
    cell = max(calm.glob("runs/tiny/*/cells/*"), key=lambda path: path.name)
    arguments = ("harness", "sample", str(cell), "--prompt", "ab ", "--tokens", "40", "--seed", "1")
    text = call(calm, *arguments)
    assert text.startswith("ab ")
    assert len(text.strip("\n")) == 43
    assert call(calm, *arguments) == text
    assert "'Z'" in call(calm, "harness", "sample", str(cell), "--prompt", "Z", status=2)
