"""Coverage of nominal 95% intervals, measured; and that the measuring would see intervals that are too narrow."""

import numpy as np
import pandas as pd
import pytest

from results import coverage
from results.coverage import LAYOUTS, QUANTITIES, Layout, measure_coverage, render_coverage, simulate_studies, write_coverage
from results.fit import fit_chinchilla
from results.uncertainty import Spread, estimate_spread


def test_cells_of_a_trunk_share_their_luck_by_the_share_asked_for() -> None:
    draw, layout = np.random.default_rng(0), Layout(5, 4, 0.8)
    fits, run_ids = simulate_studies(layout, 200, draw)
    truth = np.log(coverage.TRUTH.loss(*np.exp(fits[0].centred.x + fits[0].centred.mean[:, None])))
    pairs = np.array([fit.centred.log_loss - truth for fit in fits]).reshape(-1, 4)
    assert np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1] == pytest.approx(0.8, abs=0.04)
    assert pairs.std() == pytest.approx(coverage.SIGMA, rel=0.05)
    assert len(set(run_ids)) == 5


@pytest.mark.parametrize("layout", [Layout(3, 3), Layout(5, 4, 0.8), Layout(5, 7)], ids=lambda layout: layout.words)
def test_fits_from_the_truth_are_those_of_a_full_search(layout: Layout) -> None:
    fits, _ = simulate_studies(layout, 20, np.random.default_rng(0))
    for fit in fits:
        n, d = np.exp(fit.centred.x + fit.centred.mean[:, None])
        whole = fit_chinchilla(n, d, np.exp(fit.centred.log_loss))
        np.testing.assert_allclose(fit.theta, whole.theta, atol=1e-4)
        np.testing.assert_allclose(fit.residuals, whole.residuals, atol=1e-5)
        assert fit.at_bounds == whole.at_bounds


def test_the_same_seed_gives_the_same_table(tmp_path) -> None:
    first, again = (measure_coverage(Layout(3, 3), 5, seed=1) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    assert set(first["quantity"]) == set(QUANTITIES)
    text = render_coverage(first)
    assert text.count("\n") == 1 + len(coverage.METHODS)
    csv, page = write_coverage(first, tmp_path / "new")
    assert len(pd.read_csv(csv)) == len(first)
    assert text in page.read_text()


def test_intervals_of_half_the_width_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(resamples, run_ids, quantity) -> Spread:
        spread = estimate_spread(resamples, quantity)
        middle = spread.estimate
        return Spread(middle, (middle + spread.low) / 2, (middle + spread.high) / 2, spread.df)

    monkeypatch.setattr(coverage, "METHODS", {"narrow": narrow})
    found = measure_coverage(Layout(4, 4), 30)
    assert found["coverage"].max() < 0.9


SUPPORTED = [layout for layout in LAYOUTS if layout.sizes > 4 or layout.share is None]


@pytest.mark.slow
@pytest.mark.parametrize("layout", SUPPORTED, ids=lambda layout: layout.words)
def test_default_intervals_hold_the_truth_as_often_as_they_say(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "METHODS", {"wild": coverage.METHODS["wild"]})
    found = measure_coverage(layout, 300)
    mean = found["coverage"].mean()
    assert 0.90 <= mean <= 0.985, found.to_string()
    assert found["coverage"].min() >= 0.90, found.to_string()
