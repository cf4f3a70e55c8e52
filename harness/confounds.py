"""Confounds that the literature knows, each one rule: plan -> warnings that name the cells and the field. No torch.

The last four ask whether a law can be fitted at all; they are silent where the grid varies something else on purpose.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log, sqrt

from harness.records import CellRecord, Finding, Plan

MAX_WARMUP = 0.1  # of a cell's steps
MIN_STEPS = 200  # so that a batch is at most 1/200 of the budget
MAX_EPOCHS = 4.0
MAX_EMBEDDING = 0.5  # of a model's parameters
MIN_RATIOS, MIN_SPAN, SAME_RATIO = 3, 16.0, 1.25  # tokens per parameter: how many, how far apart, what counts as one
MIN_TRUNKS, N_LAW_PARAMETERS = 2, 5  # trunks for each of E, A, B, alpha, beta
MIN_DISTANCE = 0.05  # a grid is a line where ln tokens follows ln parameters to this standard deviation
TOKEN_SD = 1.0  # nats: scatter from token to token of the difference between two models' losses; an assumption, rather large
N_ERRORS = 4.0  # a difference counts as seen when it is this many standard errors
PRIOR = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # E, A, B, alpha, beta: Besiroglu et al. 2024, arXiv 2404.10102, table 1


def name_cells(cells: Sequence[CellRecord]) -> str:
    """Name a few cells, and say how many more there are."""
    names = ", ".join(cell.cell_id for cell in cells[:2])
    return f"{names} and {len(cells) - 2} more" if len(cells) > 2 else names


def warn(rule: str, field: str, cells: Sequence[CellRecord], message: str) -> Iterator[Finding]:
    """Yield a warning that begins with its cells, where there are any."""
    if cells:
        ids = tuple(cell.cell_id for cell in cells)
        yield Finding(severity="warning", rule=rule, field=field, cells=ids, message=f"{name_cells(cells)}: {message}")


def select_fitted(plan: Plan) -> list[CellRecord]:
    """Return the cells that a law would be fitted to."""
    return [cell for cell in plan.cells if cell.role == "grid"]


def select_law(plan: Plan) -> list[CellRecord]:
    """Return the cells of a grid that is there for a law: sizes and budgets vary, and nothing else on purpose."""
    grid, cells = plan.source["grid"], select_fitted(plan)
    is_other = bool(grid.get("axes") or grid.get("variants"))
    varies = len({cell.n_params for cell in cells}) > 1 and len({cell.tokens for cell in cells}) > 1
    return cells if varies and not is_other else []


def find_long_warmup(plan: Plan) -> Iterator[Finding]:
    """Warmup as a large part of a short run.

    Source: Porian et al. 2024, arXiv 2406.19146, section 3.2: it moved the exponent of the best size from 0.71 to 0.60.
    """
    n_warmup = {run.run_id: run.what.schedule.n_warmup_steps for run in plan.runs}
    cells = [cell for cell in plan.cells if n_warmup[cell.run_id] > MAX_WARMUP * cell.n_steps]
    if cells:
        worst = max(n_warmup[cell.run_id] / cell.n_steps for cell in cells)
        yield from warn(
            "long_warmup",
            "schedule.warmup_tokens",
            cells,
            f"the warmup is up to {worst:.0%} of the training, over {MAX_WARMUP:.0%}; shorten it, or use "
            '{ rule = "model_size" }',
        )


def find_horizon(plan: Plan) -> Iterator[Finding]:
    """A learning rate that has not decayed at the budget, or decays towards another one.

    Source: Hoffmann et al. 2022, appendix B: a schedule longer than the budget overstates the loss.
    """
    horizons = {run.run_id: run.what.n_steps for run in plan.runs}
    for cell in plan.cells:
        if horizons[cell.run_id] not in (None, cell.n_steps):
            message = (
                f"{cell.cell_id}: decays towards {horizons[cell.run_id]} steps but ends after {cell.n_steps}; make them equal"
            )
            yield Finding(severity="error", rule="horizon", field="n_steps", cells=(cell.cell_id,), message=message)
    flat = [cell for cell in select_law(plan) if cell.schedule == "constant"]
    message = 'the learning rate has not decayed at the budget, so the loss is not the best of its compute; use kind = "wsd"'
    yield from warn("horizon", "schedule.kind", flat, message)


def find_few_steps(plan: Plan) -> Iterator[Finding]:
    """A batch that is too large a part of the budget, so that too few steps are left to learn in.

    Source: McCandlish et al. 2018, arXiv 1812.06162: beyond the critical batch, tokens are wasted. The limit is a choice.
    """
    cells = [cell for cell in plan.cells if cell.n_steps < MIN_STEPS]
    if cells:
        fewest = min(cell.n_steps for cell in cells)
        message = f"only {fewest} steps, so that a batch is {1 / fewest:.1%} of the budget; use a smaller batch for these budgets"
        yield from warn("few_steps", "optim.global_batch_size", cells, f"{message} (at least {MIN_STEPS} steps)")


def find_constant_heads(plan: Plan) -> Iterator[Finding]:
    """A constant head count while width grows: the width of a head is a second thing that varies.

    Source: Yang et al. 2022, TP5, arXiv 2203.03466, appendix D: scale the number of heads, or the attention by d_head.
    """
    cells = select_law(plan)
    widths, heads = {cell.d_model for cell in cells}, {cell.n_head for cell in cells}
    if len(widths) > 1 and len(heads) == 1:
        message = f"n_head={min(heads)} at every width from {min(widths)} to {max(widths)}; let the heads grow with d_model"
        yield from warn("constant_heads", "model.n_head", cells, message)


def find_small_validation(plan: Plan) -> Iterator[Finding]:
    """A validation split too small for the differences that the grid is to show.

    Note: the differences are those that a published law expects between neighbouring budgets of a size.
    """
    error = TOKEN_SD / sqrt(plan.data.val_tokens)
    cells = [b for a, b in iter_neighbours(select_law(plan)) if expect_loss(a) - expect_loss(b) < N_ERRORS * error]
    if cells:
        least = min(expect_loss(a) - expect_loss(b) for a, b in iter_neighbours(select_law(plan)))
        message = (
            f"{plan.data.val_tokens:,} validation tokens leave a difference uncertain by about {error:.2g} nats, and the next "
            f"smaller budget is expected only {least:.2g} away; prepare a larger validation split or space the budgets wider"
        )
        yield from warn("small_validation", "data.val_tokens", cells, message)


def iter_neighbours(cells: Sequence[CellRecord]) -> Iterator[tuple[CellRecord, CellRecord]]:
    """Yield pairs of cells with neighbouring budgets of one size and seed."""
    ordered = sorted(cells, key=lambda cell: (cell.size, cell.seed, cell.tokens))
    for a, b in pairwise(ordered):
        if (a.size, a.seed) == (b.size, b.seed) and a.tokens < b.tokens:
            yield a, b


def expect_loss(cell: CellRecord) -> float:
    """Return the loss that a published law gives a cell."""
    e, a, b, alpha, beta = PRIOR
    return float(e + a * cell.n_params**-alpha + b * cell.tokens**-beta)


def find_repetition(plan: Plan) -> Iterator[Finding]:
    """More epochs than a law of unique tokens holds for.

    Source: Muennighoff et al. 2023, arXiv 2305.16264: up to 4 epochs a repeated token is nearly as good as a new one.
    """
    cells = [cell for cell in plan.cells if cell.epochs > MAX_EPOCHS]
    if cells:
        most = max(cell.epochs for cell in cells)
        message = f"up to {most:.1f} epochs, more than {MAX_EPOCHS:g}: repeated tokens bend a law; prepare more text"
        yield from warn("repetition", "data.max_epochs", cells, message)


def find_embedding_rungs(plan: Plan) -> Iterator[Finding]:
    """Rungs that are mostly embeddings, where the ways to count N disagree.

    Source: Pearce and Song 2024, arXiv 2406.12907: counting them or not explains most of Kaplan against Chinchilla.
    """
    cells = [cell for cell in select_law(plan) if cell.n_params - cell.n_params_non_embedding > MAX_EMBEDDING * cell.n_params]
    if cells:
        most = max(1 - cell.n_params_non_embedding / cell.n_params for cell in cells)
        message = f"up to {most:.0%} of the parameters are embeddings; use larger models or a smaller vocabulary"
        yield from warn("embedding_rungs", "grid.sizes", cells, message)


def find_narrow_ratios(plan: Plan) -> Iterator[Finding]:
    """Too few or too similar tokens per parameter to tell the law's two terms apart.

    Source: the condition number of the fit: 6e7 on D = 20 N alone, 396 on 10 to 40, 151 on 1 to 400 tokens per parameter.
    """
    cells = select_law(plan)
    ratios = sorted(cell.tokens / cell.n_params for cell in cells)
    if not ratios or is_diagonal(cells):
        return
    distinct = 1 + sum(b > SAME_RATIO * a for a, b in pairwise(ratios))
    span = ratios[-1] / ratios[0]
    if distinct < MIN_RATIOS or span < MIN_SPAN:
        message = (
            f"{distinct} tokens-per-parameter ratio(s) over a factor of {span:.3g}; use at least {MIN_RATIOS} over a factor "
            f"of {MIN_SPAN:g}"
        )
        yield from warn("narrow_ratios", "grid", cells, message)


def find_diagonal(plan: Plan) -> Iterator[Finding]:
    """All cells on one line of ln tokens against ln parameters: the law's two terms cannot be told apart.

    Source: arXiv 2605.08541: at a fixed ratio the fit is singular.
    """
    cells = select_law(plan)
    if cells and is_diagonal(cells):
        message = "tokens follow one power of the parameters in every cell; add other budgets of the same sizes"
        yield from warn("diagonal", "grid", cells, message)


def is_diagonal(cells: Sequence[CellRecord]) -> bool:
    """Say whether ln tokens is a straight line in ln parameters."""
    x, y = ([log(value) for value in values] for values in ([c.n_params for c in cells], [c.tokens for c in cells]))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    off = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    return sqrt(sum(value**2 for value in off) / len(off)) < MIN_DISTANCE


def find_few_trunks(plan: Plan) -> Iterator[Finding]:
    """Too few independent trainings for the law's parameters: cells of one trunk share its luck.

    Source: this project's coverage simulations (results/uncertainty.py): intervals on few trunks are too narrow.
    """
    cells = select_law(plan)
    n_trunks = len({cell.run_id for cell in cells})
    if cells and n_trunks < MIN_TRUNKS * N_LAW_PARAMETERS:
        message = (
            f"{n_trunks} trunk(s) for the {N_LAW_PARAMETERS} parameters of a law, fewer than {MIN_TRUNKS} for each, so intervals "
            "may be too narrow; add sizes, or seeds"
        )
        yield from warn("few_trunks", "grid.sizes", cells, message)


RULES: tuple[Callable[[Plan], Iterator[Finding]], ...] = (
    find_long_warmup,
    find_horizon,
    find_few_steps,
    find_constant_heads,
    find_small_validation,
    find_repetition,
    find_embedding_rungs,
    find_diagonal,
    find_narrow_ratios,
    find_few_trunks,
)
