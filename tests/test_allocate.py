"""The best use of compute: against the closed form, against a direct search, and what cannot be answered."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from model.ladder import iter_ladder
from model.size import count_flops, count_params
from results.allocate import AllocationError, allocate, find_compute, follow_ladder, six_n
from results.laws import Chinchilla

# Besiroglu et al. 2024's points, refitted: the exact minimum (tests/test_fit.py).
LAW = Chinchilla(E=1.81722, A=477.826, B=2143.42, alpha=0.347310, beta=0.367172)


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(0.1, 0.9), beta=st.floats(0.1, 0.9), log_a=st.floats(3, 9), log_b=st.floats(3, 9), log_c=st.floats(18, 25))
def test_root_finding_is_the_closed_form_where_flops_are_6nd(alpha, beta, log_a, log_b, log_c) -> None:
    law, flops = Chinchilla(2.0, np.exp(log_a), np.exp(log_b), alpha, beta), 10.0**log_c
    expected = law.allocate(flops)
    if min(expected.n_params, expected.tokens) < 10:
        return  # less than a parameter or a token: not a model
    found = allocate(law.loss, flops)
    assert found.n_params == pytest.approx(expected.n_params, rel=1e-6)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize(
    ("flops", "n_params", "tokens_per_param", "loss"),
    [
        (1e18, 8.020e7, 25.9, 3.4890),
        (1e21, 2.792e9, 21.38, 2.30445),
        (5.76e23, 7.319e10, 17.92, 1.97391),
        (1e25, 3.173e11, 16.55, 1.91137),
    ],
)
def test_published_law_splits_compute_as_computed_elsewhere(flops, n_params, tokens_per_param, loss) -> None:
    best = allocate(LAW.loss, flops)
    assert best.n_params == pytest.approx(n_params, rel=1e-3)
    assert best.tokens_per_param == pytest.approx(tokens_per_param, rel=2e-3)
    assert best.loss == pytest.approx(loss, abs=1e-4)


def ladder(vocab_size: int = 50_304):
    return list(iter_ladder(1e5, 3e9, preset="gpt2", aspect=64, d_head=64, vocab_size=vocab_size, seq_len=1024))


def test_exact_flops_pass_through_the_shapes_and_move_the_optimum() -> None:
    configs = ladder()
    exact = follow_ladder(configs)
    for config in configs:
        assert float(exact(count_params(config).n_params)) == pytest.approx(count_flops(config).flops_per_token, rel=1e-9)
    assert np.all(np.diff(exact(np.geomspace(1e5, 1e11, 200))) > 0)
    best, plain = allocate(LAW.loss, 1e20, flops_per_token=exact), allocate(LAW.loss, 1e20)
    assert best.tokens * float(exact(best.n_params)) == pytest.approx(1e20, rel=1e-9)
    direct = minimize_scalar(
        lambda x: float(LAW.loss(np.exp(x), 1e20 / exact(np.exp(x)))), bracket=(18, 20, 22), options={"xtol": 1e-10}
    )
    assert best.loss == pytest.approx(direct.fun, rel=1e-12)
    assert best.n_params != pytest.approx(plain.n_params, rel=0.005), "attention and head must matter, or nothing was tested"


def test_served_tokens_make_the_model_smaller_and_its_training_longer() -> None:
    plain = find_compute(LAW.loss, 2.0)
    served = [find_compute(LAW.loss, 2.0, served_tokens=tokens) for tokens in (0.0, 1e12, 1e13, 1e14)]
    assert served[0] == plain
    assert all(later.n_params < earlier.n_params and later.tokens > earlier.tokens for earlier, later in pairwise(served))
    assert all(best.loss == pytest.approx(2.0, rel=1e-9) for best in served)


def test_the_cheapest_way_to_a_loss_is_cheaper_than_its_neighbours() -> None:
    """Sardana et al. 2024, equation 2: minimise 6 N D + 2 N S along L(N, D) = l; here the curve is walked directly."""
    target, served = 2.0, 1e13
    best = find_compute(LAW.loss, target, served_tokens=served)

    def cost(log_n: float) -> float:
        tokens = (LAW.B / (target - LAW.E - LAW.A * np.exp(-LAW.alpha * log_n))) ** (1 / LAW.beta)
        return np.exp(log_n) * (6 * tokens + 2 * served)

    direct = minimize_scalar(
        cost, bounds=(np.log(best.n_params) - 0.5, np.log(best.n_params) + 1), method="bounded", options={"xatol": 1e-9}
    )
    assert best.flops == pytest.approx(direct.fun, rel=1e-9)
    assert np.log(best.n_params) == pytest.approx(direct.x, abs=1e-4)


def test_compute_for_a_loss_undoes_the_loss_for_a_compute() -> None:
    for flops in (1e15, 1e20, 1e25):
        assert find_compute(LAW.loss, LAW.allocate(flops).loss).flops == pytest.approx(flops, rel=1e-6)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: allocate(LAW.loss, -1.0), "flops=-1"),
        (lambda: allocate(LAW.loss, float("nan")), "flops=nan"),
        (lambda: allocate(LAW.loss, 1e20, served_tokens=-5), "served_tokens=-5"),
        (lambda: allocate(LAW.loss, 1e12, served_tokens=1e13), "no token to train on"),
        (lambda: allocate(lambda n, d: 1 + 1 / np.log(np.asarray(d) + 2.0), 1e20), "no best model"),
        (lambda: find_compute(LAW.loss, 1.8), "below what the law reaches"),
        (lambda: find_compute(LAW.loss, 1e6), "hardly any compute"),
        (lambda: follow_ladder(ladder()[:1]), "add sizes"),
    ],
)
def test_what_cannot_be_answered_says_why(ask, words) -> None:
    with pytest.raises(AllocationError, match=words):
        ask()


def test_six_n_is_six_n() -> None:
    assert six_n([1, 2]).tolist() == [6.0, 12.0]
