"""Shared ground for the tests: where real data lies, and small prepared data and plans of our own."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from harness.config import Experiment, parse_experiment
from harness.plan import plan_experiment
from harness.runs import find_cell_dir, load_plan, load_run, read_json, write_plan

ROOT = Path(__file__).resolve().parent.parent


def find_folder(variable: str) -> Path:
    """Return the folder that an environment variable names, or skip the test and say why."""
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder: real data is not on this machine")
    return Path(value)


@pytest.fixture
def corpora() -> Path:
    return find_folder("HARNESS_CORPORA")


@pytest.fixture
def fixtures() -> Path:
    return find_folder("HARNESS_FIXTURES")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30,000 characters of made-up words: enough to learn from, quick to prepare."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    (folder / "input.txt").write_text(" ".join(draw.choices(words, weights=range(1, 41), k=6000)))
    return prepare("text", folder / "data", input=folder / "input.txt").data_dir


def tiny_table(data_dir: Path, **sections: object) -> dict[str, object]:
    """Return an experiment of seconds as a mapping; keyword arguments replace whole sections."""
    table: dict[str, object] = {
        "name": "tiny",
        "precision": "fp32",
        "data": {"dir": str(data_dir), "seq_len": 16},
        "model": {"preset": "nanogpt"},
        "optim": {"lr": 3e-3, "global_batch_size": 8},
        "schedule": {"kind": "wsd", "warmup_tokens": 256, "cooldown_fraction": 0.25},
        "grid": {
            "sizes": [
                {"n_layer": 1, "n_head": 2, "d_model": 8},
                {"n_layer": 1, "n_head": 2, "d_model": 16},
            ],
            "tokens": [128 * 8, 128 * 16],
        },
        "eval": {"every_tokens": 128 * 4},
        "engine": {"device": "cpu"},
        "track": {"log_every_steps": 1},
    }
    return table | sections


def tiny_experiment(data_dir: Path, **sections: object) -> Experiment:
    return parse_experiment(tiny_table(data_dir, **sections), where="tiny.toml")


@pytest.fixture
def tiny_dir(data_dir: Path, tmp_path: Path) -> Path:
    """The folder of a planned experiment, nothing trained."""
    return write_plan(plan_experiment(tiny_experiment(data_dir)), tmp_path / "runs")


def plan_into(tmp_path: Path, data_dir: Path, **sections: object) -> Path:
    """Plan one small run with two budgets and return its folder."""
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 8, 128 * 16]}
    experiment_dir = write_plan(plan_experiment(tiny_experiment(data_dir, **{"grid": grid, **sections})), tmp_path)
    return experiment_dir / load_plan(experiment_dir).runs[0].run_id


def read_summaries(run_dir: Path) -> list[dict[str, Any]]:
    return [read_json(find_cell_dir(run_dir, cell) / "summary.json") for cell in load_run(run_dir).cells]
