"""Scaling laws: each is one value with its source; what they share is one function and its slopes.

Legend, here and in fit.py: L is val_loss (nats per token), N a parameter count (the caller says which), D training tokens and
C = 6 N D training FLOPs.

Every law is a sum of terms, each a coefficient divided by powers of inputs, with a floor or without, some with an exponent
around the sum. A fit moves theta, one entry for each parameter and in their order: logs for the floor and the coefficients,
exponents as they are. Inputs enter as logs x less their means over the cells, so that for Chinchilla's law

    ln L = ln( exp(e) + exp(a - alpha x_N) + exp(b - beta x_D) )

and a, b and e say how large the three terms are in the middle of the grid. A and B are those terms moved to N = 1 and D = 1,
decades away: almost a function of the exponents (correlation above 0.999 on published data), and not to be read alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Evaluation = tuple[FloatArray, FloatArray]  # ln L (m, n) and its slopes by theta (m, p, n)


@dataclass(frozen=True)
class Term:
    """A coefficient divided by inputs, each to the power of an exponent: the name of a parameter, or a number that is fixed."""

    coefficient: str
    powers: Mapping[str, str | float]


@dataclass(frozen=True, eq=False)
class Law:
    """A form of scaling law: L = floor + (sum of terms) ^ outer, and how to evaluate it.

    Inputs are columns of the table. `extra` are parameters that only `evaluate` knows; they are above zero and moved as logs.
    """

    name: str
    equation: str
    source: str
    terms: tuple[Term, ...]
    floor: str = ""
    outer: str = ""
    extra: tuple[str, ...] = ()
    extra_inputs: tuple[str, ...] = ()
    evaluate: "Callable[[FloatArray, Centred], Evaluation]" = field(default=lambda theta, cells: evaluate_sum(theta, cells))
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda params: {})  # other ways to write parameters

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """The parameters in which the sum is linear; the floor first."""
        return (*([self.floor] if self.floor else []), *(term.coefficient for term in self.terms))

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        """The exponents of inputs, each once."""
        return tuple(dict.fromkeys(e for term in self.terms for e in term.powers.values() if isinstance(e, str)))

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter, in the order of theta."""
        return (*self.coefficients, *self.exponents, *([self.outer] if self.outer else []), *self.extra)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The columns of the table that the law reads."""
        return (*dict.fromkeys(name for term in self.terms for name in term.powers), *self.extra_inputs)

    @cached_property
    def is_log(self) -> npt.NDArray[np.bool_]:
        """Which entries of theta are logs of the parameters."""
        return np.array([name in self.coefficients or name in self.extra for name in self.parameters])

    def index(self, parameter: str) -> int:
        """Return where a parameter stands."""
        return self.parameters.index(parameter)

    def predict(self, params: npt.ArrayLike, **inputs: npt.ArrayLike) -> FloatArray:
        """Evaluate L. Shapes: params (..., p) in the order of `parameters`, each input (n,) -> (..., n)."""
        columns = np.broadcast_arrays(*(np.asarray(inputs[name], dtype=float) for name in self.inputs))
        logs = np.log(np.array([column.ravel() for column in columns]))
        cells = Centred(self, logs, np.zeros(len(logs)), np.zeros(logs.shape[1]))
        loss = np.exp(predict_log_loss(theta_of_params(params, cells), cells))
        return np.asarray(loss.reshape((*np.shape(params)[:-1], *columns[0].shape)))

    def name_params(self, params: FloatArray) -> dict[str, float]:
        """Return one set of parameters by name."""
        return dict(zip(self.parameters, params.tolist(), strict=True))

    def read(self, params: FloatArray) -> Any:  # noqa: ANN401 - a value with an attribute for each parameter
        """Return one set of parameters by attribute: Chinchilla's where the law is of that form."""
        return self.as_chinchilla(params) if self.is_chinchilla else SimpleNamespace(**self.name_params(params))

    @cached_property
    def is_chinchilla(self) -> bool:
        """Whether the law is E + A/N^alpha + B/D^beta or a special case of it."""
        inputs = [list(term.powers) for term in self.terms]
        named = all(isinstance(exponent, str) for term in self.terms for exponent in term.powers.values())
        return not self.outer and not self.extra and named and inputs == [["n_params"], ["tokens"]]

    def as_chinchilla(self, params: FloatArray) -> "Chinchilla":
        """Read the parameters as Chinchilla's, where the law is that or a special case of it.

        Raises:
            ValueError: the law is of another kind.
        """
        if not self.is_chinchilla:
            raise ValueError(f"{self.name}: is not of the form E + A/N^alpha + B/D^beta")
        named, (by_n, by_d) = self.name_params(params) | {"": 0.0}, self.terms
        alpha, beta = named[str(by_n.powers["n_params"])], named[str(by_d.powers["tokens"])]
        return Chinchilla(named[self.floor], named[by_n.coefficient], named[by_d.coefficient], alpha, beta)


@dataclass(frozen=True, eq=False)
class Centred:
    """Cells as a fit sees them: logs, with the mean of each input taken away.

    Shapes: x (k, n) in the order of `law.inputs`, mean (k,), log_loss (n,).
    """

    law: Law
    x: FloatArray
    mean: FloatArray
    log_loss: FloatArray

    @cached_property
    def design(self) -> FloatArray:
        """Say how theta makes the log of each term: term = theta . design. Shapes: (p, terms with the floor first, n)."""
        law, n_floors = self.law, 1 if self.law.floor else 0
        design = np.zeros((len(law.parameters), n_floors + len(law.terms), self.x.shape[1]))
        for i in range(len(law.coefficients)):
            design[i, i] = 1.0
        for i, term in enumerate(law.terms, start=n_floors):
            for name, exponent in term.powers.items():
                if isinstance(exponent, str):
                    design[law.index(exponent), i] -= self.x[law.inputs.index(name)]
        return design

    @cached_property
    def fixed(self) -> FloatArray | None:
        """Return what fixed exponents add to the log of each term, or nothing. Shapes: (terms, n)."""
        law, n_floors = self.law, 1 if self.law.floor else 0
        fixed = np.zeros(self.design.shape[1:])
        for i, term in enumerate(law.terms, start=n_floors):
            for name, exponent in term.powers.items():
                if not isinstance(exponent, str):
                    fixed[i] -= exponent * self.x[law.inputs.index(name)]
        return fixed if fixed.any() else None


def centre(law: Law, cells: Mapping[str, npt.ArrayLike], loss: npt.ArrayLike, *, at: float | None = None) -> Centred:
    """Take logs and centre them, or move them by `at` instead of their means."""
    x = np.log(np.array([np.asarray(cells[name], dtype=float) for name in law.inputs]))
    mean = x.mean(axis=1) if at is None else np.full(len(x), at)
    return Centred(law, x - mean[:, None], mean, np.log(np.asarray(loss, dtype=float)))


def params_of_theta(theta: FloatArray, centred: Centred) -> FloatArray:
    """Leave the centred logs. Shapes: (..., p) -> (..., p)."""
    law, params = centred.law, np.array(theta, dtype=float)
    params[..., : len(law.coefficients)] += measure_shift(params, centred)
    return np.where(law.is_log, np.exp(np.where(law.is_log, params, 0.0)), params)


def theta_of_params(params: npt.ArrayLike, centred: Centred) -> FloatArray:
    """Enter the centred logs. Shapes: (..., p) -> (..., p)."""
    law, theta = centred.law, np.array(params, dtype=float)
    theta = np.where(law.is_log, np.log(np.maximum(np.where(law.is_log, theta, 1.0), 1e-300)), theta)
    theta[..., : len(law.coefficients)] -= measure_shift(theta, centred)
    return theta


def measure_shift(theta: FloatArray, centred: Centred) -> FloatArray:
    """Return ln of each coefficient less its theta: exponent x mean, over the inputs of its term."""
    law, shift = centred.law, np.zeros((*theta.shape[:-1], len(centred.law.coefficients)))
    for i, term in enumerate(law.terms, start=1 if law.floor else 0):
        for name, exponent in term.powers.items():
            value = theta[..., law.index(exponent)] if isinstance(exponent, str) else exponent
            shift[..., i] += value * centred.mean[law.inputs.index(name)]
    return shift


def predict_log_loss(theta: FloatArray, centred: Centred) -> FloatArray:
    """Evaluate ln L at each cell, safely for terms of any size. Shapes: (..., p) -> (..., n)."""
    log_loss, _ = centred.law.evaluate(theta.reshape(-1, theta.shape[-1]), centred)
    return log_loss.reshape(*theta.shape[:-1], -1)


def jacobian(theta: FloatArray, centred: Centred) -> FloatArray:
    """Differentiate ln L by theta. Shapes: (..., p) -> (..., n, p)."""
    _, slopes = centred.law.evaluate(theta.reshape(-1, theta.shape[-1]), centred)
    return np.swapaxes(slopes, 1, 2).reshape(*theta.shape[:-1], -1, theta.shape[-1])


def evaluate_sum(theta: FloatArray, centred: Centred) -> Evaluation:
    """Evaluate a sum of terms. Shapes: theta (m, p) -> (m, n), (m, p, n).

    A slope is each term's share of the loss times how theta moves the log of the term.
    """
    law, (p, t, n) = centred.law, centred.design.shape
    terms = (theta @ centred.design.reshape(p, t * n)).reshape(-1, t, n)
    if centred.fixed is not None:
        terms += centred.fixed
    if law.outer:
        return evaluate_outer(theta[:, law.index(law.outer)], terms, centred)
    log_loss, shares = add_logs(terms)
    return log_loss, spread_shares(shares, centred)


def evaluate_outer(power: FloatArray, terms: FloatArray, centred: Centred) -> Evaluation:
    """Evaluate floor + (sum of terms) ^ power."""
    law, floors = centred.law, terms[:, :1] if centred.law.floor else terms[:, :0]
    log_sum, shares = add_logs(terms[:, floors.shape[1] :])
    log_loss, of_loss = add_logs(np.concatenate([floors, (power[:, None] * log_sum)[:, None]], axis=1))
    powered = of_loss[:, -1:]
    slopes = spread_shares(np.concatenate([of_loss[:, :-1], powered * power[:, None, None] * shares], axis=1), centred)
    slopes[:, law.index(law.outer)] = powered[:, 0] * log_sum
    return log_loss, slopes


def add_logs(terms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return ln of the sum of the terms' exponentials, and each term's share of it. Shapes: (m, t, n) -> (m, n), (m, t, n)."""
    top = terms.max(axis=1)
    shares = np.exp(terms - top[:, None])
    total = shares.sum(axis=1)
    shares /= total[:, None]
    return top + np.log(total), shares


def spread_shares(shares: FloatArray, centred: Centred) -> FloatArray:
    """Turn shares of terms into slopes by theta. Shapes: (m, t, n) -> (m, p, n)."""
    design, law = centred.design, centred.law
    slopes = np.zeros((len(shares), len(design), shares.shape[2]))
    n_linear = len(law.coefficients)
    slopes[:, :n_linear] = shares
    for j in range(n_linear, n_linear + len(law.exponents)):
        for i in np.flatnonzero(design[j].any(axis=1)):
            slopes[:, j] += shares[:, i] * design[j, i]
    return slopes


@dataclass(frozen=True)
class Allocation:
    """The split of a compute budget that a law calls best.

    Units: flops as 6 N D; n_params in the convention of the fit; loss in nats per token.
    """

    flops: float
    n_params: float
    tokens: float
    loss: float

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.n_params


@dataclass(frozen=True)
class Chinchilla:
    """The parameters of L(N, D) = E + A / N^alpha + B / D^beta, and what follows from them.

    Source: Hoffmann et al. 2022, arXiv 2203.15556, equation 2 (approach 3).
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
        """Evaluate the law, element by element."""
        n, d = np.asarray(n_params, dtype=float), np.asarray(tokens, dtype=float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    @property
    def optimum_exponent(self) -> float:
        """Say how fast the best model grows: N* is proportional to C^a with a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def log_tokens_per_param(self, flops: float) -> float:
        """Return ln(D*/N*) of the best split of C = 6 N D, in closed form.

        Source: the same paper, equation 4: N* = G (C/6)^a, D* = (C/6)^b / G with G = (alpha A / beta B)^(1/(alpha+beta)),
        a = beta/(alpha+beta), b = alpha/(alpha+beta).
        """
        both = self.alpha + self.beta
        log_g = (np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / both
        return float((self.alpha - self.beta) / both * np.log(flops / 6) - 2 * log_g)

    def allocate(self, flops: float) -> Allocation:
        """Minimise the law along C = 6 N D."""
        n_params = float(np.exp((np.log(flops / 6) - self.log_tokens_per_param(flops)) / 2))
        tokens = flops / 6 / n_params
        return Allocation(flops, n_params, tokens, float(self.loss(n_params, tokens)))


def derive_scale(coefficient: str, exponent: str, scale: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Write A / N^alpha as (N_c / N)^alpha: N_c = A^(1/alpha)."""
    return lambda params: {scale: params[coefficient] ** (1 / params[exponent])}


def derive_kaplan(params: Mapping[str, Any]) -> dict[str, Any]:
    """Write the terms of Kaplan's L(N, D) as in the paper."""
    return {
        "alpha_N": params["ratio"] * params["alpha_D"],
        "N_c": params["A"] ** (1 / params["ratio"]),
        "D_c": params["B"],
    }


BY_N, BY_D = Term("A", {"n_params": "alpha"}), Term("B", {"tokens": "beta"})
KAPLAN_TERMS = (Term("A", {"n_params": "ratio"}), Term("B", {"tokens": 1.0}))
KAPLAN = "Kaplan et al. 2020, arXiv 2001.08361, equation"
CHINCHILLA = Law(
    "chinchilla",
    "L(N, D) = E + A / N^alpha + B / D^beta",
    "Hoffmann et al. 2022, arXiv 2203.15556, equation 2 (approach 3)",
    (BY_N, BY_D),
    floor="E",
)
# With M = D/N tokens per parameter and C = 6 N D this is Gadre's over-training form in one size of exponent:
# L = E + (a M^eta + b M^-eta) C^-eta with alpha = 2 eta, A = a / 6^eta and B = b / 6^eta.
TIED = Law(
    "tied",
    "L(N, D) = E + A / N^alpha + B / D^alpha",
    "Muennighoff et al. 2023, arXiv 2305.16264, section 4; Gadre et al. 2024, arXiv 2403.08540, equation 4",
    (BY_N, Term("B", {"tokens": "alpha"})),
    floor="E",
)
KAPLAN_N = Law("kaplan_n", "L(N) = (N_c / N)^alpha", f"{KAPLAN} 1.1", (BY_N,), derive=derive_scale("A", "alpha", "N_c"))
KAPLAN_D = Law("kaplan_d", "L(D) = (D_c / D)^beta", f"{KAPLAN} 1.2", (BY_D,), derive=derive_scale("B", "beta", "D_c"))
KAPLAN_ND = Law(
    "kaplan_nd",
    "L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
    f"{KAPLAN} 1.5",
    KAPLAN_TERMS,
    outer="alpha_D",
    derive=derive_kaplan,
)
WITH_FLOOR = "; with an irreducible loss E added"
KAPLAN_N_FLOOR = Law(
    "kaplan_n_floor", "L(N) = E + (N_c / N)^alpha", f"{KAPLAN} 1.1{WITH_FLOOR}", (BY_N,), floor="E", derive=KAPLAN_N.derive
)
KAPLAN_D_FLOOR = Law(
    "kaplan_d_floor", "L(D) = E + (D_c / D)^beta", f"{KAPLAN} 1.2{WITH_FLOOR}", (BY_D,), floor="E", derive=KAPLAN_D.derive
)
KAPLAN_ND_FLOOR = Law(
    "kaplan_nd_floor",
    "L(N, D) = E + ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
    f"{KAPLAN} 1.5{WITH_FLOOR}",
    KAPLAN_TERMS,
    floor="E",
    outer="alpha_D",
    derive=derive_kaplan,
)
LAWS = {
    law.name: law
    for law in (
        CHINCHILLA,
        TIED,
        KAPLAN_N,
        KAPLAN_N_FLOOR,
        KAPLAN_D,
        KAPLAN_D_FLOOR,
        KAPLAN_ND,
        KAPLAN_ND_FLOOR,
    )
}
# Fits of the same runs, N counting all parameters.
# Sources: Hoffmann et al. 2022, arXiv 2203.15556, approach 3; Besiroglu et al. 2024, arXiv 2404.10102.
PUBLISHED = {
    "Hoffmann et al. 2022": Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28),
    "Besiroglu et al. 2024": Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}
