"""Sealed predictions: what is written before, what is detected after, and scores that can be computed by hand."""

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_experiment import GRID, LAW, make_summary, write_attempt, write_experiment

from harness.config import ConfigError
from harness.runs import find_cell_dir, load_plan, read_json, write_json
from results.predict import (
    list_seals,
    load_seal,
    measure_skill,
    render_scores,
    score_experiment,
    score_studies,
    seal_predictions,
)
from results.study import fit_study
from results.table import load_cells

HELD_OUT_GRID = GRID | {"extra": [{"size": {"n_layer": 1, "n_head": 2, "d_model": 256}, "tokens": 128 * 800, "hold_out": True}]}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """An experiment whose grid is trained and whose held-out cell is not."""
    experiment_dir = write_experiment(tmp_path_factory.mktemp("predict"), data_dir, grid=HELD_OUT_GRID)
    for cell in load_plan(experiment_dir).cells:
        if cell.role == "held_out":
            shutil.rmtree(experiment_dir / cell.run_id / "attempts")
            (find_cell_dir(experiment_dir / cell.run_id, cell) / "summary.json").unlink()
    return experiment_dir


@pytest.fixture
def waiting(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "repo" / "fake"))


def seal(experiment_dir: Path) -> dict[str, Any]:
    study = fit_study("fake", load_cells(experiment_dir))
    return seal_predictions(study, load_plan(experiment_dir), experiment_dir)[1]


def train_held_out(experiment_dir: Path, loss: float, later: timedelta = timedelta(hours=1)) -> None:
    """Write what a training of the held-out cell would leave, begun `later` than now."""
    plan = load_plan(experiment_dir)
    (run,) = [run for run in plan.runs if run.cells[0].role == "held_out"]
    write_attempt(experiment_dir / run.run_id, run, {cell.cell_id: loss for cell in run.cells})
    started = (datetime.now(UTC) + later).isoformat(timespec="seconds")
    write_json(experiment_dir / run.run_id / "attempts/1/attempt.json", {"pid": 1, "host": "h", "started_utc": started})
    for cell in run.cells:
        write_json(find_cell_dir(experiment_dir / run.run_id, cell) / "summary.json", make_summary(plan, cell, loss))


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_seal_holds_the_prediction_and_what_it_rests_on(waiting: Path) -> None:
    sealed = seal(waiting)
    (one,) = sealed["predictions"]
    truth = float(LAW.loss(one["n_params"], one["tokens"]))
    assert one["low"] < truth < one["high"]
    assert one["low"] < one["loss"] < one["high"] < one["best_seen"]
    assert len(sealed["fitted_cells"]) == 22
    assert one["cell_id"] not in sealed["fitted_cells"]
    assert sealed["data_content_id"] == load_plan(waiting).data.content_id
    assert load_seal(list_seals(waiting)[0]) == sealed
    seal(waiting)
    assert [path.name for path in list_seals(waiting)] == ["1.json", "2.json"], "a seal is never overwritten"


def test_any_edit_is_detected(waiting: Path) -> None:
    seal(waiting)
    (path,) = list_seals(waiting)
    changed = read_json(path)
    changed["predictions"][0]["loss"] += 1e-9
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="it was edited"):
        load_seal(path)


def test_scores_by_hand(waiting: Path) -> None:
    (one,) = seal(waiting)["predictions"]
    (unscored,) = score_experiment(waiting)
    assert unscored.problem == "not trained: planned"
    assert unscored.observed is None
    train_held_out(waiting, one["loss"] / 1.01)
    (score,) = score_experiment(waiting)
    assert score.error == pytest.approx(1.0)
    assert score.covered == (one["low"] <= one["loss"] / 1.01 <= one["high"])
    assert not score.is_before, "no commit holds it"
    assert "no commit holds it" in score.when
    page = render_scores([score])
    assert "error +1.00%" in page
    assert "a clock that was set back is not" in page


def test_an_interval_that_misses_is_said_to_miss(waiting: Path) -> None:
    (one,) = seal(waiting)["predictions"]
    train_held_out(waiting, one["high"] * 1.001)
    (score,) = score_studies(waiting.parent)
    assert score.covered is False
    assert "outside the interval" in render_scores([score])


def test_skill_is_against_the_better_baseline() -> None:
    one = {"loss": 2.1, "best_seen": 2.5, "power_law": 2.2}
    assert measure_skill(one, 2.0) == pytest.approx(1 - 0.1 / 0.2)
    assert measure_skill(one | {"power_law": None}, 2.0) == pytest.approx(1 - 0.1 / 0.5)


@pytest.mark.parametrize("by_message", [False, True])
@pytest.mark.parametrize("hours", [1, -1])
def test_the_commit_that_holds_a_seal_is_found_and_compared(waiting: Path, by_message: bool, hours: int) -> None:
    sealed, repo = seal(waiting), waiting.parent
    git(repo, "init", "-q")
    (repo / "note").write_text("x")
    git(repo, "add", "note", *([] if by_message else ["fake/predictions/1.json"]))
    git(repo, "commit", "-q", "-m", f"sealed {sealed['digest']}" if by_message else "sealed")
    train_held_out(waiting, sealed["predictions"][0]["loss"], later=timedelta(hours=hours))
    (score,) = score_experiment(waiting)
    assert score.is_before == (hours > 0)
    assert (", before the run began" in score.when) == (hours > 0)


def test_nothing_to_predict_is_said(waiting: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prediction"):
        score_studies(waiting)
    train_held_out(waiting, 2.0)
    with pytest.raises(ConfigError, match="all 1 held-out cells are trained"):
        seal(waiting)


def test_the_interval_for_a_new_cell_is_wider_than_the_laws(waiting: Path) -> None:
    from results.predict import predict_losses
    from results.uncertainty import estimate_spread

    fitted = fit_study("fake", load_cells(waiting)).fitted
    assert fitted is not None
    n_params, tokens = np.array([5e5]), np.array([2e5])
    _, low, high = predict_losses(fitted, n_params, tokens)
    law = estimate_spread(fitted.resamples, lambda law: np.log(law.loss(n_params, tokens)))
    assert low[0] < np.exp(law.low[0])
    assert np.exp(law.high[0]) < high[0]
