"""Which cells answer a question best for the compute: before a study, and between its rounds.

Two answers, for two kinds of trust. If the law is exact, the information of a cell is known before it is trained, and the
best design for a few numbers comes with a certificate that no other does better. If the law only nearly holds, that design
puts its cells where it cannot see the law fail; `pick_cells` therefore takes the truth to be the law plus a smooth
discrepancy, and spreads.

The noise is that of ln L and the same in each cell; parameters are the law's centred logs (laws.py).

Sources: Kiefer & Wolfowitz 1960 (the equivalence theorem); Fedorov 1972, chapter 2 (costs); Silvey, Titterington & Torsney
1978 and Yu 2010, arXiv 0911.0108 (the multiplicative update); Sacks et al. 1989 (a Gaussian process as discrepancy).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from harness.config import ConfigError
from results.laws import CHINCHILLA, Centred, Chinchilla, FloatArray, centre, jacobian, theta_of_params
from results.uncertainty import Quantity, differentiate

SIGMA = 0.004  # noise of ln L between cells that differ in luck alone
MAX_ITERATIONS, CERTIFIED = 20_000, 1.001
MAX_CONDITION = 1e6  # of the scaled slopes; one ratio D/N has 1e7 and more, ratios within a factor of four some hundreds
# The discrepancy: 3% of the loss, alike within a factor of e^2 in parameters or tokens; a default found on three published
# pools, not a proof. PRIOR_SD: how little is known of e, a, b, alpha and beta before anything is trained.
TAU, LENGTH, COST_POWER = 0.03, 2.0, 0.3
PRIOR_SD = (0.5, 1.0, 1.0, 0.2, 0.2)


class DesignError(ConfigError):
    """Candidates from which no design can be made."""


@dataclass(frozen=True)
class Candidates:
    """Cells that could be trained. Shapes: all (n,). Units: flops: what one of them costs."""

    n_params: FloatArray
    tokens: FloatArray
    flops: FloatArray

    def __len__(self) -> int:
        return len(self.flops)


def list_candidates(n_params: npt.ArrayLike, tokens: npt.ArrayLike, flops: npt.ArrayLike | None = None) -> Candidates:
    """Pair parameters and tokens; a cell costs 6 N D unless `flops` says otherwise.

    Raises:
        DesignError: a number that is not above zero, or lengths that differ.
    """
    n, d = np.asarray(n_params, dtype=float), np.asarray(tokens, dtype=float)
    cost = 6 * n * d if flops is None and n.shape == d.shape else np.asarray(flops, dtype=float)
    if not n.shape == d.shape == cost.shape:
        raise DesignError(f"candidates: {n.shape} parameters, {d.shape} tokens, {cost.shape} FLOPs; give one of each for a cell")
    for name, values in (("n_params", n), ("tokens", d), ("flops", cost)):
        if not (values.size and np.all(np.isfinite(values) & (values > 0))):
            raise DesignError(f"candidates: {name}, holds a number that is not above 0, or nothing at all; leave such cells out")
    return Candidates(n, d, cost)


@dataclass(frozen=True)
class Question:
    """What a law says a cell teaches. Shapes: slopes (n, 5) of ln L at each candidate; targets (k, 5), of each quantity asked."""

    slopes: FloatArray
    targets: FloatArray


def ask(law: Chinchilla, candidates: Candidates, quantities: Sequence[Quantity]) -> Question:
    """Differentiate the law at each candidate, and each quantity, by the law's parameters."""
    centred = place(law, candidates.n_params, candidates.tokens)
    theta = theta_of_params(astuple(law), centred)
    targets = [differentiate(theta, centred, quantity) for quantity in quantities]
    return Question(jacobian(theta, centred), np.array(targets, dtype=float).reshape(len(quantities), theta.size))


def place(law: Chinchilla, n_params: FloatArray, tokens: FloatArray) -> Centred:
    """Return cells as a fit would see them."""
    return centre(CHINCHILLA, {"n_params": n_params, "tokens": tokens}, law.loss(n_params, tokens))


def measure_information(slopes: FloatArray, counts: FloatArray, sigma: float = SIGMA) -> FloatArray:
    """Return the Fisher information of `counts` cells at each candidate; counts may be fractions. Shapes: (5, 5)."""
    return np.asarray((slopes.T * counts) @ slopes / sigma**2)


def forecast_sd(question: Question, counts: npt.ArrayLike, sigma: float = SIGMA) -> FloatArray:
    """Return the standard deviation that a design leaves in each target; infinite where it says nothing. Shapes: (k,)."""
    information = measure_information(question.slopes, np.asarray(counts, dtype=float), sigma)
    size = np.sqrt(np.maximum(np.diag(information), 1e-300))
    scaled = information / np.outer(size, size)
    if not np.linalg.cond(scaled) < MAX_CONDITION**2:
        return np.full(len(question.targets), np.inf)
    wanted = question.targets / size
    return np.asarray(np.sqrt(np.einsum("ki,ik->k", wanted, np.linalg.solve(scaled, wanted.T))))


@dataclass(frozen=True)
class Design:
    """How often to train each candidate. Shapes: counts (n,), fractions allowed; sd (k,).

    certificate: the most that any other design could lower the summed variance of the targets, as a factor; 1 is the optimum.
    """

    counts: FloatArray
    sd: FloatArray
    certificate: float

    @property
    def support(self) -> npt.NDArray[np.intp]:
        """The candidates that a thousandth or more of the largest count goes to."""
        return np.flatnonzero(self.counts >= 1e-3 * self.counts.max())


def optimise_design(question: Question, candidates: Candidates, budget: float, sigma: float = SIGMA) -> Design:
    """Spend a budget so that the summed variance of the targets is least: c-optimal for one target, A-optimal for several.

    Shares of the budget are multiplied by the root of what a FLOP spent there brings, until none brings more than the rest.

    Raises:
        DesignError: no design of these candidates identifies the targets.
    """
    per_flop = question.slopes * np.sqrt(budget / candidates.flops)[:, None] / sigma
    size = np.linalg.norm(per_flop, axis=0)
    if not np.linalg.cond(per_flop / np.maximum(size, 1e-300)) < MAX_CONDITION:
        raise DesignError(
            f"design: {len(candidates)} candidates cannot tell the law's parameters apart whatever is spent on them; "
            "add sizes, or other tokens for the same size"
        )
    scaled, wanted = per_flop / size, question.targets / size
    shares = np.full(len(candidates), 1 / len(candidates))
    for _ in range(MAX_ITERATIONS):
        gain = (scaled @ np.linalg.solve((scaled.T * shares) @ scaled, wanted.T)) ** 2
        brought = gain.sum(axis=1)
        spent = float(shares @ brought)  # the summed variance itself
        certificate = float(brought.max()) / spent
        if certificate <= CERTIFIED:
            break
        shares *= np.sqrt(brought / spent)
        shares /= shares.sum()
    counts = shares * budget / candidates.flops
    return Design(counts, forecast_sd(question, counts, sigma), certificate)


def pick_cells(
    law: Chinchilla,
    candidates: Candidates,
    aims: Candidates,
    budget: float,
    *,
    taken: Sequence[int] = (),
    sigma: float = SIGMA,
    tau: float = TAU,
    length: float = LENGTH,
    cost_power: float = COST_POWER,
) -> list[int]:
    """Choose cells one by one, each the one that lowers the variance of the loss at `aims` most for its cost.

    `law` is what is believed now: fit again after each round, and pass the cells trained so far as `taken`. The order is the
    order to train in; each is chosen once, and the choice ends when nothing affordable is left.

    Note: the variance is that of the law's parameters under a wide prior and of the discrepancy, given the cells chosen.
    """
    covariance = correlate(law, candidates, aims, tau, length)
    chosen: list[int] = []
    free = np.ones(len(candidates), dtype=bool)
    for cell in taken:
        covariance, free[cell] = condition(covariance, cell, sigma), False
    left, n = budget, len(candidates)
    while np.any(affordable := free & (candidates.flops <= left)):
        variance = np.diag(covariance)[:n] + sigma**2
        gain = (covariance[n:, :n] ** 2).sum(axis=0) / variance / candidates.flops**cost_power
        best = int(np.argmax(np.where(affordable, gain, -1.0)))
        covariance, free[best] = condition(covariance, best, sigma), False
        left -= float(candidates.flops[best])
        chosen.append(best)
    return chosen


def correlate(law: Chinchilla, candidates: Candidates, aims: Candidates, tau: float, length: float) -> FloatArray:
    """Return the prior covariance of ln L at candidates, then aims: the law's part and the discrepancy's."""
    n, d = (np.concatenate([getattr(part, name) for part in (candidates, aims)]) for name in ("n_params", "tokens"))
    centred = place(law, n, d)
    reach = jacobian(theta_of_params(astuple(law), centred), centred) * np.array(PRIOR_SD)
    distance = ((centred.x[:, :, None] - centred.x[:, None]) ** 2).sum(axis=0)
    return np.asarray(reach @ reach.T + tau**2 * np.exp(-distance / (2 * length**2)))


def condition(covariance: FloatArray, cell: int, sigma: float) -> FloatArray:
    """Return the covariance of ln L once a cell is known but for its noise."""
    column = covariance[:, cell]
    return np.asarray(covariance - np.outer(column, column) / (column[cell] + sigma**2))
