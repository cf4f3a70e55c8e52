"""The diagnosis: each finding is planted and found, and its absence is not invented."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from results.diagnose import (
    SLOPPY_CHANGE,
    check_lack_of_fit,
    check_structure,
    correlate_parameters,
    diagnose,
    find_sloppy,
    iter_gate,
    iter_influences,
    render_diagnosis,
)
from results.fit import fit_chinchilla
from results.laws import Chinchilla, jacobian, predict_log_loss
from results.plot import write_pictures
from results.plot_diagnosis import draw_diagnosis
from results.study import CONVENTIONS, Choices, Fitted, try_fit

LAW = Chinchilla(E=1.1, A=22.0, B=310.0, alpha=0.35, beta=0.42)


def make_cells(sizes=6, budgets=5, seeds=1, sigma=0.002, bend=0.0, law=LAW, d_range=(4e5, 4e7), seed=0) -> pd.DataFrame:
    """Cells of a law, with luck, and a bend of ln L by (ln D)^2 if asked for; each cell its own run."""
    n, d, copy = (
        axis.ravel()
        for axis in np.meshgrid(np.geomspace(1e4, 1e6, sizes), np.geomspace(*d_range, budgets), np.arange(seeds), indexing="ij")
    )
    y = np.log(d) - np.log(d).mean()
    luck = sigma * np.random.default_rng(seed).normal(size=n.size)
    loss = law.loss(n, d) * np.exp(luck + bend * (y**2 - (y**2).mean()))
    run_ids = [f"run-{i:03}" for i in range(n.size)]
    return pd.DataFrame({"n_params": n, "tokens": d, "val_loss": loss, "seed": copy, "run_id": run_ids})


def fit_cells(cells: pd.DataFrame) -> Fitted:
    fitted, refusal = try_fit(cells, CONVENTIONS["total"], Choices())
    assert fitted is not None, refusal
    return fitted


def find_gate(cells: pd.DataFrame) -> str:
    fitted = fit_cells(cells)
    return " | ".join(iter_gate(fitted, correlate_parameters(jacobian(fitted.fit.theta, fitted.fit.centred))))


def test_a_wide_clean_grid_passes_the_gate() -> None:
    assert find_gate(make_cells()) == ""


def test_the_gate_names_what_is_missing() -> None:
    trunks = make_cells().assign(run_id=lambda cells: cells["n_params"].astype(str))
    assert "6 trunks for 5 parameters" in find_gate(trunks)
    narrow = make_cells(d_range=(4e5, 8e5))
    narrow["tokens"] = narrow["n_params"] * 20 * narrow["tokens"] / 4e5
    narrow["val_loss"] = LAW.loss(narrow["n_params"], narrow["tokens"])
    assert "within a factor of 1.99" in find_gate(narrow)
    assert "fewer than 2 each" in find_gate(make_cells(sizes=3, budgets=3))
    floorless = make_cells(law=Chinchilla(1e-4, 22.0, 310.0, 0.15, 0.2), sigma=0.02)
    assert "E" in find_gate(floorless)


def test_the_sloppy_direction_is_the_one_that_changes_losses_least() -> None:
    fit = fit_cells(make_cells()).fit
    slopes = jacobian(fit.theta, fit.centred)
    move = find_sloppy(slopes)
    assert np.sqrt(np.mean((slopes @ move) ** 2)) == pytest.approx(SLOPPY_CHANGE)
    moved = predict_log_loss(fit.theta + 0.1 * move, fit.centred) - predict_log_loss(fit.theta, fit.centred)
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(0.1 * SLOPPY_CHANGE, rel=0.05)
    size = np.linalg.norm(slopes, axis=0)
    draw = np.random.default_rng(0)
    for _ in range(100):
        other = draw.normal(size=5) / size
        other *= np.linalg.norm(move * size) / np.linalg.norm(other * size)
        assert np.sqrt(np.mean((slopes @ other) ** 2)) >= 0.999 * SLOPPY_CHANGE


def test_correlations_are_those_of_repeated_fits() -> None:
    fits = [fit_cells(make_cells(sigma=2e-4, seed=seed)).fit for seed in range(2)]
    theory = correlate_parameters(jacobian(fits[0].theta, fits[0].centred))
    cells = make_cells(sigma=0.0)
    draw = np.random.default_rng(0)
    found = []
    for _ in range(60):
        loss = cells["val_loss"] * np.exp(2e-4 * draw.normal(size=len(cells)))
        found.append(fit_chinchilla(cells["n_params"], cells["tokens"], loss).theta)
    assert np.abs(np.corrcoef(np.array(found).T) - theory).max() < 0.25
    assert theory[0, 0] == pytest.approx(1)


def test_leaving_out_a_size_is_a_fit_without_it() -> None:
    cells = make_cells()
    fit = fit_cells(cells).fit
    influences = list(iter_influences(fit))
    assert len(influences) == 6
    one = influences[2]
    rest = cells[~np.isclose(cells["n_params"], one.n_params)]
    again = fit_chinchilla(rest["n_params"], rest["tokens"], rest["val_loss"])
    assert len(rest) == len(cells) - one.n_cells
    assert one.alpha == pytest.approx(again["alpha"] - fit["alpha"], abs=1e-4)
    assert one.exponent == pytest.approx(again.constants.optimum_exponent - fit.constants.optimum_exponent, abs=1e-4)
    assert list(iter_influences(fit_cells(make_cells(sizes=3)).fit)) == []


def test_a_bend_is_found_and_luck_is_not() -> None:
    bent, straight = (check_structure(fit_cells(make_cells(bend=bend)).fit) for bend in (0.004, 0.0))
    assert bent is not None
    assert straight is not None
    assert bent.p < 1e-3
    assert straight.p > 0.05


def test_lack_of_fit_is_found_where_seeds_repeat_and_unknown_where_they_do_not() -> None:
    bent, straight = make_cells(seeds=2, bend=0.004, seed=1), make_cells(seeds=2, seed=1)
    found, absent = (check_lack_of_fit(fit_cells(cells).fit, cells) for cells in (bent, straight))
    assert found is not None
    assert absent is not None
    assert found.df == (25, 30)
    assert found.p < 1e-3 < 0.05 < absent.p
    assert check_lack_of_fit(fit_cells(make_cells()).fit, make_cells()) is None


def test_lack_of_fit_is_called_as_often_as_luck_allows() -> None:
    """At 5%, of 60 straight laws few are called bent: the test must hold its own level, or nothing above means anything."""
    cells = [make_cells(sizes=4, budgets=4, seeds=2, seed=seed) for seed in range(60)]
    tests = [check_lack_of_fit(fit_chinchilla(*(one[c] for c in ("n_params", "tokens", "val_loss"))), one) for one in cells]
    assert sum(test is not None and test.p < 0.05 for test in tests) <= 7


def test_the_page_and_the_figures_of_the_published_demo(tmp_path) -> None:
    table = pd.read_csv(ROOT / "results" / "published" / "demo" / "table.csv")
    kept = table[~table["excluded"]].reset_index(drop=True)
    diagnosis = diagnose(kept, fit_cells(kept), CONVENTIONS["total"])
    page = render_diagnosis("demo", diagnosis)
    for words in ("7 trunks for 5 parameters", "cells say least about", "skill +", "lack of fit", "over 72 specifications"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120
    pictures = draw_diagnosis(diagnosis)
    assert [picture.name for picture in pictures] == ["profiles", "specification_curve", "influence"]
    assert all(path.stat().st_size > 5_000 for path in write_pictures(pictures, tmp_path))
    assert f"{diagnosis.specifications[0].exponent:.3f}" == f"{diagnosis.fitted.intervals['optimum_exponent'].estimate:.3f}"
    unfitted = replace(diagnosis, specifications=(), influences=())
    assert "no other specification" in render_diagnosis("demo", unfitted)
    assert [picture.name for picture in draw_diagnosis(unfitted)] == ["profiles"]
