"""Ordered hold-out: published scores, an exact law, and cuts that leave nothing."""

from pathlib import Path

import numpy as np
import pytest

from results.fit import FitError
from results.holdout import score_hold_out, score_origins
from results.laws import Chinchilla
from results.lessons import load_chinchilla

LAW = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)


def cells(noise: float = 0.0) -> dict[str, np.ndarray]:
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e4, 4e5, 5), np.geomspace(4e5, 4e6, 4)))
    luck = np.random.default_rng(0).normal(size=n.size)
    return {"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d) * np.exp(noise * luck)}


@pytest.mark.parametrize(
    ("cut", "n_fitted", "n_scored", "mape"), [(3e20, 177, 63, 1.002), (1e21, 217, 23, 1.051), (3e21, 236, 4, 1.207)]
)
def test_published_points_score_as_computed_elsewhere(fixtures: Path, cut, n_fitted, n_scored, mape) -> None:
    points = load_chinchilla(fixtures).iloc[:-5]
    score = score_hold_out({name: points[name].to_numpy(float) for name in ("n_params", "tokens", "val_loss")}, cut)
    assert (score.n_fitted, score.n_scored) == (n_fitted, n_scored)
    assert score.mape == pytest.approx(mape, abs=1e-3)


def test_an_exact_law_predicts_itself_and_beats_both_baselines() -> None:
    score = score_hold_out(cells(), 2e12)
    assert score.mape < 1e-6
    assert score.skill > 0.999
    assert score.best_seen > 1
    assert score.bias == pytest.approx(0, abs=1e-6)
    assert score.reach > 1


def test_skill_falls_below_zero_where_the_law_is_wrong() -> None:
    """Losses that depend on compute alone, with a kink: the lowest loss seen is the better guess for cells that stay there."""
    table = cells()
    flops = 6 * table["n_params"] * table["tokens"]
    table["val_loss"] = np.maximum(5.0 - 0.35 * np.log(flops / flops.min()), 3.0)
    score = score_hold_out(table, float(np.quantile(flops, 0.6)))
    assert score.skill < 0


def test_origins_begin_with_the_default_and_leave_out_what_cannot_be_fitted() -> None:
    scores = score_origins(cells(0.004))
    assert scores[0].n_fitted == 17
    assert len(scores) == 5
    few = {name: values[:7] for name, values in cells(0.004).items()}
    assert score_origins(few) == []


def test_a_cut_outside_the_cells_is_refused() -> None:
    for cut in (1.0, 1e30):
        with pytest.raises(FitError, match="leaves no cell on one side"):
            score_hold_out(cells(), cut)
