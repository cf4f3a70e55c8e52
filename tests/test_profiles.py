"""Profiles: against published ones, linear theory, and sides that stay open."""

from pathlib import Path

import numpy as np
import pytest

from results.descend import LOG_MSE
from results.fit import fit_chinchilla
from results.laws import Chinchilla, jacobian
from results.lessons import fit_points, load_chinchilla, profile_repeated
from results.profiles import profile_parameter

LAW = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)


def grid() -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e4, 1e6, 6), np.geomspace(4e5, 4e7, 6))
    return n.ravel(), d.ravel()


def test_published_points_bound_the_parameters_as_computed_elsewhere(fixtures: Path) -> None:
    fit = fit_points(load_chinchilla(fixtures).iloc[:-5])
    for name, low, high in (("E", 1.790, 1.845), ("alpha", 0.3275, 0.365), ("beta", 0.350, 0.385)):
        profile = profile_parameter(fit, name)
        assert profile.threshold == pytest.approx(1.026456e-3, rel=1e-5)
        assert profile.low == pytest.approx(low, abs=0.12 * (high - low)), name
        assert profile.high == pytest.approx(high, abs=0.12 * (high - low)), name


def test_the_value_of_repeated_tokens_has_a_lower_bound_and_no_upper_one(fixtures: Path) -> None:
    """182 runs of Muennighoff et al. 2023, the other five constants as published: 15.4 is not the minimum."""
    fit, profile, printed = profile_repeated(fixtures)
    assert printed == pytest.approx(0.01582593526, rel=1e-8)
    assert fit.objective_value <= 0.0158046626
    assert fit["R_D"] == pytest.approx(95.4, abs=0.5)
    assert fit["R_N"] == pytest.approx(1.706, abs=0.01)
    assert 7.0 < profile.low < 8.0
    assert profile.high == np.inf
    assert fit.open_sides == ("R_D up",)


def test_small_noise_gives_the_interval_of_linear_theory() -> None:
    n, d = grid()
    sigma = 1e-4
    loss = LAW.loss(n, d) * np.exp(sigma * np.random.default_rng(0).normal(size=n.size))
    fit = fit_chinchilla(n, d, loss, objective=LOG_MSE)
    slopes = jacobian(fit.theta, fit.centred)
    spread = float(np.sqrt((fit.residuals**2).mean()))  # the maximum-likelihood noise, as the profile takes it
    sd = spread * np.sqrt(np.linalg.inv(slopes.T @ slopes)[3, 3])
    profile = profile_parameter(fit, "alpha")
    assert profile.high - profile.low == pytest.approx(2 * 1.96 * sd, rel=0.08)
    assert profile.low < fit["alpha"] < profile.high


def test_the_least_objective_lies_at_the_fit_and_rises_outward() -> None:
    n, d = grid()
    loss = LAW.loss(n, d) * np.exp(0.004 * np.random.default_rng(1).normal(size=n.size))
    fit = fit_chinchilla(n, d, loss)
    profile = profile_parameter(fit, "beta")
    best = int(np.argmin(profile.objective))
    assert profile.values[best] == pytest.approx(fit["beta"], abs=2e-3)
    assert np.all(np.diff(profile.values) > 0)
    assert profile.objective[0] > profile.threshold < profile.objective[-1]


def test_a_floor_that_the_cells_do_not_see_is_open_downward() -> None:
    n, d = grid()
    floorless = Chinchilla(E=1e-6, A=22.0, B=310.0, alpha=0.15, beta=0.2)
    loss = floorless.loss(n, d) * np.exp(0.03 * np.random.default_rng(0).normal(size=n.size))
    profile = profile_parameter(fit_chinchilla(n, d, loss, objective=LOG_MSE), "E")
    assert profile.low == 0.0
    assert np.isfinite(profile.high)
