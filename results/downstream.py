"""From loss to what a model can do: a second law, of losses and scores of the same cells, and both stages resampled together.

Sources: Gadre et al. 2024, arXiv 2403.08540, equation 5 (exponential); the sigmoid of loss is that of OLMo's model ladder: Bhagia
et al. 2024, arXiv 2412.04403, equation 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from results.fit import Fit, FitError, refit_many
from results.laws import FloatArray, params_of_theta

LEVEL = 0.95


@dataclass(frozen=True)
class Link:
    """A law from loss to score: linear in its last two parameters for given first ones (variable projection)."""

    name: str
    equation: str
    parameters: tuple[str, ...]
    shape: Callable[[FloatArray, FloatArray], FloatArray]  # nonlinear parameters (k,) and losses (n,) -> (n,)
    grid: Callable[[FloatArray], FloatArray]  # losses -> starts of the nonlinear parameters (g, k)

    def predict(self, params: FloatArray, loss: npt.ArrayLike) -> FloatArray:
        """Evaluate the score at losses."""
        *inner, scale, offset = params
        return np.asarray(offset + scale * self.shape(np.array(inner), np.asarray(loss, dtype=float)))


def measure_scale(loss: FloatArray) -> float:
    """Return the spread of the losses, the unit in which rates are tried."""
    return float(max(np.ptp(loss), 1e-6))


EXPONENTIAL = Link(
    "exponential",
    "score = offset + scale x exp(-gamma L)",
    ("gamma", "scale", "offset"),
    lambda inner, loss: np.exp(-inner[0] * loss),
    lambda loss: np.geomspace(0.02, 20, 40)[:, None] / measure_scale(loss),
)
SIGMOID = Link(
    "sigmoid",
    "score = offset + scale / (1 + exp(k (L - L_0)))",
    ("k", "L_0", "scale", "offset"),
    lambda inner, loss: 1 / (1 + np.exp(np.clip(inner[0] * (loss - inner[1]), -500, 500))),
    lambda loss: np.array(
        [
            (k / measure_scale(loss), at)
            for k in np.geomspace(0.5, 50, 10)
            for at in np.linspace(loss.min() - measure_scale(loss), loss.max() + measure_scale(loss), 12)
        ]
    ),
)
LINKS = {link.name: link for link in (EXPONENTIAL, SIGMOID)}


@dataclass(frozen=True)
class LinkFit:
    """A fitted link. `sum_squares`: of score - fitted."""

    link: Link
    params: FloatArray
    sum_squares: float

    def predict(self, loss: npt.ArrayLike) -> FloatArray:
        """Evaluate the score at losses."""
        return self.link.predict(self.params, loss)


def fit_link(link: Link, loss: npt.ArrayLike, score: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> LinkFit:
    """Fit a link by weighted least squares, from the best of a grid.

    Raises:
        FitError: too few cells, or a loss or score that is no number.
    """
    x, y = np.asarray(loss, dtype=float), np.asarray(score, dtype=float)
    root = np.ones_like(x) if weights is None else np.sqrt(np.asarray(weights, dtype=float))
    used = root > 0
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise FitError("score: some loss or score is not a number; leave out such cells")
    if np.unique(x[used]).size <= len(link.parameters) - (link is EXPONENTIAL):
        raise FitError(
            f"score: {np.unique(x[used]).size} different loss(es) are too few for the {len(link.parameters)} parameters of the "
            f"{link.name} link; evaluate more cells"
        )

    def project(inner: FloatArray) -> tuple[FloatArray, FloatArray]:
        columns = np.column_stack([link.shape(inner, x), np.ones_like(x)]) * root[:, None]
        solved = np.linalg.lstsq(columns, y * root, rcond=None)[0]
        return solved, columns @ solved - y * root

    starts = link.grid(x)
    costs = [float((project(start)[1] ** 2).sum()) for start in starts]
    best = starts[int(np.argmin(costs))]

    def miss(inner: FloatArray) -> FloatArray:
        return project(inner)[1]

    found = least_squares(miss, best, x_scale=np.maximum(np.abs(best), 1e-3), xtol=1e-14, ftol=1e-14, gtol=1e-14)
    return LinkFit(link, np.concatenate([found.x, project(found.x)[0]]), 2 * float(found.cost))


@dataclass(frozen=True)
class Prediction:
    """A predicted score with the percentile interval of both stages resampled together."""

    score: float
    low: float
    high: float
    n_resamples: int


def predict_score(
    fit: Fit,
    link: Link,
    loss: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    n_resamples: int = 200,
    seed: int = 0,
    clusters: npt.ArrayLike | None = None,
    **inputs: float,
) -> Prediction:
    """Predict the score at `inputs` (n_params, tokens): law to loss, link to score. `loss`, `score`: of the cells of the fit.

    Each resample draws cells (or whole clusters) anew and refits both stages to the same draw, so their errors go together.
    A resample that cannot fix the link is drawn again.
    """
    x, y = np.asarray(loss, dtype=float), np.asarray(score, dtype=float)
    draw = np.random.default_rng(seed)
    _, cluster_of = np.unique(np.arange(len(x)) if clusters is None else np.asarray(clusters), return_inverse=True)
    n_clusters = int(cluster_of.max()) + 1
    central = fit_link(link, x, y).predict(fit.law.predict(fit.params, **inputs))
    scores: list[float] = []
    for _ in range(3):
        counts = draw.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples)[:, cluster_of].astype(float)
        params = params_of_theta(refit_many(fit, weights=counts).theta, fit.centred)
        for row, count in zip(params, counts, strict=True):
            try:
                scores.append(float(fit_link(link, x, y, count).predict(fit.law.predict(row, **inputs))))
            except FitError:
                continue
        if len(scores) >= n_resamples:
            break
    low, high = np.percentile(scores[:n_resamples], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Prediction(float(central), float(low), float(high), len(scores[:n_resamples]))
