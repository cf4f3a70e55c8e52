"""The whole trainer beside nanoGPT's train.py on this CPU: real processes in turn, steps timed from what each writes itself.

nanoGPT runs from a copy of the checkout by the command of its README for a CPU, with the shape's numbers in it: float32, no
compile. Ours runs as a job does, in bf16 autocast, and is ended once the rows are there. Both read the same tokens.
"""

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import SPLITS, TokenShards, load_manifest
from harness.bench import BETAS, GRAD_CLIP, LR, WEIGHT_DECAY, Shape
from harness.config import ConfigError, parse_experiment
from harness.plan import plan_experiment
from harness.runs import find_code_root, read_rows, write_plan

N_WARM = 5  # steps of each process that are not counted
BLOCK_STEPS = {"toy": 60, "char": 8, "bpe": 4}
TIMEOUT_S = 300.0
ITERATION = re.compile(r"^iter (\d+): loss [\d.]+, time ([\d.]+)ms", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """What is compared: a shape, in steps a process, several processes at a time, each with so many threads."""

    shape: Shape
    n_steps: int
    n_threads: int
    n_at_once: int


def compare_trainers(setting: Setting, nanogpt: Path, data_dir: Path, n_blocks: int) -> tuple[list[float], list[float]]:
    """Return tokens per second of each block, ours and nanoGPT's, all processes of a block together.

    Raises:
        ConfigError: the checkout or the data is not what it should be.
    """
    if not (nanogpt / "train.py").is_file():
        raise ConfigError(f"--nanogpt={nanogpt}: has no train.py; give a checkout of nanoGPT")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy_nanogpt(nanogpt, work / "nanogpt", data_dir)
        ours: list[float] = []
        theirs: list[float] = []
        for block in range(n_blocks):
            sides = [(ours, run_ours), (theirs, run_theirs)]
            for speeds, run_side in sides if block % 2 else reversed(sides):
                speeds.append(run_side(setting, work, data_dir, block))
    return ours, theirs


def copy_nanogpt(nanogpt: Path, target: Path, data_dir: Path) -> None:
    """Copy what train.py needs, with our tokens in its format beside it."""
    shutil.copytree(nanogpt, target, ignore=shutil.ignore_patterns(".git", "data", "assets", "*.ipynb"))
    manifest, data = load_manifest(data_dir), target / "data" / "bench"
    data.mkdir(parents=True)
    for split in SPLITS:
        shards = TokenShards.open(data_dir, split, manifest)
        shards.read(0, shards.n_tokens).astype("<u2").tofile(data / f"{split}.bin")
    if manifest.tokenizer.kind != "gpt2":  # without this file train.py takes GPT-2's vocabulary, padded to 50,304
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": manifest.vocab_size}))


def run_theirs(setting: Setting, work: Path, _data_dir: Path, _block: int) -> float:
    """Run train.py, and return tokens per second from the times in its log."""
    shape, n_iters = setting.shape, N_WARM + setting.n_steps
    options = {
        "device": "cpu",
        "compile": False,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "log_interval": 1,
        "block_size": shape.seq_len,
        "batch_size": shape.batch_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.d_model,
        "max_iters": n_iters,
        "lr_decay_iters": n_iters,
        "dropout": 0.0,
        "dataset": "bench",
    }
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *(f"--{k}={v}" for k, v in options.items())]
    processes = [start(command, work / "nanogpt", setting.n_threads, subprocess.PIPE) for _ in range(setting.n_at_once)]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    return sum(read_speed(shape, [float(ms) / 1000 for _, ms in ITERATION.findall(output)], output) for output in outputs)


def run_ours(setting: Setting, work: Path, data_dir: Path, block: int) -> float:
    """Run the trainer as a job, and return tokens per second from its own rows."""
    n_rows, jobs = N_WARM + setting.n_steps, []
    for number in range(setting.n_at_once):
        run_dir = plan_ours(setting.shape, data_dir, work / f"runs-{block}-{number}")
        command = [sys.executable, "-m", "harness.train", str(run_dir)]
        jobs.append((run_dir, start(command, find_code_root(), setting.n_threads, subprocess.DEVNULL)))
    deadline = time.monotonic() + TIMEOUT_S
    rows: list[list[dict[str, Any]]] = [[]]
    while min(len(of_job) for of_job in rows) < n_rows and time.monotonic() < deadline:
        time.sleep(0.1)
        rows = [read_rows(run_dir / "attempts/1/metrics.jsonl") for run_dir, _ in jobs]
        if any(process.poll() is not None for _, process in jobs):
            break
    for _, process in jobs:
        process.kill()
        process.wait()
    return sum(read_speed(setting.shape, [row["step_s"] for row in of_job[:n_rows]], "its log") for of_job in rows)


def start(command: list[str], folder: Path, n_threads: int, output: int) -> "subprocess.Popen[str]":
    """Start a process with so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads), "MKL_NUM_THREADS": str(n_threads)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def read_speed(shape: Shape, seconds: list[float], output: str) -> float:
    """Return tokens per second of the median step behind the warm ones."""
    if len(seconds) <= N_WARM:
        raise ConfigError(f"a process took {len(seconds)} steps and no more; it said: {output[-300:]}")
    return shape.batch_size * shape.seq_len / statistics.median(seconds[N_WARM:])


def plan_ours(shape: Shape, data_dir: Path, runs_dir: Path) -> Path:
    """Plan the same training for our side, with a row for every step; return the run's folder."""
    table = {
        "name": "bench",
        "precision": "bf16_autocast",
        "data": {"dir": str(data_dir.resolve()), "seq_len": shape.seq_len, "max_epochs": 1e9},
        "model": {"preset": "nanogpt"},
        "optim": {
            "lr": LR,
            "betas": list(BETAS),
            "weight_decay": WEIGHT_DECAY,
            "grad_clip": GRAD_CLIP,
            "global_batch_size": shape.batch_size,
        },
        "schedule": {"kind": "constant"},
        "grid": {"sizes": [{"n_layer": shape.n_layer, "n_head": shape.n_head, "d_model": shape.d_model}], "steps": [10**6]},
        "engine": {"device": "cpu"},
        "track": {"log_every_steps": 1},
    }
    plan = plan_experiment(parse_experiment(table, where="bench"))
    return write_plan(plan, runs_dir) / plan.runs[0].run_id


def render_trainers(name: str, setting: Setting, ours: list[float], theirs: list[float]) -> str:
    """Write a comparison as one row in Markdown."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    shape = setting.shape
    what = f"{name}: {shape.n_layer} layers, width {shape.d_model}, block {shape.seq_len}, batch {shape.batch_size}"
    speeds = f"{statistics.median(theirs):,.0f} | {statistics.median(ours):,.0f}"
    processes = f"{setting.n_at_once} x {setting.n_threads}"
    return f"| {what} | {processes} | {speeds} | {median:.2f} ({low:.2f} to {high:.2f}) | {len(ours)} |"
