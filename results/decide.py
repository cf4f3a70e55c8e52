"""What to train: the best use of a budget, or the cheapest way to a loss, from a fitted law and with its intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from results.allocate import AllocationError, allocate
from results.claims import NOT_IDENTIFIED, wrap_line
from results.fit import FitError
from results.laws import Allocation, Chinchilla, FloatArray
from results.study import Convention, Fitted
from results.uncertainty import LEVEL, Interval, Quoted, judge

Split = Callable[[Chinchilla], Allocation]
Numbers = Callable[[Chinchilla], FloatArray]
NAMES = ("n_params", "tokens", "tokens_per_param", "loss", "flops")
MEANINGS = {
    "n_params": "parameters",
    "tokens": "training tokens",
    "tokens_per_param": "tokens per parameter",
    "loss": "loss (nats per token)",
    "flops": "FLOPs, training and serving",
}
RESTS_ON = ("E", "alpha", "beta")
FAR = 10.0  # beyond this multiple of the largest fitted compute an answer is called a long way out


@dataclass(frozen=True)
class Decision:
    """An answer: the split, and an interval for each of its numbers that was not given."""

    question: str
    best: Allocation
    intervals: dict[str, Interval]
    reach: float  # its training compute over the largest that was fitted


def decide_budget(fitted: Fitted, flops: float, served_tokens: float = 0.0) -> Decision:
    """Split a budget for training, and for serving where tokens are served."""

    def split(law: Chinchilla) -> Allocation:
        return allocate(law.loss, flops, served_tokens=served_tokens) if served_tokens else law.allocate(flops)

    return answer(fitted, f"the best use of {flops:.3g} FLOPs{say_served(served_tokens)}", split, ("flops",))


def decide_loss(fitted: Fitted, loss: float, served_tokens: float = 0.0) -> Decision:
    """Find the cheapest way to a loss."""

    def split(law: Chinchilla) -> Allocation:
        return reach_loss(law, loss, served_tokens)

    return answer(fitted, f"the cheapest way to a loss of {loss:g}{say_served(served_tokens)}", split, ("loss",))


def reach_loss(law: Chinchilla, loss: float, served_tokens: float = 0.0) -> Allocation:
    """Return the least FLOPs, 6 N D and 2 N for a served token, that reach a loss.

    Where N's share of L - E is u, moving along the curve of equal loss costs nothing more when
    alpha u / (beta (1 - u)) = 1 + S / 3D: one root, and in closed form u = beta / (alpha + beta) where nothing is served.

    Raises:
        AllocationError: the loss is not above E.
    """
    if not loss > law.E:
        raise AllocationError(f"loss={loss:g}, is not above E = {law.E:.4g}, which no compute passes; ask for a higher loss")
    above, plain = loss - law.E, float(np.log(law.beta / law.alpha))  # the log odds of u where nothing is served

    def find_tokens(log_odds: float) -> float:
        return float((law.B * (1 + np.exp(log_odds)) / above) ** (1 / law.beta))

    def imbalance(log_odds: float) -> float:
        return log_odds - plain - float(np.log1p(served_tokens / (3 * find_tokens(log_odds))))

    ceiling = plain + float(np.log1p(served_tokens / (3 * find_tokens(plain)))) + 1e-9
    log_odds = float(brentq(imbalance, plain, ceiling, xtol=1e-13)) if served_tokens else plain
    n_params, tokens = float((law.A * (1 + np.exp(-log_odds)) / above) ** (1 / law.alpha)), find_tokens(log_odds)
    return Allocation(6 * n_params * tokens + 2 * n_params * served_tokens, n_params, tokens, loss)


def say_served(served_tokens: float) -> str:
    """Say what is served."""
    return f", with {served_tokens:.3g} tokens served" if served_tokens else ""


def answer(fitted: Fitted, question: str, split: Split, given: tuple[str, ...]) -> Decision:
    """Ask the fitted law, and then each refit for the intervals.

    Raises:
        FitError: the law has no best split.
        AllocationError: the fitted law cannot answer.
    """
    if not fitted.fit.law.is_chinchilla:
        raise FitError(f"{fitted.fit.law.name}: has no best split of parameters and tokens; fit chinchilla or tied")
    best = split(fitted.fit.constants)
    remembered: dict[Chinchilla, FloatArray] = {}

    def log_numbers(law: Chinchilla) -> FloatArray:
        if law not in remembered:
            remembered[law] = describe(split, law)
        return remembered[law]

    names = [name for name in NAMES if name not in given]
    intervals = {name: judge(fitted.resamples, quote(log_numbers, name)) for name in names}
    return Decision(question, best, intervals, 6 * best.n_params * best.tokens / fitted.flops)


def quote(log_numbers: Numbers, name: str) -> Quoted:
    """Quote one of the numbers of a split, in logs."""
    position = NAMES.index(name)
    return Quoted(name, lambda law: log_numbers(law)[position], RESTS_ON, in_logs=True)


def describe(split: Split, law: Chinchilla) -> FloatArray:
    """Return the logs of a split's numbers; where a refit cannot answer, numbers so large that no interval is quoted."""
    try:
        best = split(law)
    except AllocationError:
        return np.full(len(NAMES), 100.0)
    return np.log([best.n_params, best.tokens, best.tokens_per_param, best.loss, best.flops])


def render_decision(decision: Decision, convention: Convention) -> str:
    """Write the answer."""
    lines = [f"{decision.question} (N counts {convention.words}; FLOPs are 6 N D, and 2 N for a served token)", ""]
    lines.append(f"  {'':<32}{'value':>12}   {LEVEL:.0%} interval")
    for name, interval in decision.intervals.items():
        if interval.identified:
            said = f"{interval.estimate:>12.4g}   {interval.low:.4g} to {interval.high:.4g}"
        else:
            said = f"{NOT_IDENTIFIED}: {interval.problem}"
        lines.append(f"  {MEANINGS[name]:<32}{said}")
    lines += ["", f"Its training compute is {decision.reach:.3g} x the largest that was fitted."]
    if decision.reach > FAR:
        lines.append("That is a long way out: the intervals hold only if the law still does there, which no cell has tested.")
    return "\n".join(wrapped for line in lines for wrapped in wrap_line(line))
