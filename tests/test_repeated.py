"""The law of repeated text: its slopes, exact recovery, and the published constants, where the objective is not lowest."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.descend import LOG_HUBER
from results.fit import fit_law
from results.laws import CHINCHILLA, centre, jacobian, params_of_theta, predict_log_loss, theta_of_params
from results.profiles import profile_parameter
from results.repeated import REPEATED

# Muennighoff et al. 2023, their notebook: the law of C4 that is held fixed, and the constants of repeats.
BASE = {"E": np.exp(0.6254804), "A": np.exp(6.255414), "B": np.exp(7.3049974), "alpha": 0.3526596, "beta": 0.3526596}
PUBLISHED = [*BASE.values(), 15.387756, 5.309743]


def grid() -> dict[str, np.ndarray]:
    n, d, u = np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(1e9, 1e12, 5), np.geomspace(3e9, 3e11, 4))
    return {"n_params": n.ravel(), "tokens": d.ravel(), "unique_tokens": u.ravel()}


@pytest.fixture
def published(fixtures: Path) -> dict[str, np.ndarray]:
    runs = pd.read_csv(fixtures / "datablations" / "datablations_runs.csv").query("in_paper_fit == 1")
    columns = {"n_params": "params", "tokens": "tokens", "unique_tokens": "unique_tokens", "val_loss": "val_loss"}
    return {name: runs[column].to_numpy(float) for name, column in columns.items()}


@given(
    theta=st.tuples(*[st.floats(-1, 1)] * 3, st.floats(0.15, 0.8), st.floats(0.15, 0.8), st.floats(-2, 6), st.floats(-2, 6)).map(
        np.array
    )
)
def test_slopes_agree_with_differences(theta: np.ndarray) -> None:
    cells = centre(REPEATED, grid(), np.full(100, 2.5))
    for i, step in enumerate(np.eye(7) * 1e-6):
        numeric = (predict_log_loss(theta + step, cells) - predict_log_loss(theta - step, cells)) / 2e-6
        misses = np.abs(jacobian(theta, cells)[:, i] - numeric)
        assert np.sort(misses)[-3] < 1e-7, "but at a kink, where N is just what the unique tokens call for"


def test_parameters_enter_and_leave_the_centred_logs() -> None:
    cells = centre(REPEATED, grid(), np.full(100, 2.5))
    np.testing.assert_allclose(params_of_theta(theta_of_params(PUBLISHED, cells), cells), PUBLISHED, rtol=1e-12)


def test_text_seen_once_is_chinchillas_law_for_sizes_it_calls_for() -> None:
    cells = {"n_params": np.array([1e6, 1e7]), "tokens": np.array([1e9, 1e10]), "unique_tokens": np.array([1e9, 1e10])}
    once = CHINCHILLA.predict(PUBLISHED[:5], n_params=cells["n_params"], tokens=cells["tokens"])
    np.testing.assert_allclose(REPEATED.predict(PUBLISHED, **cells), once, rtol=1e-12)


def test_repeats_are_worth_less_and_in_the_end_nothing() -> None:
    losses = REPEATED.predict(PUBLISHED, n_params=1e8, tokens=np.geomspace(1e9, 1e13, 40), unique_tokens=1e9)
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] == pytest.approx(losses[-10], rel=1e-6)
    fresh = REPEATED.predict(PUBLISHED, n_params=1e8, tokens=1e11, unique_tokens=1e11)
    assert fresh < REPEATED.predict(PUBLISHED, n_params=1e8, tokens=1e11, unique_tokens=1e9)


def test_a_known_law_is_recovered_exactly() -> None:
    truth = [1.87, 521.0, 1488.0, 0.35, 0.37, 12.0, 6.0]
    fit = fit_law(REPEATED, grid() | {"val_loss": REPEATED.predict(truth, **grid())})
    np.testing.assert_allclose(fit.params, truth, rtol=1e-8)
    assert fit.open_sides == ()


def test_published_constants_are_not_the_best_and_repeats_are_known_from_below_only(published: dict[str, np.ndarray]) -> None:
    assert len(published["val_loss"]) == 182
    cells = centre(REPEATED, published, published["val_loss"])
    there = LOG_HUBER.sum(predict_log_loss(theta_of_params(PUBLISHED, cells), cells) - cells.log_loss)
    assert float(there) == pytest.approx(0.01582593526, abs=1e-11)
    fit = fit_law(REPEATED, published, fixed=BASE)
    assert fit.objective_value == pytest.approx(0.0158046625, abs=1e-10)
    assert fit["R_D"] == pytest.approx(95.37, abs=0.05)
    assert fit["R_N"] == pytest.approx(1.706, abs=2e-3)
    assert "R_D up" in fit.open_sides
    assert 7 < profile_parameter(fit, "R_D").low < 8.5, "repeats count, up to about 8 at least; 15.4 is not known"
    assert "R_D down" not in fit.open_sides, "the data do object to few repeats"
    assert any(abs(basin.params[5] - 15.4) < 0.1 for basin in fit.basins), "the published point is a local minimum"
