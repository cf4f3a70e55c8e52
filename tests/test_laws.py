"""The law as mathematics: its optimum, its slopes, its two ways of being written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from results.laws import Chinchilla, centre, jacobian, law_of_theta, predict_log_loss, theta_of_law

# The exact minimiser on the published Chinchilla points, 5 highest losses dropped (tests/test_fit.py finds it).
PUBLISHED = Chinchilla(E=1.817218098, A=477.8258638, B=2143.417364, alpha=0.3473104983, beta=0.3671724326)

laws = st.builds(
    Chinchilla,
    E=st.floats(0.1, 3),
    A=st.floats(1, 1e4),
    B=st.floats(1, 1e4),
    alpha=st.floats(0.1, 0.9),
    beta=st.floats(0.1, 0.9),
)


def grid() -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e4, 1e7, 4), np.geomspace(1e5, 1e8, 4))
    return n.ravel(), d.ravel()


@pytest.mark.parametrize(
    ("flops", "n_params", "tokens_per_param", "loss"),
    [
        (1e18, 8.020e7, 25.9, 3.4890),
        (1e21, 2.792e9, 21.38, 2.30445),
        (5.76e23, 7.319e10, 17.92, 1.97391),
        (1e25, 3.173e11, 16.55, 1.91137),
    ],
)
def test_optimum_of_the_published_fit(flops: float, n_params: float, tokens_per_param: float, loss: float) -> None:
    best = PUBLISHED.allocate(flops)
    assert best.n_params == pytest.approx(n_params, rel=1e-3)
    assert best.tokens_per_param == pytest.approx(tokens_per_param, rel=1e-3)
    assert best.loss == pytest.approx(loss, rel=1e-5)
    assert 6 * best.n_params * best.tokens == pytest.approx(flops, rel=1e-12)


@given(law=laws, log_flops=st.floats(30, 60))
def test_closed_form_is_the_minimum(law: Chinchilla, log_flops: float) -> None:
    flops = float(np.exp(log_flops))
    best = law.allocate(flops)

    def loss_beside(shift: float) -> float:
        return float(law.loss(best.n_params * np.exp(shift), best.tokens * np.exp(-shift)))

    found = minimize_scalar(loss_beside, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9})
    assert best.loss <= found.fun * (1 + 1e-12)
    for shift in (-0.1, 0.1):
        assert loss_beside(shift) > best.loss


@given(law=laws)
def test_best_size_grows_as_compute_to_the_exponent(law: Chinchilla) -> None:
    small, large = law.allocate(1e18), law.allocate(1e20)
    assert np.log(large.n_params / small.n_params) == pytest.approx(law.optimum_exponent * np.log(100), rel=1e-9)


@given(law=laws)
def test_centred_logs_are_the_same_law(law: Chinchilla) -> None:
    n, d = grid()
    centred = centre(n, d, law.loss(n, d))
    theta = theta_of_law(law, centred)
    np.testing.assert_allclose(predict_log_loss(theta, centred), centred.log_loss, atol=1e-12)
    again = law_of_theta(theta, centred)
    np.testing.assert_allclose(
        [again.E, again.A, again.B, again.alpha, again.beta], [law.E, law.A, law.B, law.alpha, law.beta], rtol=1e-9
    )


@given(law=laws)
def test_slopes_agree_with_differences(law: Chinchilla) -> None:
    n, d = grid()
    centred = centre(n, d, law.loss(n, d))
    theta = theta_of_law(law, centred)
    for i, step in enumerate(np.eye(5) * 1e-5):
        numeric = (predict_log_loss(theta + step, centred) - predict_log_loss(theta - step, centred)) / 2e-5
        np.testing.assert_allclose(jacobian(theta, centred)[:, i], numeric, atol=1e-7)


def test_many_laws_at_once_are_each_law_alone() -> None:
    n, d = grid()
    centred = centre(n, d, PUBLISHED.loss(n, d))
    thetas = theta_of_law(PUBLISHED, centred) + np.random.default_rng(0).normal(0, 0.1, (3, 2, 5))
    together, slopes = predict_log_loss(thetas, centred), jacobian(thetas, centred)
    for place in np.ndindex(3, 2):
        np.testing.assert_array_equal(together[place], predict_log_loss(thetas[place], centred))
        np.testing.assert_array_equal(slopes[place], jacobian(thetas[place], centred))


def test_terms_of_any_size_neither_overflow_nor_vanish() -> None:
    centred = centre([1e3, 1e12], [1e3, 1e15], [5.0, 2.0])
    theta = np.array([900.0, -900.0, 0.0, 3.0, 3.0])
    assert np.isfinite(predict_log_loss(theta, centred)).all()
    assert np.isfinite(jacobian(theta, centred)).all()
