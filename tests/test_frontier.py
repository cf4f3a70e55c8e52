"""Estimators of the best size without a surface: their known biases, published exponents, and what they refuse."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.fit import FitError
from results.frontier import METHODS, fit_akima, fit_cubic, fit_envelope, fit_isoflop, fit_parabola, fit_power_law, split_budgets
from results.laws import Chinchilla

SYMMETRIC = Chinchilla(1.69, 406.4, 410.7, 0.31, 0.31)
HOFFMANN = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
ASYMMETRIC = Chinchilla(1.69, 406.4, 410.7, 0.465, 0.155)
BUDGETS = (1e17, 1e18, 1e19, 1e20, 1e21)


def cut_slice(law: Chinchilla, flops: float, reach: float, n_sizes: int = 15, shift: float = 1.0) -> dict[str, np.ndarray]:
    """A slice around the best size, sizes evenly in logs from 1/reach to reach times it."""
    n = law.allocate(flops).n_params * shift * np.geomspace(1 / reach, reach, n_sizes)
    d = flops / 6 / n
    return {"n_params": n, "tokens": d, "flops": 6 * n * d, "val_loss": law.loss(n, d)}


def cut_slices(law: Chinchilla, reach: float, **options: float) -> dict[str, np.ndarray]:
    slices = [cut_slice(law, flops, reach, **options) for flops in BUDGETS]
    return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}


@pytest.mark.parametrize(
    ("law", "reach", "parabola", "cubic"),
    [
        (HOFFMANN, 2, 1.00328, 0.99999),
        (HOFFMANN, 4, 1.01318, 0.99990),
        (HOFFMANN, 8, 1.02990, 0.99948),
        (HOFFMANN, 16, 1.05374, 0.99836),
        (ASYMMETRIC, 16, 1.30067, 0.98984),
        (SYMMETRIC, 16, 1.0, 1.0),
    ],
)
def test_bias_of_polynomials_is_the_known_one(law: Chinchilla, reach: float, parabola: float, cubic: float) -> None:
    one = cut_slice(law, 1e20, reach)
    x, y, truth = np.log(one["n_params"]), np.log(one["val_loss"]), np.log(law.allocate(1e20).n_params)
    assert np.exp(fit_parabola(x, y)[0] - truth) == pytest.approx(parabola, abs=6e-6)
    assert np.exp(fit_cubic(x, y)[0] - truth) == pytest.approx(cubic, abs=6e-6)
    at, lowest = fit_akima(x, y)
    assert np.exp(at - truth) == pytest.approx(1, abs=0.02)
    assert np.exp(lowest) == pytest.approx(law.allocate(1e20).loss, rel=1e-3)


@pytest.mark.parametrize(
    ("law", "found", "true"), [(HOFFMANN, -0.578092, -0.555357), (ASYMMETRIC, -1.459957, -1.345791)], ids=["0.34", "0.465"]
)
def test_the_parabola_spares_the_slope_and_moves_the_intercept(law: Chinchilla, found: float, true: float) -> None:
    """arXiv 2603.22339: slices of 15 sizes within a factor of 16."""
    frontier = fit_isoflop(cut_slices(law, 16), "parabola")
    assert frontier.tokens.intercept / np.log(10) == pytest.approx(found, abs=1e-6)
    truth = fit_power_law(BUDGETS, [law.allocate(flops).tokens for flops in BUDGETS])
    assert truth.intercept / np.log(10) == pytest.approx(true, abs=1e-6)
    assert frontier.tokens.exponent == pytest.approx(truth.exponent, abs=1e-13)
    assert frontier.n_params.exponent == pytest.approx(law.optimum_exponent, abs=1e-13)


def read_porian(fixtures: Path, row: "pd.Series[str]", name: str) -> pd.DataFrame:
    table = pd.read_csv(fixtures / "porian" / name)
    keys = ["source", "dataset", "hparams", "warmup", "decay", "param_count", "val"]
    return table[(table[keys] == row[keys]).all(axis=1)]


def test_published_exponents_of_porian(fixtures: Path) -> None:
    """Porian et al. 2024: the weighted line through their optima exactly, and Akima's valleys of their points within 0.003."""
    published = pd.read_csv(fixtures / "porian" / "porian_published_exponents.csv")
    main = published[(published["dataset"] == "rw") & published["source"].eq("summary_df")]
    assert main["a"].round(3).tolist() == [0.835, 0.706, 0.602, 0.571, 0.497]
    for _, row in main.iterrows():
        pairs = read_porian(fixtures, row, "porian_optimal_pairs.csv").dropna(subset="n_star_std")
        line = fit_power_law(pairs["flops"], pairs["n_star"], pairs["n_star_std"] ** -2)
        assert line.exponent == pytest.approx(row["a"], abs=5e-5)
        points = read_porian(fixtures, row, "porian_isoflop_points.csv")
        cells = {"n_params": points["N"], "tokens": points["D"], "flops": points["flops"], "val_loss": points["loss"]}
        optima = fit_isoflop(cells, "akima").optima
        weights = {o.flops: float(pairs["n_star_std"].iloc[np.argmin(abs(pairs["flops"] - o.flops))]) ** -2 for o in optima}
        assert fit_isoflop(cells, "akima", weights).n_params.exponent == pytest.approx(row["a"], abs=0.003)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_minimum_at_the_edge_and_a_hill_are_refused(method: str) -> None:
    for shift, wanted in ((50.0, "smaller"), (0.02, "larger")):
        one = cut_slice(HOFFMANN, 1e20, 4, shift=shift)
        with pytest.raises(FitError, match=f"edge.*add {wanted} sizes|opens downwards"):
            METHODS[method](np.log(one["n_params"]), np.log(one["val_loss"]))
    x = np.linspace(-2, 2, 9)
    with pytest.raises(FitError, match=r"opens downwards|edge"):
        METHODS[method](x, np.log(3 - 0.1 * x**2))
    with pytest.raises(FitError, match="add 1 more"):
        METHODS[method](
            x[: {"parabola": 3, "cubic": 4, "akima": 3}[method]], np.ones({"parabola": 3, "cubic": 4, "akima": 3}[method])
        )


def test_a_budget_without_a_valley_is_listed_and_the_others_count() -> None:
    cells = cut_slices(HOFFMANN, 8)
    lone = cut_slice(HOFFMANN, 1e22, 4, shift=50)
    cells = {name: np.concatenate([cells[name], lone[name]]) for name in cells}
    frontier = fit_isoflop(cells, "parabola")
    assert len(frontier.optima) == 5
    assert [reason.split(":")[0] for reason in frontier.refused] == ["1e+22 FLOPs"]
    with pytest.raises(FitError, match="at least 3"):
        fit_isoflop({name: values[:30] for name, values in cells.items()}, "parabola")


def test_a_continuum_of_computes_has_no_slices() -> None:
    with pytest.raises(FitError, match="too close together"):
        split_budgets(np.geomspace(1e18, 1e20, 200))
    assert [len(rows) for rows in split_budgets(np.array([1e18, 1.01e18, 2e18]))] == [2, 1]


def test_the_envelope_finds_the_exponent_of_a_dense_grid() -> None:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e10, 40), np.geomspace(1e7, 1e13, 60)))
    frontier = fit_envelope({"n_params": n, "tokens": d, "flops": 6 * n * d, "val_loss": HOFFMANN.loss(n, d)})
    assert frontier.n_params.exponent == pytest.approx(HOFFMANN.optimum_exponent, abs=0.02)
    assert frontier.tokens.exponent == pytest.approx(1 - HOFFMANN.optimum_exponent, abs=0.02)
    assert frontier.refused, "where the best is the smallest or largest size, it is no optimum"


def test_the_envelope_refuses_two_sizes() -> None:
    n, d = (a.ravel() for a in np.meshgrid([1e7, 1e8], np.geomspace(1e8, 1e10, 5)))
    with pytest.raises(FitError, match="0 compute"):
        fit_envelope({"n_params": n, "tokens": d, "flops": 6 * n * d, "val_loss": HOFFMANN.loss(n, d)})


def test_weights_choose_which_points_count() -> None:
    x, y = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([1.0, 10.0, 100.0, 5.0])
    assert fit_power_law(x, y, [1, 1, 1, 1e-12]).exponent == pytest.approx(1, abs=1e-6)
    line = fit_power_law(x, x**0.5)
    assert (line.low, line.exponent, line.high) == pytest.approx((0.5, 0.5, 0.5))
    assert float(line.predict(1e4)) == pytest.approx(100)


def test_an_optimum_that_never_changes_its_size_is_no_frontier() -> None:
    n, d = (a.ravel() for a in np.meshgrid([1e7, 1e8, 1e9], np.geomspace(1e8, 1e11, 9)))
    loss = HOFFMANN.loss(n, d) + 5.0 * (n != 1e8)
    with pytest.raises(FitError, match="different sizes are ever the best"):
        fit_envelope({"n_params": n, "tokens": d, "flops": 6 * n * d, "val_loss": loss})
