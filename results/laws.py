"""Scaling laws: each is one value with its source, able to say the loss and the best use of compute.

Legend, here and in fit.py: L is val_loss (nats per token), N a parameter count (the caller says which), D training tokens and
C = 6 N D training FLOPs.

A fit moves in five centred logs, theta = (a, b, e, alpha, beta), where x and y are ln N and ln D less their means over the cells:

    ln L = ln( exp(a - alpha x) + exp(b - beta y) + exp(e) )

So a, b and e say how large the three terms are in the middle of the grid. A and B are those terms moved to N = 1 and D = 1,
decades away: almost a function of the exponents (correlation above 0.999 on published data), and not to be read alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

PARAMETERS = ("E", "A", "B", "alpha", "beta")


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
    """L(N, D) = E + A / N^alpha + B / D^beta.

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


@dataclass(frozen=True)
class Centred:
    """Cells as a fit sees them: logs, with the means of ln N and ln D taken away.

    Shapes: x, y, log_loss: (n,).
    """

    x: FloatArray
    y: FloatArray
    log_loss: FloatArray
    mean_x: float
    mean_y: float


def centre(n_params: npt.ArrayLike, tokens: npt.ArrayLike, loss: npt.ArrayLike) -> Centred:
    """Take logs and centre them."""
    x, y = np.log(np.asarray(n_params, dtype=float)), np.log(np.asarray(tokens, dtype=float))
    mean_x, mean_y = float(x.mean()), float(y.mean())
    return Centred(x - mean_x, y - mean_y, np.log(np.asarray(loss, dtype=float)), mean_x, mean_y)


def law_of_theta(theta: FloatArray, centred: Centred) -> Chinchilla:
    """Leave the centred logs."""
    a, b, e, alpha, beta = (float(value) for value in theta)
    log_a, log_b = a + alpha * centred.mean_x, b + beta * centred.mean_y
    return Chinchilla(float(np.exp(e)), float(np.exp(log_a)), float(np.exp(log_b)), alpha, beta)


def theta_of_law(law: Chinchilla, centred: Centred) -> FloatArray:
    """Enter the centred logs."""
    a, b = np.log(law.A) - law.alpha * centred.mean_x, np.log(law.B) - law.beta * centred.mean_y
    return np.array([a, b, np.log(law.E), law.alpha, law.beta])


def log_terms(theta: FloatArray, centred: Centred) -> FloatArray:
    """Return the logs of the three terms of the law at each cell.

    Shapes: theta (..., 5) -> (..., n, 3); leading axes are independent fits.
    """
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    return np.stack(np.broadcast_arrays(a - alpha * centred.x, b - beta * centred.y, e), axis=-1)


def predict_log_loss(theta: FloatArray, centred: Centred) -> FloatArray:
    """Evaluate ln L at each cell, safely for terms of any size. Shapes: (..., 5) -> (..., n)."""
    terms = log_terms(theta, centred)
    top = terms.max(axis=-1)
    return np.asarray(top + np.log(np.exp(terms - top[..., None]).sum(axis=-1)))


def jacobian(theta: FloatArray, centred: Centred) -> FloatArray:
    """Differentiate ln L by theta: each term's share of the loss, times minus its log size for an exponent.

    Shapes: (..., 5) -> (..., n, 5).
    """
    terms = log_terms(theta, centred)
    share = np.exp(terms - terms.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    slopes = -share[..., :2] * np.stack([centred.x, centred.y], axis=-1)
    return np.concatenate([share, slopes], axis=-1)
