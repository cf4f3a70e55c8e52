"""Bowls and the powers through their bottoms: exact recovery, and what is refused."""

import numpy as np
import pytest

from results.fit import FitError
from results.hyperparameters import FLAT, find_bowls, fit_power_surface

SIZES, BUDGETS = (1e8, 3e8, 1e9), (2e9, 1e10, 5e10)
RATES, BATCHES = np.geomspace(1e-4, 1e-1, 9), np.geomspace(1e4, 1e8, 9)


def best(n: float, d: float) -> tuple[float, float]:
    """The step law with its published constants: Li et al. 2025, arXiv 2503.04715, equation 1."""
    return 1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571


def sweep(noise: float = 0.0, sizes: tuple[float, ...] = SIZES) -> dict[str, np.ndarray]:
    draw, rows = np.random.default_rng(0), []
    for n in sizes:
        for d in BUDGETS:
            lr, batch = best(n, d)
            for rate in RATES:
                for size in BATCHES:
                    u, v = np.log(rate / lr), np.log(size / batch)
                    rows.append(
                        (n, d, rate, size, 2.5 * np.exp(0.01 * u * u + 0.004 * v * v + 0.005 * u * v + noise * draw.normal()))
                    )
    return dict(zip(("n_params", "tokens", "lr", "global_batch_size", "val_loss"), np.array(rows).T, strict=True))


def test_a_known_step_law_is_recovered_exactly() -> None:
    bowls, refused = find_bowls(sweep(), ["lr", "global_batch_size"])
    assert (len(bowls), refused) == (9, [])
    for bowl in bowls:
        assert tuple(bowl.best.values()) == pytest.approx(best(bowl.n_params, bowl.tokens), rel=1e-8)
        assert bowl.loss == pytest.approx(2.5, rel=1e-10)
        assert bowl.width["lr"] == pytest.approx(np.sqrt(np.log1p(FLAT) / 0.01), rel=1e-8)
    rate = fit_power_surface(bowls, "lr")
    assert rate.scale == pytest.approx(1.79, rel=1e-8)
    assert rate.exponents == pytest.approx({"n_params": -0.713, "tokens": 0.307}, rel=1e-8)
    batch = fit_power_surface(bowls, "global_batch_size", ["tokens"])
    assert batch.exponents == pytest.approx({"tokens": 0.571}, rel=1e-8)
    assert batch.predict(tokens=1e12) == pytest.approx(best(1e9, 1e12)[1], rel=1e-7)


def test_noise_widens_the_interval_around_the_truth() -> None:
    bowls, _ = find_bowls(sweep(noise=0.003), ["lr", "global_batch_size"])
    rate = fit_power_surface(bowls, "lr")
    for name, truth in (("n_params", -0.713), ("tokens", 0.307)):
        assert rate.low[name] < truth < rate.high[name]
        assert rate.high[name] - rate.low[name] > 1e-3


def test_a_bottom_outside_the_sweep_a_saddle_and_too_few_cells_are_refused() -> None:
    cells = sweep(sizes=(1e8,))
    near = {name: values[cells["lr"] < 1e-3] for name, values in cells.items()}
    _, refused = find_bowls(near, ["lr", "global_batch_size"])
    assert len(refused) == 3
    assert all("lr lies outside" in reason for reason in refused)
    saddle = cells | {"val_loss": 1 / cells["val_loss"]}
    assert all("no bowl" in reason for reason in find_bowls(saddle, ["lr", "global_batch_size"])[1])
    few = {name: values[:5] for name, values in cells.items()}
    assert "do not fix a quadratic" in find_bowls(few, ["lr", "global_batch_size"])[1][0]


def test_powers_need_bowls_off_one_line() -> None:
    bowls, _ = find_bowls(sweep(), ["lr", "global_batch_size"])
    with pytest.raises(FitError, match="sweep lr at more sizes"):
        fit_power_surface(bowls[:3], "lr")
