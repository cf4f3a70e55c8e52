"""The laws as mathematics: their optimum, their slopes, their two ways of being written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from results.laws import (
    CHINCHILLA,
    KAPLAN_N,
    KAPLAN_ND,
    LAWS,
    TIED,
    Centred,
    Chinchilla,
    Law,
    centre,
    jacobian,
    params_of_theta,
    predict_log_loss,
    theta_of_params,
)

# The exact minimiser on the published Chinchilla points, 5 highest losses dropped (tests/test_fit.py finds it).
PUBLISHED = Chinchilla(E=1.817218098, A=477.8258638, B=2143.417364, alpha=0.3473104983, beta=0.3671724326)

chinchillas = st.builds(
    Chinchilla,
    E=st.floats(0.1, 3),
    A=st.floats(1, 1e4),
    B=st.floats(1, 1e4),
    alpha=st.floats(0.1, 0.9),
    beta=st.floats(0.1, 0.9),
)


def grid() -> dict[str, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e4, 1e7, 4), np.geomspace(1e5, 1e8, 4))
    return {"n_params": n.ravel(), "tokens": d.ravel(), "unique_tokens": np.full(n.size, 3e6)}


def centred_grid(law: Law) -> Centred:
    return centre(law, grid(), np.full(16, 2.5))


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


@given(law=chinchillas, log_flops=st.floats(30, 60))
def test_closed_form_is_the_minimum(law: Chinchilla, log_flops: float) -> None:
    flops = float(np.exp(log_flops))
    best = law.allocate(flops)

    def loss_beside(shift: float) -> float:
        return float(law.loss(best.n_params * np.exp(shift), best.tokens * np.exp(-shift)))

    found = minimize_scalar(loss_beside, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9})
    assert best.loss <= found.fun * (1 + 1e-12)
    for shift in (-0.1, 0.1):
        assert loss_beside(shift) > best.loss


@given(law=chinchillas)
def test_best_size_grows_as_compute_to_the_exponent(law: Chinchilla) -> None:
    small, large = law.allocate(1e18), law.allocate(1e20)
    assert np.log(large.n_params / small.n_params) == pytest.approx(law.optimum_exponent * np.log(100), rel=1e-9)


@st.composite
def thetas(draw: st.DrawFn) -> tuple[Law, np.ndarray]:
    """A law and somewhere it may be: terms of any size around the losses, exponents in their range."""
    law = LAWS[draw(st.sampled_from(sorted(LAWS)))]
    return law, np.array([draw(st.floats(-1.5, 1.5) if is_log else st.floats(0.05, 0.9)) for is_log in law.is_log])


@given(place=thetas())
def test_slopes_agree_with_differences(place: tuple[Law, np.ndarray]) -> None:
    law, theta = place
    cells = centred_grid(law)
    for i, step in enumerate(np.eye(theta.size) * 1e-5):
        numeric = (predict_log_loss(theta + step, cells) - predict_log_loss(theta - step, cells)) / 2e-5
        np.testing.assert_allclose(jacobian(theta, cells)[:, i], numeric, rtol=1e-7, atol=1e-7)


@given(place=thetas())
def test_centred_logs_are_the_same_law(place: tuple[Law, np.ndarray]) -> None:
    law, theta = place
    cells = centred_grid(law)
    params = params_of_theta(theta, cells)
    np.testing.assert_allclose(theta_of_params(params, cells), theta, atol=1e-9)
    np.testing.assert_allclose(law.predict(params, **grid()), np.exp(predict_log_loss(theta, cells)), rtol=1e-9)


def test_predictions_are_the_equations() -> None:
    n, d = grid()["n_params"], grid()["tokens"]
    np.testing.assert_allclose(
        CHINCHILLA.predict([1.7, 40, 200, 0.34, 0.28], n_params=n, tokens=d), 1.7 + 40 / n**0.34 + 200 / d**0.28, rtol=1e-12
    )
    np.testing.assert_allclose(TIED.predict([1.7, 40, 200, 0.3], n_params=n, tokens=d), 1.7 + (40 * n**-0.3 + 200 * d**-0.3))
    # Kaplan et al. 2020, equation 1.5, their constants.
    n_c, d_c, alpha_n, alpha_d = 6.4e13, 1.8e13, 0.076, 0.103
    params = [n_c ** (alpha_n / alpha_d), d_c, alpha_n / alpha_d, alpha_d]
    written = ((n_c / n) ** (alpha_n / alpha_d) + d_c / d) ** alpha_d
    np.testing.assert_allclose(KAPLAN_ND.predict(params, n_params=n, tokens=d), written, rtol=1e-12)
    said = KAPLAN_ND.derive(KAPLAN_ND.name_params(np.array(params)))
    assert said == pytest.approx({"alpha_N": alpha_n, "N_c": n_c, "D_c": d_c})
    np.testing.assert_allclose(KAPLAN_N.predict([8.8e13**0.076, 0.076], n_params=n), (8.8e13 / n) ** 0.076)


def test_predictions_broadcast_over_parameters_and_places() -> None:
    params = np.array([[1.7, 40, 200, 0.34, 0.28], [1.8, 30, 100, 0.3, 0.3]])
    together = CHINCHILLA.predict(params, n_params=[[1e6], [1e7], [1e8]], tokens=1e9)
    assert together.shape == (2, 3, 1)
    assert together[1, 2, 0] == pytest.approx(1.8 + 30 / 1e8**0.3 + 100 / 1e9**0.3)


def test_special_cases_are_read_as_chinchilla() -> None:
    assert TIED.as_chinchilla(np.array([1.7, 40, 200, 0.3])) == Chinchilla(1.7, 40, 200, 0.3, 0.3)
    for law in (KAPLAN_ND, KAPLAN_N):
        with pytest.raises(ValueError, match="not of the form"):
            law.as_chinchilla(np.ones(len(law.parameters)))


def test_many_laws_at_once_are_each_law_alone() -> None:
    cells = centred_grid(CHINCHILLA)
    theta = np.random.default_rng(0).normal(0.3, 0.1, (3, 2, 5))
    together, slopes = predict_log_loss(theta, cells), jacobian(theta, cells)
    for place in np.ndindex(3, 2):
        np.testing.assert_allclose(together[place], predict_log_loss(theta[place], cells), rtol=1e-14)
        np.testing.assert_allclose(slopes[place], jacobian(theta[place], cells), rtol=1e-12)


def test_terms_of_any_size_neither_overflow_nor_vanish() -> None:
    cells = centre(CHINCHILLA, {"n_params": [1e3, 1e12], "tokens": [1e3, 1e15]}, [5.0, 2.0])
    theta = np.array([0.0, 900.0, -900.0, 3.0, 3.0])
    assert np.isfinite(predict_log_loss(theta, cells)).all()
    assert np.isfinite(jacobian(theta, cells)).all()


def test_every_law_names_its_source_and_its_parameters() -> None:
    for name, law in LAWS.items():
        assert law.name == name
        assert "arXiv" in law.source
        assert len(set(law.parameters)) == len(law.parameters)
