"""Decisions: closed forms against root finding, intervals that grow with reach, questions that cannot be answered."""

import numpy as np
import pytest
from test_allocate import LAW
from test_diagnose import fit_cells, make_cells

from results.allocate import AllocationError, find_compute
from results.decide import decide_budget, decide_loss, reach_loss, render_decision
from results.study import CONVENTIONS


@pytest.mark.parametrize("served", [0.0, 1e12, 1e14])
@pytest.mark.parametrize("loss", [1.95, 2.5])
def test_the_way_to_a_loss_is_the_one_that_a_search_over_budgets_finds(loss: float, served: float) -> None:
    found, searched = reach_loss(LAW, loss, served), find_compute(LAW.loss, loss, served_tokens=served)
    assert found.flops == pytest.approx(searched.flops, rel=1e-6)
    assert found.n_params == pytest.approx(searched.n_params, rel=1e-4)
    assert float(LAW.loss(found.n_params, found.tokens)) == pytest.approx(loss, rel=1e-12)


def test_a_budget_and_the_loss_it_buys_are_one_decision() -> None:
    fitted = fit_cells(make_cells())
    by_budget = decide_budget(fitted, 1e15)
    by_loss = decide_loss(fitted, by_budget.best.loss)
    assert by_loss.best.flops == pytest.approx(1e15, rel=1e-9)
    for name in ("n_params", "tokens", "tokens_per_param", "loss"):
        interval = by_budget.intervals[name]
        assert interval.identified, interval.problem
        assert interval.low < interval.estimate < interval.high
    assert by_budget.intervals["n_params"].estimate == pytest.approx(by_budget.best.n_params)


def test_intervals_widen_with_reach_and_the_page_says_how_far_it_is() -> None:
    fitted = fit_cells(make_cells())
    near, far = decide_budget(fitted, fitted.flops), decide_budget(fitted, 1e4 * fitted.flops)
    widths = [float(np.log(one.intervals["n_params"].high / one.intervals["n_params"].low)) for one in (near, far)]
    assert widths[1] > 1.5 * widths[0]
    assert near.reach == pytest.approx(1)
    assert "long way out" not in render_decision(near, CONVENTIONS["total"])
    assert "long way out" in render_decision(far, CONVENTIONS["total"])


def test_served_tokens_make_the_answer_smaller() -> None:
    fitted = fit_cells(make_cells())
    plain, served = (decide_loss(fitted, 1.5, tokens) for tokens in (0.0, 1e12))
    assert served.best.n_params < plain.best.n_params
    assert served.intervals["n_params"].high < plain.intervals["n_params"].high


def test_a_loss_below_the_floor_is_refused_and_near_it_is_not_quoted() -> None:
    fitted = fit_cells(make_cells(sigma=0.01))
    with pytest.raises(AllocationError, match="not above E"):
        decide_loss(fitted, 0.5)
    close = decide_loss(fitted, fitted.fit["E"] * 1.001)
    assert not close.intervals["flops"].identified
    assert "not identified" in render_decision(close, CONVENTIONS["total"])
