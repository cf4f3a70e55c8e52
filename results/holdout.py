"""Ordered hold-out: fit the cheaper cells, predict the dearer ones, and compare with what needs no law of two variables."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from results.fit import FitError, fit_law
from results.laws import CHINCHILLA, KAPLAN_N_FLOOR, FloatArray, Law

FITTED_SHARE = 0.85
ORIGINS = (0.6, 0.7, 0.8, 0.9)  # where else the cut is laid


@dataclass(frozen=True)
class HoldOut:
    """How well the cells below a compute predict those from it on. Units: errors in percent of the loss; flops as 6 N D.

    best_seen, power_law: the mean error of two baselines, the lowest loss so far and L = E + A / C^alpha through the lowest
    losses so far; None where the cells support no such curve.
    """

    cut_flops: float
    n_fitted: int
    n_scored: int
    mape: float
    bias: float
    rmse: float
    reach: float  # largest scored compute over largest fitted
    best_seen: float
    power_law: float | None

    @property
    def skill(self) -> float:
        """1 - error / error of the better baseline: 1 is perfect, 0 no better than it, below 0 worse."""
        return 1 - self.mape / min(self.best_seen, np.inf if self.power_law is None else self.power_law)


def score_hold_out(cells: Mapping[str, FloatArray], cut_flops: float, law: Law = CHINCHILLA) -> HoldOut:
    """Fit the cells below a compute and score the others.

    Raises:
        FitError: too few cells on one side of the cut.
    """
    flops, loss = 6 * cells["n_params"] * cells["tokens"], cells["val_loss"]
    below = flops < cut_flops
    if below.all() or not below.any():
        raise FitError(f"hold-out: cut={cut_flops:.3g} FLOPs, leaves no cell on one side; choose one inside the cells' range")
    fit = fit_law(law, {name: values[below] for name, values in cells.items()})
    scored = {name: values[~below] for name, values in cells.items()}
    errors = 100 * (law.predict(fit.params, **{name: scored[name] for name in law.inputs}) / scored["val_loss"] - 1)
    return HoldOut(
        cut_flops=cut_flops,
        n_fitted=int(below.sum()),
        n_scored=int((~below).sum()),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        rmse=float(np.sqrt((errors**2).mean())),
        reach=float(flops.max() / flops[below].max()),
        best_seen=float(100 * np.abs(loss[below].min() / scored["val_loss"] - 1).mean()),
        power_law=score_frontier(flops[below], loss[below], flops[~below], scored["val_loss"]),
    )


def score_frontier(flops: FloatArray, loss: FloatArray, later_flops: FloatArray, later_loss: FloatArray) -> float | None:
    """Return the mean error of a power law in compute alone, fitted to the cells that were the best so far."""
    predicted = extrapolate_frontier(flops, loss, later_flops)
    return None if predicted is None else float(100 * np.abs(predicted / later_loss - 1).mean())


def extrapolate_frontier(flops: FloatArray, loss: FloatArray, later_flops: FloatArray) -> FloatArray | None:
    """Return what L = E + A / C^alpha through the lowest losses so far says of later computes; None where it cannot be fitted."""
    order = np.argsort(flops, kind="stable")
    is_best = loss[order] <= np.minimum.accumulate(loss[order])
    front = order[is_best]
    try:
        fit = fit_law(KAPLAN_N_FLOOR, {"n_params": flops[front], "val_loss": loss[front]})
    except FitError:
        return None
    return KAPLAN_N_FLOOR.predict(fit.params, n_params=later_flops)


def score_origins(cells: Mapping[str, FloatArray], law: Law = CHINCHILLA) -> list[HoldOut]:
    """Score the default cut first, then earlier and later ones; a cut that leaves too little to fit is left out."""
    flops = np.sort(6 * cells["n_params"] * cells["tokens"])
    found = []
    for share in (FITTED_SHARE, *ORIGINS):
        cut = float(flops[min(int(np.ceil(share * flops.size)), flops.size - 1)])
        try:
            found.append(score_hold_out(cells, cut, law))
        except FitError:
            continue
    return found
