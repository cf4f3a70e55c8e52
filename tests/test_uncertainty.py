"""Intervals: against published ones, against linear theory, in simulation; and the refusal to quote what a grid does not hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.descend import LOG_HUBER, LOG_MSE, MSE, Objective
from results.fit import Fit, fit_chinchilla, fit_law
from results.laws import CHINCHILLA, Chinchilla, jacobian
from results.lessons import fit_points, load_chinchilla
from results.uncertainty import (
    Interval,
    Resamples,
    estimate_by_delta,
    estimate_by_pairs,
    estimate_df,
    estimate_intervals,
    estimate_spread,
    invert_root,
    measure_seed_noise,
    resample_runs,
)

LAW = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)
FLOPS = 1e13


def simulate(
    draw: np.random.Generator, sizes: int = 5, budgets: int = 4, sigma: float = 0.004, share: float = 0.5, law: Chinchilla = LAW
) -> tuple[Fit, list[str]]:
    """Fit a trunk design whose log noise is, by `share`, common to a trunk, the rest a cell's own; return each cell's run too."""
    n, d = np.meshgrid(np.geomspace(1e4, 4e5, sizes), np.geomspace(4e5, 4e6, budgets), indexing="ij")
    trunk = np.repeat(np.arange(sizes), budgets)
    noise = np.sqrt(share) * draw.normal(size=sizes)[trunk] + np.sqrt(1 - share) * draw.normal(size=trunk.size)
    loss = law.loss(n.ravel(), d.ravel()) * np.exp(sigma * noise)
    return fit_chinchilla(n.ravel(), d.ravel(), loss), [f"run-{run}" for run in trunk]


def simulate_intervals(seed: int = 0, **options: float) -> dict[str, Interval]:
    fit, run_ids = simulate(np.random.default_rng(seed), **options)
    return estimate_intervals(resample_runs(fit, run_ids, n_resamples=300), FLOPS)


def test_the_same_seed_gives_the_same_interval_and_another_a_like_one() -> None:
    fit, run_ids = simulate(np.random.default_rng(0))
    first, again, other = (estimate_intervals(resample_runs(fit, run_ids, seed=seed), FLOPS)["alpha"] for seed in (0, 0, 1))
    assert first == again
    assert other != first
    assert other.high - other.low == pytest.approx(first.high - first.low, rel=0.15)


def test_names_and_order_of_runs_do_not_matter() -> None:
    fit, run_ids = simulate(np.random.default_rng(0))
    renamed = [f"{'zyxwv'[int(run[-1])]}" for run in run_ids]
    widths = []
    for names in (run_ids, renamed):
        interval = estimate_intervals(resample_runs(fit, names), FLOPS)["beta"]
        widths.append(interval.high - interval.low)
    assert widths[0] == pytest.approx(widths[1], rel=0.15)


def test_published_bootstrap_is_met_where_cells_are_independent(fixtures: Path) -> None:
    points = pd.read_csv(fixtures / "chinchilla" / "svg_extracted_data.csv").sort_values("loss").iloc[:-5]
    n, flops = points["Model Size"], points["Training FLOP"]
    fit = fit_chinchilla(n, flops / 6 / n, points["loss"])
    intervals = estimate_intervals(resample_runs(fit, [str(i) for i in range(240)], n_resamples=500), 5.76e23)
    # Besiroglu et al. 2024, table 1: pairs bootstrap, 4000 resamples.
    published = {"E": (1.769, 1.871), "alpha": (0.317, 0.373), "beta": (0.331, 0.415), "optimum_exponent": (0.473, 0.553)}
    for name, (low, high) in published.items():
        interval = intervals[name]
        assert interval.identified, interval.problem
        assert abs(interval.low - low) < 0.25 * (high - low), name
        assert abs(interval.high - high) < 0.25 * (high - low), name
    assert intervals["tokens_per_param"].low == pytest.approx(7.7, rel=0.25)
    assert intervals["tokens_per_param"].high == pytest.approx(36.6, rel=0.25)


def test_spread_is_the_cluster_sandwich_where_the_law_is_all_but_linear() -> None:
    """With delta so large that Huber is least squares and noise so small that the law is linear, theory gives the answer."""
    draw = np.random.default_rng(3)
    fit, run_ids = simulate(draw, sigma=1e-5)
    slopes = jacobian(fit.theta, fit.centred)
    basis, _ = np.linalg.qr(slopes)
    annihilator = np.eye(fit.n_cells) - basis @ basis.T
    fit = replace(fit, objective=LOG_MSE, residuals=annihilator @ fit.residuals)
    to_theta = np.linalg.pinv(slopes)
    covariance, runs = np.zeros((5, 5)), np.array(run_ids)
    for run in set(run_ids):
        cells = np.flatnonzero(runs == run)
        scores = to_theta[:, cells] @ invert_root(annihilator[np.ix_(cells, cells)]) @ fit.residuals[cells]
        covariance += np.outer(scores, scores)
    resamples = resample_runs(fit, run_ids, n_resamples=4000)
    alphas = np.array([law.alpha for law in resamples.laws])
    assert alphas.std() == pytest.approx(np.sqrt(covariance[3, 3]), rel=0.05)


def test_linear_theory_and_the_bootstrap_agree_where_noise_is_small() -> None:
    fit, run_ids = simulate(np.random.default_rng(0), sizes=8, sigma=1e-4)
    fit = replace(fit, objective=LOG_MSE)
    resamples = resample_runs(fit, run_ids, n_resamples=2000)

    def quantity(law: Chinchilla) -> np.ndarray:
        return np.array([law.alpha, law.beta, np.log(law.allocate(FLOPS).n_params), np.log(law.allocate(FLOPS).loss)])

    theory, found = estimate_by_delta(resamples, quantity), estimate_spread(resamples, quantity)
    np.testing.assert_allclose(theory.high - theory.low, found.high - found.low, rtol=0.1)


def test_pairs_meet_the_published_intervals(fixtures: Path) -> None:
    """Besiroglu et al. 2024, table 1, by their own method: standard errors, 80% and 95% intervals (of a: drawn again)."""
    points = load_chinchilla(fixtures).iloc[:-5]
    fit, run_ids = fit_points(points), [f"{i:03}" for i in range(240)]

    def quantity(law: Chinchilla) -> np.ndarray:
        return np.array(
            [law.A, law.B, law.E, law.alpha, law.beta, law.optimum_exponent, np.exp(law.log_tokens_per_param(5.76e23))]
        )

    wide = estimate_by_pairs(fit, run_ids, quantity, n_resamples=4000)
    published = np.array([(285, 744), (1042, 5810), (1.769, 1.871), (0.317, 0.373), (0.331, 0.415), (0.481, 0.557), (7.7, 36.6)])
    for low, high, (expected_low, expected_high) in zip(wide.low, wide.high, published, strict=True):
        margin = 0.08 * (expected_high - expected_low)
        assert low == pytest.approx(expected_low, abs=margin)
        assert high == pytest.approx(expected_high, abs=margin)
    narrow = estimate_by_pairs(fit, run_ids, quantity, n_resamples=4000, level=0.8)
    assert narrow.high[5] - narrow.low[5] == pytest.approx(0.051, rel=0.08)
    assert (narrow.low[6], narrow.high[6]) == pytest.approx((10.1, 28.2), rel=0.1)
    one_sd = estimate_by_pairs(fit, run_ids, quantity, n_resamples=4000, level=0.6827)
    errors = (one_sd.high - one_sd.low) / 2  # of the middle: the published ones are of all, and beta's tail is long
    np.testing.assert_allclose(errors[2:6], [0.0257, 0.0154, 0.0206, 0.020], rtol=0.15)


def test_inverse_root_undoes_a_matrix_where_it_can_be_undone() -> None:
    columns = np.random.default_rng(0).normal(size=(4, 3))
    matrix = columns @ columns.T  # of rank 3
    root = invert_root(matrix)
    projection = root @ matrix @ root
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-9)
    assert np.trace(projection) == pytest.approx(3)
    np.testing.assert_allclose(projection @ columns, columns, atol=1e-9)


def test_degrees_of_freedom_are_those_of_the_full_matrix() -> None:
    fit, run_ids = simulate(np.random.default_rng(0))
    resamples = resample_runs(fit, run_ids, n_resamples=10)
    slopes, runs = jacobian(fit.theta, fit.centred), np.array(run_ids)
    basis, _ = np.linalg.qr(slopes)
    annihilator = np.eye(fit.n_cells) - basis @ basis.T
    direction = np.linalg.pinv(slopes.T @ slopes)[:, 4]  # beta
    columns = []
    for run in sorted(set(run_ids)):
        cells = np.flatnonzero(runs == run)
        columns.append(annihilator[:, cells] @ invert_root(annihilator[np.ix_(cells, cells)]) @ slopes[cells] @ direction)
    spectrum = np.linalg.eigvalsh(np.array(columns) @ np.array(columns).T)
    expected = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert float(estimate_df(resamples, lambda law: law.beta)) == pytest.approx(expected, rel=1e-4)
    assert 1 <= expected <= 5


def test_a_quantity_of_many_points_is_each_point_alone() -> None:
    fit, run_ids = simulate(np.random.default_rng(0))
    resamples = resample_runs(fit, run_ids, n_resamples=100)
    places = np.array([[1e4, 1e5, 1e6], [2e4, 2e5, 2e6]])
    together = estimate_spread(resamples, lambda law: law.loss(places, 1e6))
    assert together.low.shape == places.shape
    for place, low, high, df in zip(places.flat, together.low.flat, together.high.flat, together.df.flat, strict=True):
        alone = estimate_spread(resamples, lambda law, n=place: law.loss(n, 1e6))
        assert (float(alone.low), float(alone.high)) == pytest.approx((low, high), rel=1e-9)
        assert float(alone.df) == pytest.approx(df, rel=1e-4)


def test_a_clean_wide_grid_identifies_everything() -> None:
    for name, interval in simulate_intervals(sigma=2e-4).items():
        assert interval.identified, (name, interval.problem)
        assert interval.low < interval.estimate < interval.high


def test_noise_widens_until_the_exponent_of_parameters_is_not_identified() -> None:
    widths = [i.high - i.low for i in (simulate_intervals(sigma=sigma)["alpha"] for sigma in (5e-4, 2e-3, 8e-3))]
    assert widths == sorted(widths)
    drowned = simulate_intervals(sigma=0.05)["alpha"]
    assert not drowned.identified
    assert drowned.problem


def test_a_floor_far_below_the_losses_is_not_identified() -> None:
    floorless = Chinchilla(E=1e-3, A=22.0, B=310.0, alpha=0.15, beta=0.2)
    assert not simulate_intervals(sigma=0.004, law=floorless)["E"].identified


def test_three_sizes_on_trunks_support_no_interval_but_alone_they_do() -> None:
    fit, run_ids = simulate(np.random.default_rng(0), sizes=3)
    shared = estimate_intervals(resample_runs(fit, run_ids, n_resamples=100), FLOPS)
    assert all("train 1 more size" in interval.problem for interval in shared.values())
    alone = resample_runs(fit, [f"run-{cell}" for cell in range(fit.n_cells)], n_resamples=100)
    assert alone.unsupported == ""


def make_resamples(at_bound: float = 0.0, unconverged: float = 0.0) -> Resamples:
    fit, run_ids = simulate(np.random.default_rng(0), sigma=2e-4)
    resamples = resample_runs(fit, run_ids, n_resamples=100)
    return replace(resamples, share_at_bound=resamples.share_at_bound | {"beta": at_bound}, share_unconverged=unconverged)


def test_refits_that_failed_or_hit_an_edge_are_not_quoted() -> None:
    calm = estimate_intervals(make_resamples(), FLOPS)
    assert calm["beta"].identified
    on_edge = estimate_intervals(make_resamples(at_bound=0.2), FLOPS)
    assert "20% of the refits" in on_edge["beta"].problem
    assert "20% of the refits" in on_edge["tokens_per_param"].problem, "the best split rests on beta"
    assert on_edge["alpha"].identified
    lost = estimate_intervals(make_resamples(unconverged=0.5), FLOPS)
    assert all("did not converge" in interval.problem for interval in lost.values())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_coverage_is_what_the_page_says(share: float) -> None:
    """The sentence `COVERAGE`, measured: 5 sizes x 4 budgets, a trunk for each size."""
    draw, n_studies = np.random.default_rng(0), 200
    inside = dict.fromkeys(("E", "alpha", "beta", "optimum_exponent", "tokens_per_param"), 0)
    ratio = float(np.exp(LAW.log_tokens_per_param(FLOPS)))
    truth = {
        "E": LAW.E,
        "alpha": LAW.alpha,
        "beta": LAW.beta,
        "optimum_exponent": LAW.optimum_exponent,
        "tokens_per_param": ratio,
    }
    for _ in range(n_studies):
        fit, run_ids = simulate(draw, share=share)
        intervals = estimate_intervals(resample_runs(fit, run_ids, n_resamples=300), FLOPS)
        for name in inside:
            inside[name] += intervals[name].low <= truth[name] <= intervals[name].high
    coverage = {name: count / n_studies for name, count in inside.items()}
    assert all(0.92 <= value <= 0.99 for value in coverage.values()), coverage


def test_seed_noise_is_pooled_over_groups_that_differ_in_the_seed_alone() -> None:
    cells = pd.DataFrame(
        {
            "size": ["s", "s", "s", "m", "m", "l"],
            "planned_tokens": [10, 10, 10, 10, 10, 10],
            "lr": 1e-3,
            "global_batch_size": 8,
            "schedule": "wsd",
            "precision": "fp32",
            "val_loss": [2.0, 2.1, 2.2, 1.0, 1.2, 5.0],
        }
    )
    noise = measure_seed_noise(cells)
    assert noise is not None
    assert (noise.n_cells, noise.n_groups) == (5, 2)
    assert noise.sd == pytest.approx(np.sqrt((0.02 + 0.02) / 3))
    assert noise.low < noise.sd < noise.high
    assert measure_seed_noise(cells.drop_duplicates("size")) is None


@pytest.mark.parametrize("objective", [LOG_MSE, MSE], ids=lambda objective: objective.name)
def test_intervals_follow_the_objective(objective: Objective) -> None:
    """Under least squares of losses the noise is in losses; with small noise both objectives tell nearly the same width."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e4, 4e5, 6), np.geomspace(4e5, 4e6, 5)))
    loss = LAW.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 1e-3, n.size))
    names = [str(i) for i in range(n.size)]
    widths = []
    for chosen in (LOG_HUBER, objective):
        interval = estimate_intervals(resample_runs(fit_chinchilla(n, d, loss, objective=chosen), names, n_resamples=400), FLOPS)[
            "alpha"
        ]
        assert interval.low < LAW.alpha < interval.high
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.5)


def test_what_is_held_fixed_has_no_interval_of_its_own_and_narrows_what_trades_against_it() -> None:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e4, 4e5, 6), np.geomspace(4e5, 4e6, 5)))
    loss = LAW.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 2e-3, n.size))
    cells, names = {"n_params": n, "tokens": d, "val_loss": loss}, [str(i) for i in range(n.size)]
    whole, held = (
        estimate_intervals(resample_runs(fit_law(CHINCHILLA, cells, fixed=fixed), names, n_resamples=200), FLOPS)
        for fixed in ({}, {"E": LAW.E})
    )
    assert held["E"].problem == "held fixed, not fitted"
    assert whole["E"].problem != held["E"].problem
    assert held["beta"].high - held["beta"].low < 0.8 * (whole["beta"].high - whole["beta"].low)


def test_cells_without_a_seed_are_no_repeats() -> None:
    cells = pd.DataFrame({"n_params": [1.0, 1.0, 1.0], "tokens": 1.0, "seed": [0, 1, None], "val_loss": [2.0, 2.1, 3.0]})
    noise = measure_seed_noise(cells)
    assert noise is not None
    assert noise.n_cells == 2
