"""Designs: against numbers computed elsewhere, against a linear program, and against random choices on published points."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from results.descend import LOG_MSE
from results.design import (
    CERTIFIED,
    Candidates,
    DesignError,
    ask,
    forecast_sd,
    list_candidates,
    measure_information,
    optimise_design,
    pick_cells,
)
from results.fit import fit_chinchilla
from results.laws import Chinchilla
from results.lessons import iter_duels

# Besiroglu et al. 2024's points, refitted: the exact minimum (tests/test_fit.py).
LAW = Chinchilla(E=np.exp(0.59730681), A=np.exp(6.16924617), B=np.exp(7.67015679), alpha=0.347310, beta=0.367172)
SIGMA, BUDGET = 0.002, 1e20


def log_best_params(law: Chinchilla) -> float:
    return np.log(law.allocate(1e22).n_params)


def log_best_loss(law: Chinchilla) -> float:
    return np.log(law.allocate(1e22).loss)


def wide_pool() -> Candidates:
    """25 sizes x 25 tokens-per-parameter ratios, of 1e16 to 1e19 FLOPs: 328 cells."""
    n, ratio = np.meshgrid(np.geomspace(1e7, 2e9, 25), np.geomspace(1, 1000, 25), indexing="ij")
    flops = 6 * n**2 * ratio
    kept = (flops >= 1e16) & (flops <= 1e19 * (1 + 1e-9))
    return list_candidates(n[kept], (n * ratio)[kept])


def iso_flop(spread: float) -> Candidates:
    """Five budgets, seven sizes each, from `spread` below the best to `spread` above."""
    flops = np.repeat(np.geomspace(1e17, 1e19, 5), 7)
    best = np.array([LAW.allocate(budget).n_params for budget in flops])
    n = best * np.tile(np.geomspace(1 / spread, spread, 7), 5)
    return list_candidates(n, flops / 6 / n)


def equal_counts(candidates: Candidates) -> np.ndarray:
    return np.full(len(candidates), BUDGET / candidates.flops.sum())


@pytest.mark.parametrize(("spread", "sd"), [(2, 0.0755), (4, 0.0389), (8, 0.0271), (16, 0.0211)])
def test_wider_iso_flops_know_the_optimum_better(spread: float, sd: float) -> None:
    candidates = iso_flop(spread)
    (forecast,) = forecast_sd(ask(LAW, candidates, [log_best_params]), equal_counts(candidates), SIGMA)
    assert forecast == pytest.approx(sd, abs=6e-5)


def test_the_best_design_is_certified_and_more_than_twice_as_sharp() -> None:
    pool = wide_pool()
    assert len(pool) == 328
    question = ask(LAW, pool, [log_best_params])
    (everything,) = forecast_sd(question, equal_counts(pool), SIGMA)
    assert everything == pytest.approx(0.0338, abs=6e-5)
    design = optimise_design(question, pool, BUDGET, SIGMA)
    assert design.certificate <= CERTIFIED
    assert design.sd[0] == pytest.approx(0.0096, abs=6e-5)
    assert design.counts @ pool.flops == pytest.approx(BUDGET)
    assert len(design.support) <= 8


def test_for_one_target_the_design_is_elfvings_linear_program() -> None:
    """min sum |x_i| with sum x_i slopes_i = target: the least sd of any design, found by another method (Elfving 1952)."""
    pool = wide_pool()
    question = ask(LAW, pool, [log_best_params])
    columns = (question.slopes * np.sqrt(BUDGET / pool.flops)[:, None] / SIGMA).T
    size = np.linalg.norm(columns, axis=1)[:, None]
    program = linprog(
        np.ones(2 * len(pool)), A_eq=np.hstack([columns / size, -columns / size]), b_eq=question.targets[0] / size[:, 0]
    )
    design = optimise_design(question, pool, BUDGET, SIGMA)
    assert design.sd[0] == pytest.approx(program.fun, rel=1e-3)
    assert design.sd[0] >= program.fun * (1 - 1e-9)


def test_two_targets_share_the_budget() -> None:
    pool = wide_pool()
    design = optimise_design(ask(LAW, pool, [log_best_params, lambda law: 40 * log_best_loss(law)]), pool, BUDGET, SIGMA)
    assert design.sd[0] == pytest.approx(0.0139, rel=0.01)
    assert design.sd[1] / 40 == pytest.approx(0.00131, rel=0.01)


def test_a_certificate_above_one_means_a_better_design_exists() -> None:
    """The certificate of a design that was stopped early is no less than what the optimum gains on it."""
    pool = wide_pool()
    question = ask(LAW, pool, [log_best_params])
    best = optimise_design(question, pool, BUDGET, SIGMA)
    flat = BUDGET / pool.flops / len(pool)  # equal shares of the budget: where the search begins
    information = measure_information(question.slopes, flat, SIGMA)
    reached = np.linalg.solve(information, question.targets[0])
    brought = (question.slopes @ reached) ** 2 * BUDGET / pool.flops / SIGMA**2
    certificate = brought.max() / (question.targets[0] @ reached)
    gained = (forecast_sd(question, flat, SIGMA)[0] / best.sd[0]) ** 2
    assert 1 < gained <= certificate


def test_one_ratio_of_tokens_to_parameters_identifies_nothing() -> None:
    flops = np.geomspace(1e17, 1e19, 9)
    ladder = list_candidates(np.sqrt(flops / 120), 20 * np.sqrt(flops / 120))
    question = ask(LAW, ladder, [log_best_params])
    assert not forecast_sd(question, equal_counts(ladder), SIGMA)[0] < 100
    with pytest.raises(DesignError, match="cannot tell the law's parameters apart"):
        optimise_design(question, ladder, BUDGET)


def test_information_is_what_repeated_fits_show() -> None:
    """The forecast, against the spread of fits of simulated losses, at small noise."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    pool, draw = list_candidates(n, d), np.random.default_rng(0)
    (forecast,) = forecast_sd(ask(LAW, pool, [log_best_params]), np.ones(36), 1e-4)
    found = [
        log_best_params(fit_chinchilla(n, d, LAW.loss(n, d) * np.exp(1e-4 * draw.normal(size=36)), objective=LOG_MSE).constants)
        for _ in range(60)
    ]
    assert np.std(found) == pytest.approx(forecast, rel=0.25)


def test_picks_stay_in_the_budget_and_go_on_from_what_was_taken() -> None:
    pool, aims = wide_pool(), list_candidates([1e9, 3e9], [2e10, 6e10])
    first = pick_cells(LAW, pool, aims, 1e19)
    assert len(set(first)) == len(first) > 5
    assert pool.flops[first].sum() <= 1e19
    begun = first[:5]
    more = pick_cells(LAW, pool, aims, 1e19 - pool.flops[begun].sum(), taken=begun)
    assert begun + more == first
    assert pick_cells(LAW, pool, aims, 1.0) == []


def test_without_a_discrepancy_far_fewer_places_are_visited() -> None:
    pool, aims = wide_pool(), list_candidates([3e9], [6e10])
    spread, trusting = (pick_cells(LAW, pool, aims, 5e18, tau=tau) for tau in (0.03, 1e-6))
    assert pool.n_params[spread[:8]].std() > 0
    assert spread != trusting


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([1e7, -1.0], [1e9, 1e9]), "n_params"),
        (([1e7], [float("nan")]), "tokens"),
        (([], []), "nothing at all"),
        (([1e7, 1e8], [1e9]), "one of each"),
        (([1e7], [1e9], [0.0]), "flops"),
    ],
)
def test_candidates_are_checked(columns, words) -> None:
    with pytest.raises(DesignError, match=words):
        list_candidates(*columns)


@pytest.mark.slow
def test_chosen_cells_predict_better_than_random_ones_for_the_same_compute(fixtures: Path) -> None:
    duels = list(iter_duels(fixtures))
    assert len(duels) == 12
    assert sum(duel.chosen < duel.random for duel in duels) >= 9, duels
