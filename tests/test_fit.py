"""The fitter against published data, known laws, other solvers and cells that cannot be fitted."""

import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from results.fit import DELTA, FitError, fit_chinchilla, polish, refit_many, solve_non_negative, sum_huber
from results.laws import Centred, Chinchilla, centre, predict_log_loss, theta_of_law


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
    return float(sum_huber(np.log(law.loss(n, d)) - np.log(loss), DELTA))


def test_published_points_give_the_exact_minimum(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]  # the authors' outlier rule
    fit = fit_chinchilla(kept["n_params"], kept["tokens"], kept["loss"])
    law = fit.law
    assert fit.n_cells == 240
    assert fit.objective <= 1.018275e-3
    assert abs(law.E - 1.81722) < 5e-4
    assert abs(law.A / 477.826 - 1) < 0.01
    assert abs(law.B / 2143.42 - 1) < 0.02
    assert law.alpha == pytest.approx(0.347310, abs=2e-4)
    assert law.beta == pytest.approx(0.367172, abs=3e-4)
    assert law.optimum_exponent == pytest.approx(0.51390, abs=2e-4)
    assert fit.condition_number == pytest.approx(33, rel=0.02)
    assert len(fit.basins) == 1
    assert fit.at_bounds == ()


def test_constants_in_print_score_worse(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]
    arrays = [kept[column].to_numpy() for column in ("n_params", "tokens", "loss")]
    printed = objective_of(Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658), *arrays)
    assert printed == pytest.approx(1.0228428e-3, rel=1e-6)
    assert fit_chinchilla(*arrays).objective < printed


def test_all_published_points_move_beta(published: pd.DataFrame) -> None:
    fit = fit_chinchilla(published["n_params"], published["tokens"], published["loss"])
    assert fit.objective <= 1.826011e-3
    np.testing.assert_allclose(astuple(fit.law), (1.89134, 495.726, 12845.6, 0.34931, 0.45305), rtol=2e-3)


def test_a_fit_of_240_points_is_quick(published: pd.DataFrame) -> None:
    kept = published.iloc[:-5]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fit_chinchilla(kept["n_params"], kept["tokens"], kept["loss"])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.25, "measured 0.05 s; five times that is a mistake and not a slow machine"


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
    np.testing.assert_allclose(astuple(fit_chinchilla(n, d, law.loss(n, d)).law), astuple(law), rtol=1e-8)


def noisy(seed: int = 0, sigma: float = 0.004) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = grid(5, 4)
    law = Chinchilla(E=1.7, A=400, B=2000, alpha=0.34, beta=0.36)
    return n, d, law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, sigma, n.size))


def test_order_of_cells_does_not_matter() -> None:
    n, d, loss = noisy()
    shuffle = np.random.default_rng(1).permutation(n.size)
    fit, shuffled = fit_chinchilla(n, d, loss), fit_chinchilla(n[shuffle], d[shuffle], loss[shuffle])
    np.testing.assert_allclose(astuple(shuffled.law), astuple(fit.law), rtol=1e-5)
    np.testing.assert_allclose(shuffled.residuals, fit.residuals[shuffle], atol=1e-7)


def test_units_of_parameters_do_not_matter() -> None:
    n, d, loss = noisy()
    fit, in_millions = fit_chinchilla(n, d, loss), fit_chinchilla(n / 1e6, d, loss)
    assert in_millions.law.alpha == pytest.approx(fit.law.alpha, rel=1e-5)
    assert abs(in_millions.law.A / (fit.law.A * 1e6**-fit.law.alpha) - 1) < 1e-4


def test_residuals_are_observed_less_fitted() -> None:
    n, d, loss = noisy()
    fit = fit_chinchilla(n, d, loss)
    np.testing.assert_allclose(fit.residuals, np.log(loss) - np.log(fit.law.loss(n, d)), atol=1e-12)
    assert fit.objective == pytest.approx(float(sum_huber(fit.residuals, DELTA)), rel=1e-12)


def test_one_wild_cell_hardly_moves_the_law() -> None:
    n, d, loss = noisy(sigma=1e-4)
    clean = fit_chinchilla(n, d, loss)
    loss[7] *= 1.5
    assert fit_chinchilla(n, d, loss).law.alpha == pytest.approx(clean.law.alpha, rel=0.01)


def test_a_law_without_floor_is_told_as_such() -> None:
    n, d = grid()
    fit = fit_chinchilla(n, d, Chinchilla(E=0.0, A=10, B=10, alpha=0.1, beta=0.1).loss(n, d))
    assert 0 <= fit.law.E < 0.01 * float(fit.law.loss(n, d).min())


def test_non_negative_solver_agrees_with_scipy() -> None:
    draw = np.random.default_rng(0)
    basis, weights = draw.normal(0.5, 1, (50, 8, 3)), draw.uniform(0.1, 2, (50, 8))
    solved = solve_non_negative(basis, weights)
    for one, weight, answer in zip(basis, np.sqrt(weights), solved, strict=True):
        np.testing.assert_allclose(answer, nnls(one * weight[:, None], weight)[0], atol=1e-8)
    assert (solved == 0).any(), "some of these problems lie on the edge"


def test_many_refits_reach_the_minima_of_scipy() -> None:
    n, d, loss = noisy()
    fit = fit_chinchilla(n, d, loss)
    others = predict_log_loss(fit.theta, fit.centred) + np.random.default_rng(2).normal(0, 0.004, (25, n.size))
    refits = refit_many(fit, others)
    assert refits.converged.all()
    for log_loss, objective in zip(others, refits.objective, strict=True):
        _, alone = polish(fit.theta, Centred(fit.centred.x, fit.centred.y, log_loss, 0.0, 0.0), DELTA)
        assert objective <= alone * (1 + 2e-3)


def test_starts_do_not_depend_on_a_lucky_first_one() -> None:
    n, d, loss = noisy(sigma=0.01)
    fit = fit_chinchilla(n, d, loss)
    centred = centre(n, d, loss)
    far = theta_of_law(Chinchilla(E=0.5, A=3, B=3, alpha=0.05, beta=1.0), centred)
    assert polish(far, centred, DELTA)[1] >= fit.objective * (1 - 1e-9)


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
        ([1e6, 2e6, 0] * 2, [1e8, 2e8, 3e8] * 2, [3.0] * 6, "parameters=0"),
    ],
)
def test_cells_that_cannot_be_fitted_are_refused_in_one_line(n: list, d: list, loss: list, message: str) -> None:
    with pytest.raises(FitError, match=message) as refusal:
        fit_chinchilla(n, d, loss)
    assert "\n" not in str(refusal.value)
