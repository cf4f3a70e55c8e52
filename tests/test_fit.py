"""The fitter against published data, known laws, other solvers and cells that cannot be fitted."""

import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares, nnls

from results.descend import LOG_HUBER, LOG_MSE, MSE, Objective, descend, find_bounds
from results.fit import Fit, FitError, fit_chinchilla, fit_law, fit_many, refit_many, solve_non_negative
from results.laws import CHINCHILLA, LAWS, TIED, Chinchilla, jacobian, predict_log_loss, theta_of_params


@pytest.fixture
def published(fixtures: Path) -> pd.DataFrame:
    """The 245 points of Hoffmann et al. 2022, figure 4, as read off by Besiroglu et al. 2024; tokens from C = 6 N D."""
    points = pd.read_csv(fixtures / "chinchilla" / "svg_extracted_data.csv")
    points = points.rename(columns={"Model Size": "n_params"})
    return points.assign(tokens=points["Training FLOP"] / 6 / points["n_params"]).sort_values("loss")


def grid(sizes: int = 5, budgets: int = 15) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e6, 1e9, sizes), np.geomspace(1e8, 1e11, budgets))
    return n.ravel(), d.ravel()


def objective_of(law: Chinchilla, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> float:
    return float(LOG_HUBER.sum(np.log(law.loss(n, d)) - np.log(loss)))


def test_published_points_give_the_exact_minimum(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]  # the authors' outlier rule
    fit = fit_chinchilla(kept["n_params"], kept["tokens"], kept["loss"])
    law = fit.constants
    assert fit.n_cells == 240
    assert fit.objective_value == pytest.approx(1.0182740178006e-3, rel=1e-12)
    assert abs(law.E - 1.81722) < 5e-4
    assert abs(law.A / 477.826 - 1) < 0.01
    assert abs(law.B / 2143.42 - 1) < 0.02
    assert law.alpha == pytest.approx(0.347310, abs=2e-4)
    assert law.beta == pytest.approx(0.367172, abs=3e-4)
    assert law.optimum_exponent == pytest.approx(0.51390, abs=2e-4)
    assert fit.condition_number == pytest.approx(33, rel=0.02)
    assert len(fit.basins) == 1
    assert fit.at_bounds == fit.open_sides == ()
    assert not fit.is_floor_near_zero


def test_constants_in_print_score_worse(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]
    arrays = [kept[column].to_numpy() for column in ("n_params", "tokens", "loss")]
    printed = objective_of(Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658), *arrays)
    assert printed == pytest.approx(1.0228428e-3, rel=1e-6)
    assert fit_chinchilla(*arrays).objective_value < printed


def test_all_published_points_move_beta(published: pd.DataFrame) -> None:
    fit = fit_chinchilla(published["n_params"], published["tokens"], published["loss"])
    assert fit.objective_value <= 1.826011e-3
    np.testing.assert_allclose(astuple(fit.constants), (1.89134, 495.726, 12845.6, 0.34931, 0.45305), rtol=2e-3)


def test_a_fit_of_240_points_is_quick(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fit_chinchilla(kept["n_params"], kept["tokens"], kept["loss"])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.25, "measured 0.05 s; five times that is a mistake and not a slow machine"


EXAMPLES = {
    "chinchilla": [1.8, 400, 2000, 0.34, 0.28],
    "tied": [1.8, 400, 2000, 0.34],
    "kaplan_n": [8.8e13**0.076, 0.076],
    "kaplan_n_floor": [1.2, 30, 0.2],
    "kaplan_d": [5.4e13**0.095, 0.095],
    "kaplan_d_floor": [0.5, 30, 0.095],
    "kaplan_nd": [6.4e13 ** (0.076 / 0.103), 1.8e13, 0.076 / 0.103, 0.103],
    "kaplan_nd_floor": [1.0, 8.8e9**0.7, 5.4e10, 0.7, 0.2],
}


@pytest.mark.parametrize("objective", [LOG_HUBER, LOG_MSE, MSE], ids=lambda o: o.name)
@pytest.mark.parametrize("name", sorted(LAWS))
def test_every_law_is_recovered_exactly_from_data_without_noise(name: str, objective: Objective) -> None:
    law, (n, d) = LAWS[name], grid()
    loss = law.predict(EXAMPLES[name], n_params=n, tokens=d)
    fit = fit_law(law, {"n_params": n, "tokens": d, "val_loss": loss}, objective)
    np.testing.assert_allclose(fit.params, EXAMPLES[name], rtol=1e-8)
    assert len(fit.basins) == 1
    assert fit.open_sides == ()


@settings(max_examples=15, deadline=None)
@given(
    law=st.builds(
        Chinchilla,
        E=st.floats(0.5, 3),
        A=st.floats(50, 2000),
        B=st.floats(50, 5000),
        alpha=st.floats(0.2, 0.6),
        beta=st.floats(0.2, 0.6),
    )
)
def test_a_known_law_is_recovered_exactly(law: Chinchilla) -> None:
    n, d = grid()
    np.testing.assert_allclose(astuple(fit_chinchilla(n, d, law.loss(n, d)).constants), astuple(law), rtol=1e-8)


def test_fixed_parameters_stay_and_the_others_are_fitted() -> None:
    n, d = grid()
    loss = Chinchilla(1.8, 400, 2000, 0.34, 0.28).loss(n, d)
    cells = {"n_params": n, "tokens": d, "val_loss": loss}
    right = fit_law(CHINCHILLA, cells, fixed={"A": 400, "alpha": 0.34})
    np.testing.assert_allclose(right.params, [1.8, 400, 2000, 0.34, 0.28], rtol=1e-8)
    wrong = fit_law(CHINCHILLA, cells, fixed={"E": 1.0})
    assert wrong["E"] == pytest.approx(1.0)
    assert wrong.objective_value > 1e-6
    equal = fit_law(TIED, cells)
    assert equal.objective_value < wrong.objective_value


def noisy(seed: int = 0, sigma: float = 0.004) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = grid(5, 4)
    law = Chinchilla(E=1.7, A=400, B=2000, alpha=0.34, beta=0.36)
    return n, d, law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, sigma, n.size))


def test_order_of_cells_does_not_matter() -> None:
    n, d, loss = noisy()
    shuffle = np.random.default_rng(1).permutation(n.size)
    fit, shuffled = fit_chinchilla(n, d, loss), fit_chinchilla(n[shuffle], d[shuffle], loss[shuffle])
    np.testing.assert_allclose(astuple(shuffled.constants), astuple(fit.constants), rtol=1e-5)
    np.testing.assert_allclose(shuffled.residuals, fit.residuals[shuffle], atol=1e-7)


def test_units_of_parameters_do_not_matter() -> None:
    n, d, loss = noisy()
    fit, in_millions = fit_chinchilla(n, d, loss), fit_chinchilla(n / 1e6, d, loss)
    assert in_millions["alpha"] == pytest.approx(fit["alpha"], rel=1e-5)
    assert abs(in_millions["A"] / (fit["A"] * 1e6 ** -fit["alpha"]) - 1) < 1e-4


def test_residuals_are_observed_less_fitted() -> None:
    n, d, loss = noisy()
    fit = fit_chinchilla(n, d, loss)
    np.testing.assert_allclose(fit.residuals, np.log(loss) - np.log(fit.constants.loss(n, d)), atol=1e-12)
    assert fit.objective_value == pytest.approx(float(LOG_HUBER.sum(fit.residuals)), rel=1e-12)


def test_one_wild_cell_hardly_moves_the_law() -> None:
    n, d, loss = noisy(sigma=1e-4)
    clean = fit_chinchilla(n, d, loss)
    loss[7] *= 1.5
    assert fit_chinchilla(n, d, loss)["alpha"] == pytest.approx(clean["alpha"], rel=0.01)


def test_a_law_without_floor_is_told_as_such() -> None:
    n, d = grid()
    fit = fit_chinchilla(n, d, Chinchilla(E=0.0, A=10, B=10, alpha=0.1, beta=0.1).loss(n, d))
    assert 0 <= fit["E"] < 0.01 * float(fit.constants.loss(n, d).min())


def test_non_negative_solver_agrees_with_scipy() -> None:
    draw = np.random.default_rng(0)
    basis, weights = draw.normal(0.5, 1, (50, 8, 3)), draw.uniform(0.1, 2, (50, 8))
    solved = solve_non_negative(basis, weights)
    for one, weight, answer in zip(basis, np.sqrt(weights), solved, strict=True):
        np.testing.assert_allclose(answer, nnls(one * weight[:, None], weight)[0], atol=1e-8)
    assert (solved == 0).any(), "some of these problems lie on the edge"


def minimise_with_scipy(fit: Fit, log_loss: np.ndarray, weights: np.ndarray) -> float:
    """Another solver for the same objective: scipy's huber cost with f_scale = delta, each residual repeated `weights` times."""
    times = weights.astype(int)

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.repeat(predict_log_loss(theta, fit.centred) - log_loss, times)

    def slopes(theta: np.ndarray) -> np.ndarray:
        return np.repeat(jacobian(theta, fit.centred), times, axis=0)

    tight = {"xtol": 1e-13, "ftol": 1e-13, "gtol": 1e-13, "max_nfev": 1000}
    low, high = find_bounds(fit.centred)
    start = np.clip(fit.theta, low + 1e-6, high - 1e-6)
    return float(least_squares(residuals, start, slopes, (low, high), loss="huber", f_scale=1e-3, x_scale="jac", **tight).cost)


def test_many_refits_reach_the_minima_of_scipy() -> None:
    n, d, loss = noisy()
    fit, draw = fit_chinchilla(n, d, loss), np.random.default_rng(2)
    others = predict_log_loss(fit.theta, fit.centred) + draw.normal(0, 0.004, (25, n.size))
    times = np.array([np.bincount(draw.integers(0, n.size, n.size), minlength=n.size) for _ in range(25)])
    refits = refit_many(fit, others, times)
    assert refits.converged.all()
    for log_loss, weights, value in zip(others, times, refits.objective, strict=True):
        assert value <= minimise_with_scipy(fit, log_loss, weights) * (1 + 1e-6)


def test_fits_of_many_losses_are_each_fit_alone() -> None:
    n, d, loss = noisy()
    cells, losses = {"n_params": n, "tokens": d}, np.array([loss, loss * 1.01, loss**1.02])
    for row, params in zip(losses, fit_many(CHINCHILLA, cells, losses, [1.7, 400, 2000, 0.34, 0.36]), strict=True):
        np.testing.assert_allclose(params, fit_chinchilla(n, d, row).params, rtol=1e-4)


@pytest.mark.parametrize("objective", [LOG_HUBER, LOG_MSE, MSE], ids=lambda o: o.name)
def test_every_start_of_the_literature_ends_no_lower(objective: Objective) -> None:
    n, d, loss = noisy(sigma=0.01)
    fit = fit_chinchilla(n, d, loss, objective=objective)
    draw = np.random.default_rng(0)
    starts = np.column_stack(
        [draw.uniform(0.3, 3, 200), *np.exp(draw.uniform(0, 25, (2, 200))), *draw.uniform(0.01, 2, (2, 200))]
    )
    found = descend(fit.centred, theta_of_params(starts, fit.centred), fit.centred.log_loss, objective)
    assert found.objective.min() >= fit.objective_value * (1 - 1e-9)
    assert (found.objective <= fit.objective_value * (1 + 1e-6)).mean() > 0.5


@pytest.mark.parametrize(
    ("n", "d", "loss", "message"),
    [
        ([1e6] * 6, [1e8, 2e8, 3e8] * 2, [3.0] * 6, "2 more model size"),
        ([1e6, 2e6, 3e6] * 2, [1e8] * 6, [3.0] * 6, "2 more token budget"),
        ([1e6, 2e6, 3e6, 4e6], [1e8, 2e8, 3e8, 4e8], [3.0] * 4, "2 more cell"),
        ([], [], [], "usable cells=0"),
        ([1e6, 2e6, 4e6] * 2, [1e8, 2e8, 4e8] * 2, [3.0] * 6, "another number of tokens"),
        ([1e6, 2e6, 3e6] * 2, [1e8, 2e8, 3e8] * 2, [3.0] * 5 + [float("nan")], "val_loss=nan"),
        ([1e6, 2e6, 3e6] * 2, [1e8, 2e8, 3e8] * 2, [3.0] * 5 + [-1.0], "val_loss=-1"),
        ([1e6, 2e6, 0] * 2, [1e8, 2e8, 3e8] * 2, [3.0] * 6, "n_params=0"),
    ],
)
def test_cells_that_cannot_be_fitted_are_refused_in_one_line(n: list, d: list, loss: list, message: str) -> None:
    with pytest.raises(FitError, match=message) as refusal:
        fit_chinchilla(n, d, loss)
    assert "\n" not in str(refusal.value)
