"""A grid under random kills of ranks, agents and the launcher itself ends as an undisturbed one.

A minute in the suite; HARNESS_SOAK_S=600 for ten: as many rounds of the grid as fit. `-s` shows what happened.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from watched import DETERMINISTIC

from harness.attempt import ATTEMPT_VARIABLE
from harness.runs import read_json

SECONDS = float(os.environ.get("HARNESS_SOAK_S", "60"))
BETWEEN_KILLS_S = (1.0, 8.0)
GRID = """
name = "soak"
precision = "fp32"
data = {{ dir = "{data_dir}", seq_len = 16, max_epochs = 50 }}
model = {{ preset = "nanogpt", dropout = 0.1 }}
optim = {{ lr = 3e-3, global_batch_size = 8 }}
schedule = {{ kind = "wsd", warmup_tokens = 1_280 }}
eval = {{ every_tokens = 25_600 }}
engine = {{ device = "cpu", world_size = 2, micro_batch_size = 2, checkpoint_every_s = 0.5, hang_after_s = 20 }}
track = {{ log_every_steps = 20 }}
[grid]
sizes = [
  {{ n_layer = 1, n_head = 2, d_model = 8 }},
  {{ n_layer = 1, n_head = 2, d_model = 16 }},
  {{ n_layer = 2, n_head = 2, d_model = 16 }},
]
tokens = [64_000, 128_000]
"""


def submit(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch", "submit", "soak.toml"]
    with (folder / "submit.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def find_marked(folder: Path) -> list[tuple[int, str]]:
    """Return the processes of all attempts below a folder, with their command lines."""
    found, mark = [], f"{ATTEMPT_VARIABLE}={folder.resolve()}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if any(entry.startswith(mark) for entry in path.read_bytes().split(b"\0")):
                found.append((int(path.parent.name), (path.parent / "cmdline").read_text()))
        except OSError:
            continue  # gone meanwhile
    return found


def strike(folder: Path, launcher: subprocess.Popen[bytes], draw: random.Random) -> str | None:
    """Kill, or stop for good, one process at random; return what it was."""
    victims = [(pid, "agent" if "distributed.run" in line else "rank") for pid, line in find_marked(folder)]
    victims += [(launcher.pid, "launcher")]
    kinds = sorted({kind for _, kind in victims})
    kind = draw.choices(kinds, weights=[1 if kind == "launcher" else 4 for kind in kinds])[0]
    pid = draw.choice([pid for pid, other in victims if other == kind])
    deed = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], weights=[8, 2, 0 if kind == "launcher" else 1])[0]
    try:
        os.kill(pid, deed)
    except ProcessLookupError:
        return None
    return f"{kind} {deed.name}"


def train_grid(folder: Path, data_dir: Path, draw: random.Random | None, until: float) -> Counter[str]:
    """Train the grid until it is done, with strikes up to a moment where there is somebody to draw them; return those."""
    folder.mkdir()
    (folder / "soak.toml").write_text(GRID.format(data_dir=data_dir))
    strikes: Counter[str] = Counter()
    while True:
        launcher = submit(folder)
        while launcher.poll() is None:
            time.sleep(draw.uniform(*BETWEEN_KILLS_S) if draw is not None and time.monotonic() < until else 0.2)
            if draw is not None and time.monotonic() < until and launcher.poll() is None:
                strikes.update(filter(None, [strike(folder, launcher, draw)]))
        strikes["submissions"] += 1
        if launcher.returncode == 0 and len(read_table(folder)) == 6:
            return strikes
        assert draw is not None, (folder / "submit.log").read_text()[-2000:]
        assert strikes["submissions"] < 200, "the grid makes no progress"


def read_table(folder: Path) -> dict[str, list[Any]]:
    summaries = [read_json(path) for path in folder.glob("runs/soak/*/cells/*/summary.json")]
    return {summary["cell_id"]: [summary[key] for key in DETERMINISTIC] for summary in summaries}


def wait_for_quiet(folder: Path) -> list[tuple[int, str]]:
    """Return the processes that are left some seconds after the last command; none, it is hoped."""
    deadline = time.monotonic() + 20
    while (left := find_marked(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.mark.ranks
@pytest.mark.timeout(SECONDS + 900)
def test_a_grid_under_random_kills_ends_as_a_calm_one(data_dir: Path, tmp_path: Path) -> None:
    train_grid(tmp_path / "calm", data_dir, None, 0.0)
    calm = read_table(tmp_path / "calm")
    assert len(calm) == 6
    started, rounds, strikes, n_attempts = time.monotonic(), 0, Counter[str](), 0
    while time.monotonic() - started < SECONDS:
        folder = tmp_path / f"round-{rounds}"
        strikes += train_grid(folder, data_dir, random.Random(rounds), started + SECONDS)
        assert read_table(folder) == calm
        assert wait_for_quiet(folder) == [], "no orphan"
        assert not list(folder.rglob(".staging-*")), "nothing half published"
        assert not list(folder.rglob(".corrupt-*")), "a kill spoils no checkpoint"
        n_attempts += len(list(folder.glob("runs/soak/*/attempts/*")))
        rounds += 1
    took = f"{time.monotonic() - started:.0f} s: {rounds} rounds of 6 cells, {n_attempts} attempts"
    print(f"\n{took}, {dict(sorted(strikes.items()))}")
    assert sum(strikes.values()) > strikes["submissions"] + rounds
