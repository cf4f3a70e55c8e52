"""Numbers into words, the same on the page, in the report and in the summary. What the grid does not identify is not printed."""

import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd

from results.study import Fitted, Study
from results.table import Cost
from results.uncertainty import LEVEL, Interval

NOT_IDENTIFIED = "not identified by this grid"
FAILED = ("failed", "diverged", "oom", "disk_full")


@dataclass(frozen=True)
class Claim:
    """One number as it may be quoted. `interval` is empty and `problem` is not where the grid does not identify it."""

    name: str
    meaning: str
    value: str
    interval: str
    problem: str

    @property
    def phrase(self) -> str:
        """The claim within a sentence."""
        return f"{self.value} ({self.problem})" if self.problem else f"{self.value} ({self.interval})"


def list_claims(fitted: Fitted) -> list[Claim]:
    """Say each quoted number of a fit, most asked for first."""
    meanings = {
        "alpha": "alpha, exponent of parameters",
        "beta": "beta, exponent of tokens",
        "E": "E, loss that neither lowers (nats per token)",
        "optimum_exponent": "a = beta / (alpha + beta): best parameters grow as C^a",
        "tokens_per_param": f"tokens per parameter, best split of {fitted.flops:.3g} FLOPs",
        "A": "A",
        "B": "B",
    }
    if not fitted.fit.law.is_chinchilla:
        meanings = {name: name for name in fitted.fit.law.parameters}
    elif "beta" not in fitted.fit.law.parameters:
        meanings["alpha"] = "alpha, exponent of parameters and of tokens"
        del meanings["beta"], meanings["optimum_exponent"]
    fixed = fitted.fit.fixed
    return [make_claim(name, meaning, fitted.intervals[name]) for name, meaning in meanings.items() if name not in fixed]


def make_claim(name: str, meaning: str, interval: Interval) -> Claim:
    """Put a number and its interval into words."""
    if not interval.identified:
        return Claim(name, meaning, NOT_IDENTIFIED, "", interval.problem)
    width = interval.high - interval.low
    low, high = format_to(interval.low, width), format_to(interval.high, width)
    return Claim(name, meaning, format_to(interval.estimate, width), f"{low} to {high}", "")


def format_to(value: float, width: float) -> str:
    """Write a number with as many decimals as its interval's width can carry: two digits of the half-width."""
    if not width > 0:
        return f"{value:.6g}"
    decimals = 1 - int(np.floor(np.log10(width / 2)))
    return f"{value:,.{decimals}f}" if decimals > 0 else f"{round(value, decimals):,.0f}"


def wrap_line(line: str, width: int = 120) -> list[str]:
    """Break a line that is too long, further lines under its first word."""
    indent = " " * (len(line) - len(line.lstrip(" -")) + (0 if line.startswith(" ") else 2))
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def describe_seed_noise(study: Study) -> str:
    """Say how much the seed alone moves the loss."""
    noise = study.seed_noise
    if noise is None:
        return "Seed noise: not measured (no two fitted cells differ in their seed alone)."
    return (
        f"Seed noise: standard deviation of val_loss {noise.sd:.2g} nats per token ({LEVEL:.0%} interval {noise.low:.2g} to "
        f"{noise.high:.2g}), from {noise.n_cells} cells in {noise.n_groups} group(s) that differ in the seed alone."
    )


def list_excluded(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the id and the reason of each cell that is not fitted."""
    excluded = cells[cells["excluded"]]
    return list(zip(excluded["cell_id"], excluded["exclusion_reason"], strict=True))


def render_summary(study: Study, cost: Cost) -> str:
    """Write the five lines that end a report."""
    return "\n".join([*summarise_law(study), summarise_cells(study.cells), summarise_flops(cost), summarise_time(cost)])


def summarise_law(study: Study) -> list[str]:
    """Write two lines: the exponents; E and the best split."""
    if study.fitted is None:
        return [f"exponents:  {NOT_IDENTIFIED}: {study.refusal}", f"E:          {NOT_IDENTIFIED}"]
    claims = {claim.name: claim for claim in list_claims(study.fitted)}
    return [
        f"exponents:  alpha {claims['alpha'].phrase}; beta {claims['beta'].phrase}",
        f"E:          {claims['E'].phrase}; {claims['tokens_per_param'].meaning}: {claims['tokens_per_param'].phrase}",
    ]


def summarise_cells(cells: pd.DataFrame) -> str:
    """Write one line: done, failed, left out and why."""
    states = cells["state"]
    excluded = list_excluded(cells)
    shown = "; ".join(f"{cell_id}: {reason}" for cell_id, reason in excluded[:3])
    more = f"; and {len(excluded) - 3} more" if len(excluded) > 3 else ""
    return (
        f"cells:      {(states == 'done').sum()} of {len(cells)} done, {states.isin(FAILED).sum()} failed, "
        f"{len(excluded)} excluded from the fit{f' ({shown}{more})' if excluded else ''}"
    )


def summarise_flops(cost: Cost) -> str:
    """Write one line: training FLOPs."""
    return f"compute:    {cost.flops:.3g} training FLOPs spent, shared trunks counted once"


def summarise_time(cost: Cost) -> str:
    """Write one line: the time during which something ran."""
    if cost.wall_s is None:
        return "wall time:  not recorded"
    unended = f"; {cost.n_unended} more without a recorded end" if cost.n_unended else ""
    return (
        f"wall time:  {format_duration(cost.wall_s)} during which training ran, pauses left out "
        f"({cost.n_attempts - cost.n_unended} attempt(s){unended})"
    )


def format_duration(seconds: float) -> str:
    """Write seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
