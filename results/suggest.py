"""Which cells to train next: those that shrink the interval of a target most for their FLOPs, beside those planned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.config import ConfigError
from harness.confounds import MIN_STEPS
from harness.plan import format_tokens
from harness.records import CellRecord, Plan
from results.design import SIGMA, ask, forecast_sd, list_candidates, pick_cells
from results.laws import Chinchilla
from results.uncertainty import Quantity

TARGETS = ("optimum", "loss", "exponent")
STEP = np.sqrt(2.0)  # between the budgets that are considered for a size
REACH = 4.0  # how far beyond the planned budgets they go, both ways
AROUND = (0.5, 1.0, 2.0)  # sizes at the target compute whose loss should be known, as factors of the best


@dataclass(frozen=True)
class Choice:
    """One proposed cell: the shape of a planned one, other tokens. `sd` is that of the target once it is trained, in order."""

    like: CellRecord
    tokens: int
    flops: float
    sd: float


@dataclass(frozen=True)
class Suggestion:
    """Proposed cells in the order to train them."""

    target: str
    sd_before: float
    choices: tuple[Choice, ...]


def ask_target(target: str, flops: float) -> Quantity:
    """Return the quantity whose interval is to shrink.

    Raises:
        ConfigError: no such target.
    """
    quantities: dict[str, Quantity] = {
        "optimum": lambda law: np.log(law.allocate(flops).n_params),
        "loss": lambda law: np.log(law.allocate(flops).loss),
        "exponent": lambda law: law.optimum_exponent,
    }
    if target not in quantities:
        raise ConfigError(f"--target={target}, is not one; use one of {', '.join(TARGETS)}")
    return quantities[target]


def suggest_cells(
    plan: Plan, law: Chinchilla, budget: float, target: str, at: float, *, at_most: int = 12, sigma: float = SIGMA
) -> Suggestion:
    """Choose cells for a budget of FLOPs. `at`: the compute that the target is about, as 6 N D.

    Raises:
        ConfigError: nothing can be bought.
    """
    quantity = ask_target(target, at)
    planned = [cell for cell in plan.cells if cell.role in ("grid", "repeat")]
    like, tokens = list_options(plan, planned)
    n, d = np.array([float(cell.n_params) for cell in like]), np.array(tokens, dtype=float)
    pool = list_candidates(n, d, np.array([float(cell.flops_per_token) for cell in like]) * d)
    new = np.arange(len(planned), len(like))
    if not new.size:
        raise ConfigError(f"{plan.experiment}: every cell within data.max_epochs is planned; prepare more text or add sizes")
    if not (pool.flops[new] <= budget).any():
        raise ConfigError(f"--flops={budget:g}, buys no cell; the cheapest takes {pool.flops[new].min():.3g}")
    best = law.allocate(at)
    aims = list_candidates(best.n_params * np.array(AROUND), best.tokens / np.array(AROUND))
    picked = pick_cells(law, pool, aims, budget, taken=range(len(planned)), sigma=sigma)
    question = ask(law, pool, [quantity])
    counts = (np.arange(len(like)) < len(planned)).astype(float)
    before, choices = float(forecast_sd(question, counts, sigma)[0]), []
    for cell in picked[:at_most]:
        counts[cell] += 1
        sd = float(forecast_sd(question, counts, sigma)[0])
        choices.append(Choice(like[cell], tokens[cell], float(pool.flops[cell]), sd))
    return Suggestion(target, before, tuple(choices))


def list_options(plan: Plan, planned: Sequence[CellRecord]) -> tuple[list[CellRecord], list[int]]:
    """Return the planned cells, then every other cell that could be trained: planned shapes at whole steps, within max_epochs."""
    shapes = {cell.size: cell for cell in plan.cells if cell.role != "scratch"}
    least, most = min(cell.tokens for cell in planned) / REACH, max(cell.tokens for cell in planned) * REACH
    most = min(most, plan.source["data"].get("max_epochs", 4.0) * plan.data.epoch_tokens)
    taken = {(cell.size, cell.tokens) for cell in planned}
    like, tokens = list(planned), [cell.tokens for cell in planned]
    for cell in shapes.values():
        per_step = cell.global_batch_size * cell.seq_len
        for k in range(int(np.log(most / least) / np.log(STEP)) + 1):
            steps = int(least * STEP**k / per_step)
            if steps >= MIN_STEPS and (cell.size, steps * per_step) not in taken:
                taken.add((cell.size, steps * per_step))
                like.append(cell)
                tokens.append(steps * per_step)
    return like, tokens


def render_suggestion(found: Suggestion, budget: float) -> str:
    """Write the proposed cells, one a line."""
    unit = "" if found.target == "exponent" else "ln "
    lines = [
        f"to know the {found.target} better, for {budget:.3g} FLOPs (standard deviation of {unit}{found.target}, by the law):"
    ]
    lines.append(f"  {'as planned':<40}{'':>12}{'':>12}   {found.sd_before:.4g}")
    spent = 0.0
    for choice in found.choices:
        spent += choice.flops
        name = f"{choice.like.size}, {format_tokens(choice.tokens)} tokens"
        lines.append(f"  {name:<40}{choice.flops:>12.3g}{spent:>12.3g}   {choice.sd:.4g}")
    return "\n".join(lines)


def render_toml(found: Suggestion, plan: Plan) -> str:
    """Write the proposed cells as the key `extra` of [grid]."""
    d_ff = {run.size: run.what.model.d_ff for run in plan.runs}
    lines = [f"# Proposed for the {found.target}; put this into [grid] of {plan.experiment}.toml.", "extra = ["]
    for choice in found.choices:
        cell = choice.like
        wide = f", d_ff = {d_ff[cell.size]}" if d_ff[cell.size] is not None else ""
        shape = f"{{ n_layer = {cell.n_layer}, n_head = {cell.n_head}, d_model = {cell.d_model}{wide} }}"
        lines.append(f"  {{ size = {shape}, tokens = {choice.tokens:_} }},")
    return "\n".join([*lines, "]", ""])
