"""Synthetic studies find what is known of estimators and designs: a parabola's bias, a ladder that says nothing, sd by design."""

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_experiment

from harness.config import ConfigError
from harness.plan import plan_experiment
from results.design import ask, list_candidates, optimise_design
from results.frontier import METHODS
from results.laws import Chinchilla
from results.preflight import (
    PRIOR,
    Grid,
    Outcome,
    Preflight,
    choose_prior,
    find_minima,
    load_prior,
    read_grid,
    render_preflight,
    run_preflight,
)

# The exact minimum on Besiroglu et al. 2024's points (tests/test_fit.py).
LAW = Chinchilla(E=np.exp(0.59730681), A=np.exp(6.16924617), B=np.exp(7.67015679), alpha=0.347310, beta=0.367172)
TARGET = 1e22


def iso_flop(spread: float, law: Chinchilla = LAW, budgets: int = 5, points: int = 7) -> Grid:
    flops = np.repeat(np.geomspace(1e17, 1e19, budgets), points)
    best = np.array([law.allocate(budget).n_params for budget in flops])
    n = best * np.tile(np.geomspace(1 / spread, spread, points), budgets)
    return Grid(n, flops / 6 / n, np.arange(len(n)))


def find(found: Preflight, estimator: str, quantity: str) -> Outcome:
    (outcome,) = [o for o in found.outcomes if o.estimator == estimator and o.quantity.startswith(quantity)]
    return outcome


@pytest.mark.parametrize(
    ("spread", "parabola", "cubic"), [(2, 1.00328, 0.99999), (4, 1.01318, 0.99990), (8, 1.02990, 0.99948), (16, 1.05374, 0.99836)]
)
def test_a_parabola_misses_the_optimum_by_a_known_factor(spread: float, parabola: float, cubic: float) -> None:
    law = Chinchilla(E=1.8, A=400.0, B=1800.0, alpha=0.34, beta=0.28)
    best, grid = law.allocate(1e18), iso_flop(spread, law, 3, 15)
    log_n = np.log(best.n_params) + np.linspace(-np.log(spread), np.log(spread), 15)
    losses = np.log(law.loss(np.exp(log_n), 1e18 / 6 / np.exp(log_n)))[None]
    for method, factor in (("parabola", parabola), ("cubic", cubic)):
        assert np.exp(find_minima(log_n, losses, METHODS[method]))[0] / best.n_params == pytest.approx(factor, abs=2e-5)
    found = run_preflight(law, grid, TARGET, n_studies=40, sigma=1e-5)
    assert 1 + find(found, "isoFLOP parabola", "N*").bias == pytest.approx(parabola, abs=2e-3)
    assert abs(find(found, "log-MSE", "N*").bias) < 1e-3


@pytest.mark.parametrize(("spread", "sd"), [(2, 0.0755), (4, 0.0389), (8, 0.0271), (16, 0.0211)])
def test_wider_slices_know_the_optimum_better(spread: float, sd: float) -> None:
    """Independent cells, noise 0.002, 1e20 FLOPs in all; 600 studies know a standard deviation to 3%."""
    grid = iso_flop(spread)
    counts = np.full(len(grid.n_params), 1e20 / grid.flops.sum())
    found = run_preflight(LAW, Grid(grid.n_params, grid.tokens, grid.trunk, counts=counts), TARGET, n_studies=600, sigma=0.002)
    assert find(found, "log-MSE", "N*").sd == pytest.approx(sd, rel=0.1)


def test_the_best_design_knows_it_twice_as_well_again() -> None:
    n, ratio = np.meshgrid(np.geomspace(1e7, 2e9, 25), np.geomspace(1, 1000, 25), indexing="ij")
    flops = 6 * n**2 * ratio
    kept = (flops >= 1e16) & (flops <= 1e19 * (1 + 1e-9))
    pool = list_candidates(n[kept], (n * ratio)[kept])
    design = optimise_design(ask(LAW, pool, [lambda law: np.log(law.allocate(TARGET).n_params)]), pool, 1e20, sigma=0.002)
    some = design.counts > 1e-6 * design.counts.max()
    grid = Grid(pool.n_params[some], pool.tokens[some], np.arange(some.sum()), counts=design.counts[some])
    found = run_preflight(LAW, grid, TARGET, n_studies=600, sigma=0.002)
    assert find(found, "log-MSE", "N*").sd == pytest.approx(0.0096, rel=0.1)


def test_a_ladder_at_one_ratio_is_said_to_identify_nothing() -> None:
    n = np.geomspace(1e7, 1e9, 10)
    found = run_preflight(LAW, Grid(n, 20 * n, np.arange(10)), TARGET, n_studies=20)
    assert found.outcomes == ()
    assert "cannot be told apart" in found.problems[0] or "cannot tell the law's two terms apart" in found.problems[0]


def test_shared_luck_widens_what_depends_on_size() -> None:
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(2e8, 2e10, 6), indexing="ij"))
    grid = Grid(n, d, np.repeat(np.arange(6), 6))
    apart, together = (run_preflight(LAW, grid, TARGET, n_studies=200, shared=shared) for shared in (0.0, 0.9))
    assert find(together, "log-MSE", "alpha").sd > 1.2 * find(apart, "log-MSE", "alpha").sd
    assert find(together, "log-MSE", "beta").sd < 0.6 * find(apart, "log-MSE", "beta").sd


def test_a_prior_stays_below_chance_and_may_come_from_a_study(tmp_path: Path) -> None:
    large, small = (Grid(n * np.ones(1), 20 * n * np.ones(1), np.zeros(1, dtype=int)) for n in (1e9, 1e4))
    assert choose_prior(large, 50_257) == PRIOR
    moved = choose_prior(small, 65)
    assert (moved.alpha, moved.beta) == (PRIOR.alpha, PRIOR.beta)
    assert float(moved.loss(1e4, 2e5)) < np.log(65) < float(PRIOR.loss(1e4, 2e5))
    (tmp_path / "fit.json").write_text('{"fit": {"law": {"E": 1, "A": 2, "B": 3, "alpha": 0.4, "beta": 0.5}}}')
    assert load_prior(tmp_path / "fit.json") == Chinchilla(1, 2, 3, 0.4, 0.5)
    (tmp_path / "fit.json").write_text('{"fit": null}')
    with pytest.raises(ConfigError, match=r"holds no fitted law"):
        load_prior(tmp_path / "fit.json")


def test_a_plan_is_read_by_role_and_told_as_a_page(data_dir: Path) -> None:
    sizes = [{"n_layer": 1, "n_head": 2, "d_model": d_model} for d_model in (8, 16, 32, 64, 128)]
    keys = {"sizes": sizes, "tokens": [128 * 100, 128 * 200, 128 * 400, 128 * 800], "hold_out": {"sizes": "largest"}}
    plan = plan_experiment(tiny_experiment(data_dir, grid=keys))
    grid = read_grid(plan)
    assert (len(grid.n_params), grid.trunk.max() + 1, len(grid.held_out)) == (16, 4, 4)
    found = run_preflight(choose_prior(grid, plan.data.vocab_size), grid, 1e13, n_studies=50)
    page = render_preflight("tiny", found, grid, 0.004, 0.5, 50)
    assert "16 cells to fit, in 4 trunks; 50 synthetic studies" in page
    assert f"loss of {grid.held_out[0][0]}" in page
    assert "isoFLOP estimators: no two computes" in page
    assert "This grid does not identify:" in page
