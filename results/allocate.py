"""The best use of compute: which model, on how many tokens, for a budget or for a loss.

`loss` below is the `loss` of any law: a function of parameters and tokens. `flops_per_token` is how training FLOPs grow
with the model, 6 N unless a caller knows better: `follow_ladder` makes the exact count of a ladder of real shapes.
Served tokens count too where a model is trained to be used: a forward pass costs a third of a training step per token.

Source: Hoffmann et al. 2022, arXiv 2203.15556, section 3.3 (the closed form, `Chinchilla.allocate`); Sardana et al. 2024,
arXiv 2401.00448, section 2 (served tokens).
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from harness.config import ConfigError
from model.size import ModelConfig, count_flops, count_params
from results.laws import Allocation, FloatArray

Loss = Callable[[npt.ArrayLike, npt.ArrayLike], FloatArray]
FlopsPerToken = Callable[[npt.ArrayLike], FloatArray]

SERVING_SHARE = 1 / 3  # a forward pass over forward and backward
N_SCANNED = 300
N_BISECTIONS = 60  # a hundred in ln N to the last digit of a float
# A five-point difference at this step of ln D errs by about 1e-9 of the slope, in truncation and in rounding.
STEP = 0.03
STENCIL = np.array([1.0, -8.0, 8.0, -1.0]) / (12 * STEP)
OFFSETS = STEP * np.array([-2.0, -1.0, 1.0, 2.0])
MAX_FLOPS = 1e40
TOLERANCE = 1e-12


class AllocationError(ConfigError):
    """A question about compute that the law cannot answer."""


def six_n(n_params: npt.ArrayLike) -> FloatArray:
    """Return the FLOPs per training token of C = 6 N D."""
    return 6.0 * np.asarray(n_params, dtype=float)


def follow_ladder(configs: Sequence[ModelConfig]) -> FlopsPerToken:
    """Return the exact training FLOPs per token of a ladder of shapes, as a function of n_params."""
    params, flops = ([float(count(config)) for config in configs] for count in (count_n_params, count_flops_per_token))
    return interpolate_flops(params, flops)


def count_n_params(config: ModelConfig) -> int:
    """Count all parameters."""
    return count_params(config).n_params


def count_flops_per_token(config: ModelConfig) -> int:
    """Count training FLOPs per token."""
    return count_flops(config).flops_per_token


def interpolate_flops(n_params: npt.ArrayLike, flops_per_token: npt.ArrayLike) -> FlopsPerToken:
    """Return FLOPs per token as a function of parameters, through these sizes and straight in logs beyond.

    Raises:
        AllocationError: fewer than two sizes, or a larger one that costs no more.
    """
    sizes, where = np.unique(np.asarray(n_params, dtype=float), return_index=True)
    x, y = np.log(sizes), np.log(np.asarray(flops_per_token, dtype=float)[where] if len(sizes) else sizes)
    if x.size < 2 or np.any(np.diff(y) <= 0):
        raise AllocationError(f"ladder: sizes={x.size}, a curve needs two or more, the larger the dearer; add sizes")
    inner, slopes = PchipInterpolator(x, y), np.diff(y)[[0, -1]] / np.diff(x)[[0, -1]]

    def count(n_params: npt.ArrayLike) -> FloatArray:
        at = np.log(np.asarray(n_params, dtype=float))
        inside = inner(np.clip(at, x[0], x[-1]))
        beyond = slopes[0] * np.minimum(at - x[0], 0) + slopes[1] * np.maximum(at - x[-1], 0)
        return np.asarray(np.exp(inside + beyond))

    return count


def allocate(loss: Loss, flops: float, *, flops_per_token: FlopsPerToken = six_n, served_tokens: float = 0.0) -> Allocation:
    """Minimise the loss over models whose training, and serving of `served_tokens`, costs `flops` in all.

    The lowest of a scan over ln D is followed to the root of the slope along the budget.

    Raises:
        AllocationError: the budget has no room, or the loss falls as far as the edge of what it can buy.
    """
    check_positive("flops", flops)
    if not (np.isfinite(served_tokens) and served_tokens >= 0):
        raise AllocationError(f"served_tokens={served_tokens:g}, is not a count; use a number from 0 up")
    most = flops / float(flops_per_token(1.0)) - SERVING_SHARE * served_tokens  # tokens left for a model of one parameter
    if not most > 1:
        raise AllocationError(f"flops={flops:g}: leaves no token to train on after serving; raise it or serve fewer tokens")

    def find_params(log_d: FloatArray) -> FloatArray:
        return invert(flops_per_token, flops / (np.exp(log_d) + SERVING_SHARE * served_tokens))

    def slope(log_d: float) -> float:
        at = log_d + OFFSETS
        return float(STENCIL @ loss(find_params(at), np.exp(at)))

    scanned = np.linspace(0.0, np.log(most), N_SCANNED)
    best = int(np.argmin(loss(find_params(scanned), np.exp(scanned))))
    if not 1 <= best <= N_SCANNED - 2 or not slope(scanned[best - 1]) < 0 < slope(scanned[best + 1]):
        raise AllocationError(f"flops={flops:g}: the law has no best model inside this budget; check its exponents")
    log_d = np.array(brentq(slope, scanned[best - 1], scanned[best + 1], xtol=TOLERANCE))
    n_params, tokens = float(find_params(log_d)), float(np.exp(log_d))
    return Allocation(flops, n_params, tokens, float(loss(n_params, tokens)))


def invert(flops_per_token: FlopsPerToken, wanted: FloatArray) -> FloatArray:
    """Return the parameters at which a rising count of FLOPs per token is what is wanted, by bisection of ln N."""
    low, high = np.zeros_like(wanted) - 1.0, np.zeros_like(wanted) + np.log(MAX_FLOPS)
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        below = flops_per_token(np.exp(middle)) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.exp((low + high) / 2))


def find_compute(loss: Loss, target: float, *, flops_per_token: FlopsPerToken = six_n, served_tokens: float = 0.0) -> Allocation:
    """Return the cheapest way to a loss: the least FLOPs, training and serving together, whose best use reaches it.

    Raises:
        AllocationError: no compute reaches the loss, or any does.
    """
    check_positive("loss", target)

    def excess(log_flops: float) -> float:
        best = allocate(loss, float(np.exp(log_flops)), flops_per_token=flops_per_token, served_tokens=served_tokens)
        return best.loss - target

    low = float(np.log(1e6 + 10 * flops_per_token(1.0) * SERVING_SHARE * served_tokens))
    high = float(np.log(MAX_FLOPS))
    if excess(high) > 0:
        raise AllocationError(f"loss={target:g}, is below what the law reaches with any compute; ask for a higher loss")
    if excess(low) < 0:
        raise AllocationError(f"loss={target:g}, is reached with hardly any compute; ask for a lower loss")
    flops = float(np.exp(brentq(excess, low, high, xtol=TOLERANCE)))
    return allocate(loss, flops, flops_per_token=flops_per_token, served_tokens=served_tokens)


def check_positive(name: str, value: float) -> None:
    """Refuse a number that has no logarithm.

    Raises:
        AllocationError: it is not above zero, or not finite.
    """
    if not (np.isfinite(value) and value > 0):
        raise AllocationError(f"{name}={value:g}, is not a finite number above 0; mend it")
