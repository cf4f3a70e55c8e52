"""The page that `fit` prints, through the command line: golden texts, its JSON, and each refusal in one line."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_experiment import write_experiment

from harness.config import run_command_line
from results.__main__ import app
from results.laws import Chinchilla

GOLDEN = Path(__file__).parent / "golden"
LAW = Chinchilla(1.8, 400, 2000, 0.34, 0.37)


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `python -m results` in this process, inside the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["results", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command_line(app)
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


def make_points(noise: float = 0.004) -> pd.DataFrame:
    """An isoFLOP grid of seven budgets with noise, a diverged cell, and one wild loss."""
    draw, slices = np.random.default_rng(0), []
    for flops in np.geomspace(1e17, 1e20, 7):
        n = LAW.allocate(flops).n_params * np.geomspace(1 / 6, 6, 7)
        slices.append(pd.DataFrame({"N": n / 1e6, "C": flops, "loss": LAW.loss(n, flops / 6 / n)}))
    points = pd.concat(slices, ignore_index=True)
    points["loss"] *= np.exp(noise * draw.normal(size=len(points)))
    points["note"] = "fine"
    points.loc[3, "loss"] = np.nan
    points.loc[10, ["loss", "note"]] = points.loc[10, "loss"] * 1.5, "spike"
    return points


MAPPED = ["--map", "n_params=N * 1e6", "--map", "flops=C", "--map", "val_loss=loss"]


def compare(name: str, text: str) -> None:
    """Compare with a golden file; `UPDATE_GOLDEN=1` writes it."""
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_the_page_is_the_golden_one_and_json_has_everything(run: Callable[..., Ended], tmp_path: Path) -> None:
    make_points().to_csv(tmp_path / "points.csv", index=False)
    chosen = ["--csv", "points.csv", *MAPPED, "--where", "note=fine", "--hold-out", "C>9e19"]
    page = run("fit", *chosen)
    assert page.returncode == 0, page.stderr
    compare("fit_page.txt", page.stdout)
    printed = run("fit", *chosen, "--json", "--out", "out")
    facts = json.loads(printed.stdout)
    assert facts == json.loads((tmp_path / "out/fit.json").read_text())
    assert facts["fit"]["law"]["alpha"] == pytest.approx(LAW.alpha, abs=0.05)
    assert len(facts["excluded"]) == 9
    assert facts["with_excluded"]["n_cells"] == facts["n_cells"] + 1
    assert set(facts["frontiers"]) == {"envelope", "parabola", "cubic", "akima"}
    assert facts["diagnosis"]["hold_outs"]
    assert facts["fit"]["intervals"]["alpha"]["low"] < LAW.alpha < facts["fit"]["intervals"]["alpha"]["high"]


def test_data_that_cannot_support_a_fit_are_refused_in_one_line_each(run: Callable[..., Ended], tmp_path: Path) -> None:
    """Each with what is missing and which cells would supply it; status 2 and nothing on standard output."""
    points = make_points().dropna()
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4)))
    grid = pd.DataFrame({"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d)})
    cases: dict[str, tuple[pd.DataFrame, list[str]]] = {
        "too few cells": (points.head(4), MAPPED),
        "one size only": (grid[grid["n_params"] == n[0]], []),
        "one budget only": (grid[grid["tokens"] == d[0]], []),
        "one ratio only": (grid.assign(tokens=20 * grid["n_params"] * (1 + 1e-15), val_loss=grid["val_loss"] + d * 1e-15), []),
        "no loss is a number": (points.assign(loss="nan"), MAPPED),
        "negative losses": (points.assign(loss=-points["loss"]), MAPPED),
        "the same cell twice": (pd.concat([points, points.tail(1)]), MAPPED),
        "mixed tokenizers": (grid.assign(tokenizer=["a", "b"] * 10), []),
        "missing column": (points, MAPPED[:4]),
        "misspelt column": (points, [*MAPPED[:4], "--map", "val_loss=los"]),
        "empty table": (points.head(0), MAPPED),
        "no such law": (grid, ["--law", "chinchila"]),
        "repeats without seeds": (grid, ["--by-noise"]),
        "a law of more than was recorded": (grid, ["--law", "repeated"]),
        "a count that was not recorded": (grid, ["--params", "non_embedding"]),
        "a loss that was not recorded": (grid, ["--loss", "val_bpb"]),
        "no such condition": (grid, ["--where", "tokns>3"]),
    }
    lines = []
    for name, (table, options) in cases.items():
        table.to_csv(tmp_path / "points.csv", index=False)
        result = run("fit", "--csv", "points.csv", *options)
        assert (result.returncode, result.stdout) == (2, ""), (name, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
        lines.append(f"{name}\n    {result.stderr}")
    compare("fit_refusals.txt", "\n".join(lines))


@pytest.mark.parametrize("law", ["tied", "kaplan_n_floor", "kaplan_nd", "repeated"])
def test_other_laws_and_objectives_have_pages(run: Callable[..., Ended], tmp_path: Path, law: str) -> None:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 6)))
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d) * np.exp(draw.normal(0, 0.002, n.size))})
    table["unique_tokens"] = d / draw.choice([1, 2, 4, 16], n.size)
    table.to_csv(tmp_path / "points.csv", index=False)
    result = run("fit", "--csv", "points.csv", "--law", law, "--objective", "mse")
    assert result.returncode == 0, result.stderr
    assert "half the sum of squares" in result.stdout
    for name in ("alpha",) if law in ("tied", "kaplan_n_floor", "repeated") else ("alpha_D",):
        assert name in result.stdout


def test_a_table_of_anyone_and_of_a_folder_of_experiments(run: Callable[..., Ended], tmp_path: Path, data_dir: Path) -> None:
    make_points().to_csv(tmp_path / "points.csv", index=False)
    result = run("table", "--csv", "points.csv", *MAPPED, "--out", "out")
    assert "49 cells, 49 done, 1 left out of a fit" in result.stdout
    assert len(pd.read_parquet(tmp_path / "out/table.parquet")) == 49
    experiment = write_experiment(tmp_path, data_dir)
    assert "22 cells, 22 done, 0 left out" in run("table", "runs").stdout
    other = experiment.parent / "other"
    other.mkdir()
    for path in experiment.rglob("*"):
        target = other / path.relative_to(experiment)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    twice = run("fit", "runs")
    assert twice.returncode == 2
    assert "stands in" in twice.stderr
    assert twice.stderr.count("\n") == 1
    neither = run("fit")
    assert (neither.returncode, neither.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_ten_thousand_rows_are_fitted_in_seconds(run: Callable[..., Ended], tmp_path: Path) -> None:
    import time

    draw = np.random.default_rng(0)
    n, d = np.exp(draw.uniform(np.log(1e7), np.log(1e10), 10_000)), np.exp(draw.uniform(np.log(1e9), np.log(1e12), 10_000))
    table = pd.DataFrame({"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d) * np.exp(draw.normal(0, 0.004, n.size))})
    table.to_csv(tmp_path / "points.csv", index=False)
    started = time.perf_counter()
    result = run("fit", "--csv", "points.csv", "--json")
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - started < 60, "30 s on quiet cores"
