"""The minimiser: objectives as written down, rows that do not touch each other, bounds, and parameters that stay."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.descend import EXPONENT_BOUNDS, LOG_HUBER, LOG_MSE, MSE, descend, find_bounds, rho
from results.laws import CHINCHILLA, Centred, centre, theta_of_params

TRUTH = [1.8, 400.0, 2000.0, 0.34, 0.37]


def simulate(rows: int = 1, sigma: float = 0.004) -> tuple[Centred, np.ndarray]:
    """A grid of 35 cells, and log losses with noise. Shapes: (rows, 35)."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 7)))
    loss = CHINCHILLA.predict(TRUTH, n_params=n, tokens=d)
    noise = np.random.default_rng(0).normal(0, sigma, (rows, n.size))
    return centre(CHINCHILLA, {"n_params": n, "tokens": d}, loss), np.log(loss) + noise


@given(residual=st.floats(-1, 1), delta=st.floats(1e-4, 1))
def test_huber_is_a_square_and_then_a_line(residual: float, delta: float) -> None:
    size = abs(residual)
    written = residual**2 / 2 if size <= delta else delta * (size - delta / 2)
    assert float(rho(np.array(residual), delta)) == pytest.approx(written, abs=1e-15)
    assert float(rho(np.array(residual), np.inf)) == pytest.approx(residual**2 / 2)


def test_objectives_compare_logs_or_losses() -> None:
    fitted, observed = np.log([2.0, 3.0]), np.log([2.5, 3.0])
    np.testing.assert_allclose(MSE.compare(fitted, observed), [-0.5, 0], atol=1e-15)
    np.testing.assert_allclose(LOG_MSE.compare(fitted, observed), [np.log(0.8), 0])
    assert float(MSE.sum(MSE.compare(fitted, observed), np.array([2.0, 1.0]))) == pytest.approx(0.25)


@pytest.mark.parametrize("objective", [LOG_HUBER, LOG_MSE, MSE], ids=lambda o: o.name)
def test_rows_do_not_touch_each_other(objective: object) -> None:
    cells, losses = simulate(rows=12)
    start = theta_of_params(TRUTH, cells)
    weights = np.random.default_rng(1).uniform(0.2, 3, losses.shape)
    together = descend(cells, start, losses, objective, weights)
    assert together.converged.all()
    for i, row in enumerate(losses):
        alone = descend(cells, start, row, objective, weights[i])
        np.testing.assert_allclose(together.theta[i], alone.theta[0], atol=1e-7)
        assert together.objective[i] == pytest.approx(float(alone.objective[0]), rel=1e-10)


def test_large_work_is_split_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, losses = simulate(rows=9)
    start = theta_of_params(TRUTH, cells)
    whole = descend(cells, start, losses)
    monkeypatch.setattr("results.descend.BATCH_SIZE", 40)
    np.testing.assert_allclose(descend(cells, start, losses).theta, whole.theta, atol=1e-9)


def test_weights_are_as_good_as_copies() -> None:
    cells, (losses,) = simulate()
    times = np.random.default_rng(2).integers(0, 4, losses.size)
    weighted = descend(cells, theta_of_params(TRUTH, cells), losses, LOG_MSE, times.astype(float))
    copies = replace(cells, x=np.repeat(cells.x, times, axis=1), log_loss=np.repeat(cells.log_loss, times))
    copied = descend(copies, theta_of_params(TRUTH, cells), np.repeat(losses, times), LOG_MSE)
    np.testing.assert_allclose(weighted.theta, copied.theta, atol=1e-8)


def test_parameters_that_are_not_free_stay_and_bounds_hold() -> None:
    cells, losses = simulate()
    start = theta_of_params(TRUTH, cells)
    start[3] = 0.5
    found = descend(cells, start, losses, free=np.array([True, True, True, False, True]))
    assert found.theta[0, 3] == 0.5
    best = descend(cells, start, losses)
    assert best.objective[0] < found.objective[0]
    low, high = find_bounds(cells)
    wild = np.array([[5.0, -20.0, 5.0, 2.9, 0.011], [-5, 5, 5, 0.02, 2.9]])
    for theta in descend(cells, wild, losses, max_steps=3).theta:
        assert (theta >= low).all()
        assert (theta <= high).all()
    assert (low[3], high[3]) == EXPONENT_BOUNDS


def test_few_steps_are_told_as_not_converged() -> None:
    cells, losses = simulate()
    assert not descend(cells, theta_of_params([1.0, 10, 10, 0.1, 0.1], cells), losses, max_steps=2).converged.any()
