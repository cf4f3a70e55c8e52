"""What a study refuses, weighs, and shows with its exclusions put back."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.external import load_external
from results.fit import FitError
from results.laws import KAPLAN_ND, Chinchilla
from results.study import Choices, Study, fit_study, weigh_by_noise

LAW = Chinchilla(1.8, 400, 2000, 0.34, 0.37)


def load(tmp_path: Path, **columns: object) -> pd.DataFrame:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4)))
    noise = np.exp(np.random.default_rng(0).normal(0, 0.002, n.size))
    table = pd.DataFrame({"n_params": n, "tokens": d, "val_loss": LAW.loss(n, d) * noise, **columns})
    table.to_csv(tmp_path / "points.csv", index=False)
    return load_external(tmp_path / "points.csv").cells


def test_mixed_tokenizers_are_refused_and_bits_per_byte_offered(tmp_path: Path) -> None:
    mixed = {"tokenizer": ["gpt2"] * 10 + ["char"] * 10}
    refused = fit_study("x", load(tmp_path, **mixed))
    assert refused.fitted is None
    assert "the fitted cells have 2 (char, gpt2)" in refused.refusal
    assert "val_bpb is missing in 20 of 20 cells" in refused.refusal
    cells = load(tmp_path, **mixed, val_bpb=np.linspace(1, 2, 20))
    assert "--loss val_bpb" in fit_study("x", cells).refusal
    bits = fit_study("x", cells.assign(val_bpb=cells["val_loss"] / 4), Choices(loss="val_bpb"))
    assert bits.fitted is not None
    assert bits.fitted.fit["E"] == pytest.approx(1.8 / 4, rel=0.1)


def test_the_fit_is_shown_with_the_excluded_cells_too(tmp_path: Path) -> None:
    cells = load(tmp_path)
    assert fit_study("x", cells).with_excluded is None
    cells.loc[[3, 7], "exclusion_reason"], cells.loc[[3, 7], "excluded"] = "skipped steps: 2", True
    cells.loc[[5], "exclusion_reason"], cells.loc[[5], "excluded"], cells.loc[[5], "role"] = "held out", True, "held_out"
    again = fit_study("x", cells).with_excluded
    assert again is not None
    assert again.n_cells == 19, "a held-out cell stays out"


def study_of_kaplan(tmp_path: Path) -> Study:
    return fit_study("x", load(tmp_path), Choices(law=KAPLAN_ND))


def test_a_law_without_a_best_split_has_intervals_too(tmp_path: Path) -> None:
    fitted = study_of_kaplan(tmp_path).fitted
    assert fitted is not None
    assert fitted.optimum is None
    assert list(fitted.intervals) == ["A", "B", "ratio", "alpha_D"]
    interval = fitted.intervals["alpha_D"]
    assert interval.low < interval.estimate < interval.high


def test_noise_that_falls_with_compute_gives_dear_cells_more_weight(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    cells = load(tmp_path)
    seeds = pd.concat([cells.assign(seed=seed) for seed in range(6)], ignore_index=True)
    sd = 0.02 * (seeds["flops_6nd"] / seeds["flops_6nd"].min()) ** -0.25
    seeds["val_loss"] = LAW.loss(seeds["n_params"], seeds["tokens"]) * np.exp(sd * draw.normal(size=len(seeds)))
    weights = weigh_by_noise(seeds)
    assert weights.mean() == pytest.approx(1)
    slope = np.polyfit(np.log(seeds["flops_6nd"].to_numpy(float)), np.log(weights), 1)[0]
    assert slope == pytest.approx(0.5, abs=0.12), "1 / sd^2"
    weighted = fit_study("x", seeds, Choices(by_noise=True)).fitted
    plain = fit_study("x", seeds).fitted
    assert weighted is not None
    assert plain is not None
    width = {name: f.intervals["beta"].high - f.intervals["beta"].low for name, f in (("w", weighted), ("p", plain))}
    assert width["w"] > 0
    with pytest.raises(FitError, match="seed noise was measured at 0 cell"):
        weigh_by_noise(cells)
