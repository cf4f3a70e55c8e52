"""The grid: which cells an experiment asks for, with every rule a number and every budget whole steps. No torch.

Sizes x budgets x seeds (x variants x axes), then the cells beside the grid: extra ones, repeats for the seed noise, and
cells trained from scratch beside their branch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.config import (
    BUDGET_KEYS,
    BatchRule,
    ConfigError,
    DecayRule,
    Experiment,
    ExtraCell,
    GridSection,
    LrRule,
    ScheduleSection,
    Section,
    Size,
    WarmupRule,
    parse_experiment,
    set_key,
)
from harness.records import DataRecord, Optim, Role
from harness.schedule import Schedule
from model.parametrization import BATCH_RULES, BUDGET_RULES, DECAY_RULES, LR_RULES, WARMUP_RULES, Scale
from model.size import ModelConfig, SizeError, count_flops, count_params, resolve_model

MAX_ROUNDING = 0.02  # a budget missed by more than this fraction after rounding to whole steps is refused
AXIS_SECTIONS = ("model", "optim", "schedule")
VARIANT_BUDGETS = tuple(f"grid.{key}" for key in BUDGET_KEYS)


@dataclass(frozen=True)
class PlannedCell:
    """A cell that the experiment asks for. `experiment` is its variant, whose rules are numbers in `optim` and `schedule`."""

    experiment: Experiment
    model: ModelConfig
    optim: Optim
    schedule: Schedule
    seed: int
    requested_tokens: int
    n_steps: int
    role: Role
    flops: int  # of the whole cell, its trunk included

    @property
    def shares_trunk(self) -> bool:
        """Whether other budgets may branch off the same trunk."""
        return self.schedule.kind == "wsd" and self.role != "scratch"


def list_cells(experiment: Experiment, data: DataRecord) -> list[PlannedCell]:
    """Return every cell of an experiment, those of the grid first.

    Raises:
        ConfigError: a combination that cannot be built, or a budget that cannot be met.
    """
    grid = experiment.grid
    seeds = grid.seeds or (experiment.seed,)
    cells: list[PlannedCell] = []
    for size, variant in itertools.product(grid.sizes, list_variants(experiment)):
        cells += list_size(variant, size, data, seeds, is_held_out=is_held_out_size(grid, size))
    cells += [plan_extra(experiment, extra, data, seeds[0]) for extra in grid.extra]
    return [*cells, *list_repeats(grid, cells, max(seeds)), *list_scratch(grid, cells)]


def list_size(
    variant: Experiment, size: Size, data: DataRecord, seeds: tuple[int, ...], *, is_held_out: bool
) -> list[PlannedCell]:
    """Return the cells of one size under one variant, seed by seed."""
    model = resolve_size(variant, size, data)
    budgets = resolve_budgets(variant, model)
    check_rules(variant, n_budgets=len(set(budgets)))
    hold_out = variant.grid.hold_out
    largest = max(budgets) if hold_out is not None and hold_out.budgets == "largest" else None
    planned = [
        plan_cell(variant, model, seeds[0], tokens, "held_out" if is_held_out or tokens == largest else "grid")
        for tokens in budgets
    ]
    return [replace(cell, seed=seed) for seed in seeds for cell in planned]


def plan_cell(variant: Experiment, model: ModelConfig, seed: int, requested_tokens: int, role: Role) -> PlannedCell:
    """Put numbers where the variant has rules, and round the budget to whole steps."""
    scale = measure_scale(model, requested_tokens)
    lr, batch = resolve_lr(variant.optim.lr, scale), resolve_batch(variant.optim.global_batch_size, scale, model.seq_len)
    per_step = batch * model.seq_len
    n_steps = round_to_steps(variant.grid, requested_tokens, per_step)
    numbers = {"lr": lr, "global_batch_size": batch, "weight_decay": resolve_decay(variant.optim.weight_decay, lr, n_steps)}
    return PlannedCell(
        experiment=variant,
        model=model,
        optim=Optim(**variant.optim.model_copy(update=numbers).model_dump()),
        schedule=resolve_schedule(variant.schedule, resolve_warmup(variant.schedule.warmup_tokens, scale), per_step),
        seed=seed,
        requested_tokens=requested_tokens,
        n_steps=n_steps,
        role=role,
        flops=n_steps * per_step * count_flops(model).flops_per_token,
    )


def plan_extra(experiment: Experiment, extra: ExtraCell, data: DataRecord, seed: int) -> PlannedCell:
    """Return a cell beside the grid's."""
    model = resolve_size(experiment, extra.size, data)
    (tokens,) = resolve_budgets(experiment, model, extra)
    check_rules(experiment, n_budgets=2)  # a budget more on a trunk that the grid may have
    return plan_cell(
        experiment, model, seed if extra.seed is None else extra.seed, tokens, "held_out" if extra.hold_out else "grid"
    )


def list_repeats(grid: GridSection, cells: list[PlannedCell], last_seed: int) -> Iterator[PlannedCell]:
    """Yield the cheapest fitted cell again under further seeds, where asked for."""
    if grid.repeats is None:
        return
    fitted = [cell for cell in cells if cell.role == "grid"]
    if not fitted:
        raise ConfigError("grid.repeats: every cell is held out, so none can be repeated; drop repeats or hold out less")
    cheapest = min(fitted, key=lambda cell: cell.flops)
    for seed in range(last_seed + 1, last_seed + 1 + grid.repeats.n):
        yield replace(cheapest, seed=seed, role="repeat")


def list_scratch(grid: GridSection, cells: list[PlannedCell]) -> Iterator[PlannedCell]:
    """Yield the cheapest fitted cells again, each as a run of its own, where asked for.

    Raises:
        ConfigError: no cell shares a trunk.
    """
    if grid.scratch is None:
        return
    branches = sorted((cell for cell in cells if cell.role == "grid" and cell.shares_trunk), key=lambda cell: cell.flops)
    if not branches:
        raise ConfigError('grid.scratch: no fitted cell branches off a trunk; drop it or use schedule.kind = "wsd"')
    for cell in branches[: grid.scratch.n]:
        kind, floor = grid.scratch.schedule, cell.experiment.schedule.min_lr_fraction
        update = {"kind": kind, "min_lr_fraction": None if kind == "wsd" else floor}
        yield replace(cell, schedule=cell.schedule.model_copy(update=update), role="scratch")


def list_variants(experiment: Experiment) -> list[Experiment]:
    """Return one experiment per listed variant and combination of the calibration axes (just this one where there are none)."""
    grid = experiment.grid
    for key in grid.axes:
        if key.split(".")[0] not in AXIS_SECTIONS or "." not in key:
            raise ConfigError(f"grid.axes: {key}, is not an axis; use a key of {', '.join(AXIS_SECTIONS)}, such as optim.lr")
    for key in itertools.chain.from_iterable(grid.variants):
        if key not in VARIANT_BUDGETS and (key.split(".")[0] not in AXIS_SECTIONS or "." not in key):
            allowed = ", ".join([*AXIS_SECTIONS, *VARIANT_BUDGETS])
            raise ConfigError(f"grid.variants: {key}, cannot vary; use a key of {allowed}, such as optim.lr")
    if not grid.variants and not grid.axes:
        return [experiment]
    variants = []
    for together, values in itertools.product(grid.variants or ({},), list(itertools.product(*grid.axes.values()))):
        table = experiment.model_dump(exclude_none=True)
        for key, value in [*together.items(), *zip(grid.axes, values, strict=True)]:
            set_key(table, key, value, where="grid.axes" if key in grid.axes else "grid.variants")
        variants.append(parse_experiment(table, where="grid.variants" if together else "grid.axes"))
    return variants


def check_rules(experiment: Experiment, n_budgets: int) -> None:
    """Refuse a rule that reads the budget where several budgets share one trunk, which has one value of everything."""
    if experiment.schedule.kind != "wsd" or n_budgets < 2:
        return
    for key, value in list_rules(experiment):
        if value.rule in BUDGET_RULES:
            raise ConfigError(
                f'{key}={{ rule = "{value.rule}" }}, reads the budget, but under schedule.kind="wsd" the budgets of a size share '
                'one trunk; use schedule.kind = "cosine", or a number or rule of the size alone'
            )


def list_rules(experiment: Experiment) -> list[tuple[str, LrRule | BatchRule | DecayRule | WarmupRule]]:
    """Return the keys that hold a rule instead of a number."""
    optim, schedule = experiment.optim, experiment.schedule
    keys = {
        "optim.lr": optim.lr,
        "optim.global_batch_size": optim.global_batch_size,
        "optim.weight_decay": optim.weight_decay,
        "schedule.warmup_tokens": schedule.warmup_tokens,
    }
    return [(key, value) for key, value in keys.items() if isinstance(value, LrRule | BatchRule | DecayRule | WarmupRule)]


def measure_scale(model: ModelConfig, requested_tokens: int) -> Scale:
    """Return what a rule may look at."""
    params, flops = count_params(model), count_flops(model)
    return Scale(
        n_params_non_embedding=max(1, params.n_params_non_embedding),
        n_params_with_head=max(1, params.n_params_non_embedding + params.head_matrix),
        tokens=requested_tokens,
        flops_per_token_non_embedding=max(1, flops.flops_per_token - flops.head),
    )


def resolve_lr(lr: float | LrRule, scale: Scale) -> float:
    """Return the learning rate as a number."""
    return lr.factor * LR_RULES[lr.rule](scale) if isinstance(lr, LrRule) else lr


def resolve_batch(batch: int | BatchRule, scale: Scale, seq_len: int) -> int:
    """Return the global batch as a number. Units: sequences."""
    if not isinstance(batch, BatchRule):
        return batch
    return nearest_multiple(round(batch.factor * BATCH_RULES[batch.rule](scale) / seq_len), batch.multiple_of)


def resolve_decay(decay: float | DecayRule, lr: float, n_steps: int) -> float:
    """Return the weight decay as a number."""
    return decay.factor * DECAY_RULES[decay.rule](lr, n_steps) if isinstance(decay, DecayRule) else decay


def resolve_warmup(warmup: int | WarmupRule, scale: Scale) -> int:
    """Return the warmup as a number. Units: tokens."""
    return round(warmup.factor * WARMUP_RULES[warmup.rule](scale)) if isinstance(warmup, WarmupRule) else warmup


def resolve_schedule(section: ScheduleSection, warmup_tokens: int, per_step: int) -> Schedule:
    """Return the trunk's schedule in steps; the cooldown belongs to the cell."""
    return Schedule(
        kind=section.kind,
        n_warmup_steps=round(warmup_tokens / per_step),
        min_lr_fraction=section.min_lr_fraction if section.kind in ("cosine", "linear") else None,
    )


def read_batch_size(experiment: Experiment) -> int:
    """Return the global batch as a number.

    Raises:
        ConfigError: it follows from the budget, and the budget from it.
    """
    batch = experiment.optim.global_batch_size
    if isinstance(batch, BatchRule):
        raise ConfigError(
            f'optim.global_batch_size={{ rule = "{batch.rule}" }}, follows from the tokens, and grid.steps from the batch; '
            "give grid.tokens, grid.flops or grid.tokens_per_param"
        )
    return batch


def resolve_size(experiment: Experiment, size: Size, data: DataRecord) -> ModelConfig:
    """Build the model of one size of the grid."""
    section = experiment.model.model_dump(exclude={"preset", "init_from"}, exclude_none=True)
    if section["parametrization"] == "standard":
        del section["parametrization"]
    try:
        return resolve_model(
            experiment.model.preset,
            **{**section, **size.model_dump(exclude_none=True)},
            vocab_size=data.vocab_size,
            seq_len=data.seq_len,
        )
    except SizeError as error:
        raise ConfigError(f"grid.sizes: {error}") from None


def resolve_budgets(experiment: Experiment, model: ModelConfig, section: Section | None = None) -> list[int]:
    """Return the requested tokens of each budget of the grid, or of another section with one budget. Units: tokens.

    Note: `tokens_per_param` counts all parameters (n_params); `flops` uses flops_per_token.
    """
    section = section or experiment.grid
    key = next(key for key in BUDGET_KEYS if getattr(section, key) is not None)
    given = getattr(section, key)
    values = given if isinstance(given, tuple) else (given,)
    if key == "tokens":
        return list(values)
    if key == "steps":
        return [steps * read_batch_size(experiment) * model.seq_len for steps in values]
    if key == "tokens_per_param":
        return [round(ratio * count_params(model).n_params) for ratio in values]
    return [round(flops / count_flops(model).flops_per_token) for flops in values]


def nearest_multiple(value: int, unit: int) -> int:
    """Return the multiple of `unit`, at least one unit, nearest to `value`."""
    return max(1, round(value / unit)) * unit


def round_to_steps(grid: GridSection, requested_tokens: int, per_step: int) -> int:
    """Round a budget to whole steps; refuse one that is under a step or missed by more than `MAX_ROUNDING`."""
    key = next(key for key in BUDGET_KEYS if getattr(grid, key) is not None)
    where = f"grid.{key}: a budget of {requested_tokens:,} tokens"
    step = f"one step (global_batch_size x seq_len = {per_step:,} tokens)"
    if requested_tokens < per_step:
        raise ConfigError(f"{where}, is smaller than {step}; use at least {per_step:,}")
    n_steps = round(requested_tokens / per_step)
    missed = abs(n_steps * per_step - requested_tokens) / requested_tokens
    if missed > MAX_ROUNDING:
        raise ConfigError(
            f"{where}, is missed by {missed:.1%} when rounded to whole steps of {per_step:,}; use {n_steps * per_step:,}"
        )
    return n_steps


def is_held_out_size(grid: GridSection, size: Size) -> bool:
    """Say whether `hold_out.sizes` names this size."""
    if grid.hold_out is None or grid.hold_out.sizes is None:
        return False
    return size == max(grid.sizes, key=lambda s: s.n_layer * s.d_model**2)
