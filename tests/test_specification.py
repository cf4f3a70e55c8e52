"""The specification curve: an exact law gives one answer, choices that matter move it, what cannot be fitted says why."""

import numpy as np
import pandas as pd
import pytest

from results.laws import Chinchilla
from results.specification import DROPS, ESTIMATORS, iter_specifications

LAW = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)


def table(**columns) -> pd.DataFrame:
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e4, 4e5, 5), np.geomspace(4e5, 4e6, 4)))
    return pd.DataFrame({"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d)} | {key: f(n) for key, f in columns.items()})


def test_an_exact_law_gives_one_exponent_whatever_is_dropped_and_minimised() -> None:
    found = list(iter_specifications(table()))
    assert len(found) == len(DROPS) * len(ESTIMATORS)
    free = [one for one in found if "alpha = beta" not in one.estimator]
    for one in free:
        assert one.exponent == pytest.approx(LAW.optimum_exponent, abs=1e-5)
    largest = 6 * 4e5 * 4e6
    assert free[0].tokens_per_param == pytest.approx(np.exp(LAW.log_tokens_per_param(largest)), rel=1e-4)
    tied = [one for one in found if "alpha = beta" in one.estimator]
    assert all(one.exponent == pytest.approx(0.5, abs=1e-6) for one in tied)


def test_the_first_is_what_fit_reports() -> None:
    first = next(iter_specifications(table()))
    assert first.choices == ("log-Huber", "total", "6ND", "nothing")


def test_what_n_and_c_count_moves_the_exponent() -> None:
    """Embeddings are most of a small model: counted out, the sizes spread further and a changes (Pearce & Song 2024)."""
    found = list(
        iter_specifications(
            table(n_params_non_embedding=lambda n: n - 0.8 * n**0.5 * 1e4**0.5, flops_per_token=lambda n: 6 * n + 40 * n**0.75)
        )
    )
    by_choice = {one.choices: one.exponent for one in found if not one.problem}
    assert len(found) == len(DROPS) * len(ESTIMATORS) * 2 * 2
    total, other = (by_choice[("log-Huber", params, "6ND", "nothing")] for params in ("total", "non-embedding"))
    assert abs(total - other) > 0.01
    assert by_choice[("log-Huber", "total", "exact", "nothing")] > total, "larger sizes are cheaper than 6 N D says"


def test_what_cannot_be_fitted_says_why_and_the_rest_goes_on() -> None:
    three = table()[lambda cells: cells["n_params"] < 1.5e5]  # three sizes: none can be dropped
    found = list(iter_specifications(three))
    refused = [one for one in found if one.problem]
    assert {one.dropped for one in refused} == {"smallest size"}
    assert all("too few" in one.problem and np.isnan(one.exponent) for one in refused)
