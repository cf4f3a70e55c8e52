"""Laws of the best learning rate and batch: a quadratic bowl at each size and budget, and powers of N and D through the bottoms.

Sources: Li et al. 2025, arXiv 2503.04715 (the step law: ln lr* and ln batch* are linear in ln N and ln D; its batch depends on D
alone, which `inputs` can ask for).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from results.fit import FitError
from results.laws import FloatArray

FLAT = 1e-3  # the width of a basin is where the loss has risen by this share
MIN_CELLS = 3


@dataclass(frozen=True)
class Bowl:
    """The bottom of a quadratic surface of ln L over logs of settings, for one size and budget.

    `best`: each setting at the bottom; `width`: how far its logarithm may move until L has risen by 0.1%, the others staying.
    """

    n_params: float
    tokens: float
    best: dict[str, float]
    width: dict[str, float]
    loss: float


@dataclass(frozen=True)
class PowerSurface:
    """y = scale x N^a x D^b, with t intervals. Exponents by input; `low` and `high` likewise."""

    setting: str
    scale: float
    exponents: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    residual_sd: float

    def predict(self, **inputs: float) -> float:
        """Evaluate the setting."""
        return float(self.scale * np.prod([inputs[name] ** exponent for name, exponent in self.exponents.items()]))


def find_bowls(cells: Mapping[str, npt.ArrayLike], settings: Sequence[str]) -> tuple[list[Bowl], list[str]]:
    """Fit a bowl to the cells of each size and budget; return them, and why others have none.

    `cells` holds n_params, tokens, val_loss and the settings.
    """
    n, d, loss = (np.asarray(cells[name], dtype=float) for name in ("n_params", "tokens", "val_loss"))
    logs = np.log(np.column_stack([np.asarray(cells[name], dtype=float) for name in settings]))
    bowls, refused = [], []
    for size, budget in sorted(set(zip(n.tolist(), d.tolist(), strict=True))):
        rows = (n == size) & (d == budget)
        try:
            bowls.append(fit_bowl(size, budget, logs[rows], np.log(loss[rows]), settings))
        except FitError as error:
            refused.append(f"{size:.3g} parameters, {budget:.3g} tokens: {error}")
    return bowls, refused


def fit_bowl(n_params: float, tokens: float, logs: FloatArray, log_loss: FloatArray, settings: Sequence[str]) -> Bowl:
    """Fit ln L = c + g . x + x . H x / 2 and find its bottom.

    Raises:
        FitError: too few cells, no bowl (H not positive definite), or a bottom outside what was tried.
    """
    middle = logs.mean(axis=0)
    x, k = logs - middle, len(settings)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    columns = np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])
    if np.linalg.matrix_rank(columns) < columns.shape[1]:
        raise FitError(
            f"{len(x)} cell(s) do not fix a quadratic in {' and '.join(settings)}; "
            "try at least three values of each, and some of them together"
        )
    solved = np.linalg.lstsq(columns, log_loss, rcond=None)[0]
    slope, hessian = solved[1 : k + 1], np.zeros((k, k))
    for value, (i, j) in zip(solved[k + 1 :], pairs, strict=True):
        hessian[i, j] += value
        hessian[j, i] += value
    if np.linalg.eigvalsh(hessian).min() <= 0:
        raise FitError("the surface is no bowl: the loss does not rise on all sides; try values further out")
    bottom = -np.linalg.solve(hessian, slope)
    outside = [name for name, at, tried in zip(settings, bottom, x.T, strict=True) if not tried.min() <= at <= tried.max()]
    if outside:
        raise FitError(f"the best {' and '.join(outside)} lies outside the values that were tried; try values further out")
    best = np.exp(middle + bottom)
    width = np.sqrt(2 * np.log1p(FLAT) / np.diag(hessian))
    return Bowl(
        n_params,
        tokens,
        dict(zip(settings, best.tolist(), strict=True)),
        dict(zip(settings, width.tolist(), strict=True)),
        float(np.exp(solved[0] + slope @ bottom / 2)),
    )


def fit_power_surface(
    bowls: Sequence[Bowl], setting: str, inputs: Sequence[str] = ("n_params", "tokens"), level: float = 0.95
) -> PowerSurface:
    """Fit the bottoms' setting as a product of powers of the inputs, by least squares in logs.

    Raises:
        FitError: too few bowls, or inputs that move together.
    """
    columns = np.column_stack([np.ones(len(bowls)), *(np.log([getattr(bowl, name) for bowl in bowls]) for name in inputs)])
    if len(bowls) <= columns.shape[1] or np.linalg.matrix_rank(columns) < columns.shape[1]:
        raise FitError(
            f"{setting}: {len(bowls)} size(s) and budget(s) with a bowl do not fix powers of {' and '.join(inputs)} "
            f"(at least {columns.shape[1] + 1}, not all along one line); sweep {setting} at more sizes and budgets"
        )
    y = np.log([bowl.best[setting] for bowl in bowls])
    solved = np.linalg.lstsq(columns, y, rcond=None)[0]
    df = len(bowls) - columns.shape[1]
    variance = float(((y - columns @ solved) ** 2).sum()) / df
    reach = stdtrit(df, (1 + level) / 2) * np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    low, high = ((solved + sign * reach)[1:] for sign in (-1, 1))
    exponents, below, above = (dict(zip(inputs, values.tolist(), strict=True)) for values in (solved[1:], low, high))
    return PowerSurface(setting, float(np.exp(solved[0])), exponents, below, above, float(np.sqrt(variance)))
