"""One table, the law fitted to it, its intervals and what must be said about them: what every page and figure is made of."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from results.fit import Fit, FitError, fit_chinchilla
from results.laws import Allocation
from results.uncertainty import (
    COVERAGE,
    LEVEL,
    METHOD,
    Interval,
    Resamples,
    SeedNoise,
    estimate_intervals,
    measure_seed_noise,
    resample_runs,
)

MAX_CONDITION = 1e3
EQUATION = "L(N, D) = E + A / N^alpha + B / D^beta"
LEGEND = (
    "L: val_loss, nats per token; N: parameters; D: training tokens; C: training FLOPs, here 6 N D; ln: natural logarithm"
)


@dataclass(frozen=True)
class Convention:
    """One way to count parameters."""

    name: str
    column: str
    words: str


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("total", "n_params", "all parameters"),
        Convention("non_embedding", "n_params_non_embedding", "parameters outside token and position embeddings"),
        Convention("matmul", "n_params_matmul", "parameters in matrix products, output head included"),
    )
}


@dataclass(frozen=True)
class Fitted:
    """A law with its intervals, under one way to count parameters. Units: flops as 6 N D."""

    fit: Fit
    resamples: Resamples
    intervals: dict[str, Interval]
    flops: float  # the largest compute of the fitted cells, at which an optimum is quoted
    optimum: Allocation


@dataclass(frozen=True)
class Study:
    """A table and all that is claimed from it. `fitted` is None where the cells support no law, and `refusal` says why."""

    name: str
    cells: pd.DataFrame
    convention: Convention
    fitted: Fitted | None
    refusal: str
    others: dict[str, Fitted | None]  # the same fit under the other ways to count parameters
    seed_noise: SeedNoise | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def kept(self) -> pd.DataFrame:
        """The cells that were fitted."""
        return self.cells[~self.cells["excluded"]]
