"""The specification curve: how the answer moves with choices that a paper makes once and does not vary.

The answer is a, how fast the best model grows with compute, N* proportional to C^a, and the tokens per parameter of the
best split; a choice is an estimator, what N counts, what C counts, and whether the smallest cells are dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from results.allocate import AllocationError, FlopsPerToken, allocate, interpolate_flops, six_n
from results.descend import LOG_HUBER, LOG_MSE, MSE
from results.fit import Fit, FitError, fit_law
from results.laws import CHINCHILLA, TIED, FloatArray

COLUMNS = {"total": "n_params", "non-embedding": "n_params_non_embedding", "matmul": "n_params_matmul"}
Columns = dict[str, FloatArray]
ESTIMATORS: dict[str, Callable[[Columns], Fit]] = {
    "log-Huber": lambda cells: fit_law(CHINCHILLA, cells, LOG_HUBER),
    "log-MSE": lambda cells: fit_law(CHINCHILLA, cells, LOG_MSE),
    "MSE": lambda cells: fit_law(CHINCHILLA, cells, MSE),
    "log-Huber, alpha = beta": lambda cells: fit_law(TIED, cells, LOG_HUBER),
}
DROPS = ("nothing", "smallest size", "smallest budget")
SPAN = 10.0  # the growth of N* is measured over this factor of compute


@dataclass(frozen=True)
class Specification:
    """One way to have done it, and what it says. `problem`: why it says nothing."""

    estimator: str
    params: str
    flops: str
    dropped: str
    n_cells: int
    exponent: float
    tokens_per_param: float
    problem: str = ""

    @property
    def choices(self) -> tuple[str, str, str, str]:
        """The four choices."""
        return self.estimator, self.params, self.flops, self.dropped


def iter_specifications(cells: pd.DataFrame) -> Iterator[Specification]:
    """Fit every combination for which the table has columns; the first is the one that `fit` reports."""
    params = {name: column for name, column in COLUMNS.items() if column in cells and cells[column].notna().all()}
    costs = ["6ND", "exact"] if "flops_per_token" in cells and cells["flops_per_token"].notna().all() else ["6ND"]
    for dropped, name, estimator in product(DROPS, params, ESTIMATORS):
        kept = drop_smallest(cells, dropped)
        columns = {key: kept[column].to_numpy(float) for key, column in read_as(params[name]).items()}
        try:
            fit = ESTIMATORS[estimator](columns)
        except FitError as error:
            yield from (Specification(estimator, name, cost, dropped, len(kept), np.nan, np.nan, str(error)) for cost in costs)
            continue
        for cost in costs:
            yield specify(fit, columns, kept, (estimator, name, cost, dropped))


def read_as(params_column: str) -> dict[str, str]:
    """Map a law's inputs to the table's columns."""
    return {"n_params": params_column, "tokens": "tokens", "val_loss": "val_loss"}


def drop_smallest(cells: pd.DataFrame, dropped: str) -> pd.DataFrame:
    """Return the cells without those of the smallest size, or of the smallest token budget."""
    if dropped == "nothing":
        return cells
    column = "n_params" if dropped == "smallest size" else "tokens"
    kept: pd.DataFrame = cells[cells[column] > cells[column].min() * 1.001]
    return kept


def specify(fit: Fit, columns: Columns, kept: pd.DataFrame, choices: tuple[str, str, str, str]) -> Specification:
    """Ask a fit for its best split at the largest compute, and for how the best size grows from there."""
    estimator, params, cost, dropped = choices
    flops_per_token: FlopsPerToken = six_n
    if cost == "exact":
        flops_per_token = interpolate_flops(columns["n_params"], kept["flops_per_token"].to_numpy(float))
    flops = float((flops_per_token(columns["n_params"]) * columns["tokens"]).max())
    loss = fit.constants.loss
    try:
        here, there = (allocate(loss, factor * flops, flops_per_token=flops_per_token) for factor in (1 / SPAN, 1.0))
    except AllocationError as error:
        return Specification(estimator, params, cost, dropped, len(kept), np.nan, np.nan, str(error))
    exponent = float(np.log(there.n_params / here.n_params) / np.log(SPAN))
    return Specification(estimator, params, cost, dropped, len(kept), exponent, there.tokens_per_param)
