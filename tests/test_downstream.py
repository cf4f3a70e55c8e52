"""From loss to scores: Gadre's published errors, exact recovery, and both stages resampled together."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.descend import MSE
from results.downstream import EXPONENTIAL, LINKS, SIGMOID, fit_link, predict_score
from results.fit import FitError, fit_law
from results.laws import CHINCHILLA, TIED

TASKS = (
    "bigbench_operators pubmed_qa_labeled hellaswag_zeroshot boolq arc_easy coqa bigbench_dyck_languages lambada_openai "
    "bigbench_novel_concepts winograd bigbench_cs_algorithms commonsense_qa bigbench_qa_wikidata hellaswag copa squad piqa"
)


def test_published_extrapolations_of_loss_and_error(fixtures: Path) -> None:
    """Gadre et al. 2024, RedPajama: fitted to five small models, scored on 1.4B at M = 640 and 6.9B at M = 20."""
    runs = pd.read_csv(fixtures / "gadre_overtraining" / "gadre_runs.csv").query("dataset == 'rpj'")
    runs = runs.assign(error=runs[[f"err_{task}" for task in TASKS.split()]].mean(axis=1))
    n, m = runs["params"], runs["chinchilla_multiplier"]
    small = ((n < 5e8) & (m == 1)) | ((n < 2e7) & (m == 16))
    columns = {"n_params": "params", "tokens": "tokens", "val_loss": "loss_c4_val"}
    fit = fit_law(TIED, {name: runs.loc[small, column] for name, column in columns.items()}, MSE)
    assert fit.n_cells == 5
    np.testing.assert_allclose(fit.params[[0, 1, 3]], [1.8366, 166.21, 0.2729], rtol=5e-4)
    large = pd.concat([runs[(n > 1e9) & (n < 2e9) & (m == 32)], runs[n > 6e9]])
    losses = fit.law.predict(fit.params, n_params=large["params"], tokens=large["tokens"])
    np.testing.assert_allclose(100 * abs(losses / large["loss_c4_val"] - 1), [0.7103, 0.7320], atol=6e-5)
    seen = runs[small | ((n > 1e9) & (n < 2e9) & (m == 1))]
    link = fit_link(EXPONENTIAL, seen["loss_c4_val"], seen["error"])
    np.testing.assert_allclose(link.params, [0.7146, -2.2065, 0.8570], atol=1e-4)
    np.testing.assert_allclose(100 * abs(link.predict(losses) / large["error"] - 1), [3.6365, 0.0464], atol=6e-5)


@pytest.mark.parametrize(("name", "truth"), [("exponential", [0.7, -2.2, 0.85]), ("sigmoid", [2.5, 2.9, 0.7, 0.25])])
def test_a_known_link_is_recovered_exactly(name: str, truth: list[float]) -> None:
    loss = np.linspace(2, 4.5, 12)
    score = LINKS[name].predict(np.array(truth), loss)
    fit = fit_link(LINKS[name], loss, score)
    np.testing.assert_allclose(fit.predict(loss), score, atol=1e-8)
    np.testing.assert_allclose(fit.params, truth, rtol=1e-6)


def test_too_few_losses_and_no_numbers_are_refused() -> None:
    with pytest.raises(FitError, match="evaluate more cells"):
        fit_link(SIGMOID, [2, 3, 2, 3], [0.1, 0.2, 0.1, 0.2])
    with pytest.raises(FitError, match="not a number"):
        fit_link(EXPONENTIAL, [2, 3, 4, np.nan], [0.1, 0.2, 0.3, 0.4])


def test_two_stages_hold_the_truth_and_widen_with_noise() -> None:
    draw = np.random.default_rng(0)
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 5)))
    truth, clean = [1.8, 400, 2000, 0.34, 0.37], np.array([2.0, 3.0, 0.7, 0.2])
    widths = []
    for sigma in (0.001, 0.01):
        loss = CHINCHILLA.predict(truth, n_params=n, tokens=d) * np.exp(draw.normal(0, sigma, n.size))
        score = SIGMOID.predict(clean, loss) + draw.normal(0, sigma, n.size)
        fit = fit_law(CHINCHILLA, {"n_params": n, "tokens": d, "val_loss": loss})
        found = predict_score(fit, SIGMOID, loss, score, n_resamples=60, n_params=7e9, tokens=1.4e11)
        real = SIGMOID.predict(clean, CHINCHILLA.predict(truth, n_params=7e9, tokens=1.4e11))
        assert found.low <= float(real) <= found.high
        widths.append(found.high - found.low)
    assert widths[0] < widths[1]
    again = predict_score(fit, SIGMOID, loss, score, n_resamples=60, n_params=7e9, tokens=1.4e11)
    assert again == found
