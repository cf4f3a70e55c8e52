"""Experiment -> frozen plan: every run and cell fully resolved, nothing left to derive. No torch."""

import hashlib
import itertools
import sys
from datetime import UTC, datetime
from pathlib import Path

from data_prep.sampler import WindowSampler
from data_prep.shards import Manifest, check_sizes, load_manifest
from harness.config import BUDGET_KEYS, BatchRule, ConfigError, Experiment, LrRule, Size, parse_experiment, set_key
from harness.records import CellRecord, DataRecord, How, Optim, Plan, Role, RunRecord, What, hash_record
from harness.schedule import Schedule
from harness.zero import check_engine, list_cautions
from model.parametrization import BATCH_RULES, LR_RULES, Scale
from model.size import ModelConfig, SizeError, count_flops, count_params, resolve_model

DEFAULT_COOLDOWN_FRACTION = 0.2  # Hägele et al. 2024, section 4: 10 to 20% of the steps match a full cosine
MAX_ROUNDING = 0.02  # a budget missed by more than this fraction after rounding to whole steps is refused
AXIS_SECTIONS = ("model", "optim", "schedule")
VARIANT_BUDGETS = tuple(f"grid.{key}" for key in BUDGET_KEYS)


def plan_experiment(experiment: Experiment) -> Plan:
    """Resolve an experiment into runs and cells.

    Raises:
        ConfigError: an impossible or unsound combination.
        DataError: the data directory is not prepared or not whole.
        SizeError: a shape that cannot be built.
    """
    manifest = load_manifest(Path(experiment.data.dir))
    check_sizes(Path(experiment.data.dir), manifest)
    data = describe_data(experiment, manifest)
    seeds = experiment.grid.seeds or (experiment.seed,)
    runs: dict[str, RunRecord] = {}
    origins: dict[str, tuple[Experiment, Size]] = {}  # cell_id -> what it was made from
    for size, variant, seed in itertools.product(experiment.grid.sizes, iter_variants(experiment), seeds):
        budgets = resolve_budgets(variant, resolve_size(variant, size, data))
        held_out = is_held_out_size(experiment, size)
        cells = add_cells(runs, variant, data, size, seed, budgets, "held_out" if held_out else "grid")
        origins.update({cell.cell_id: (variant, size) for cell in cells})
    runs = mark_held_out_budgets(experiment, runs)
    if experiment.grid.repeats is not None:
        fitted = [cell for run in runs.values() for cell in run.cells if cell.role == "grid"]
        if not fitted:
            raise ConfigError("grid.repeats: every cell is held out, so none can be repeated; drop repeats or hold out less")
        cheapest = min(fitted, key=lambda cell: cell.flops)
        variant, size = origins[cheapest.cell_id]
        for seed in range(max(seeds) + 1, max(seeds) + 1 + experiment.grid.repeats.n):
            add_cells(runs, variant, data, size, seed, [cheapest.requested_tokens], "repeat")
    return Plan(
        experiment=experiment.name,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        source=experiment.model_dump(mode="json", exclude_none=True),
        data=data,
        runs=tuple(runs.values()),
    )


def describe_data(experiment: Experiment, manifest: Manifest) -> DataRecord:
    """Read what the plan needs to know of the prepared data."""
    seq_len, data_dir = experiment.data.seq_len, experiment.data.dir
    train, val = manifest.splits["train"], manifest.splits["val"]
    sampler = WindowSampler(n_tokens=train.tokens, seq_len=seq_len, seed=0)
    if val.tokens < seq_len + 1:
        raise ConfigError(
            f"{data_dir}: data.seq_len={seq_len}, is longer than the validation split of {val.tokens:,} tokens allows; "
            f"use at most {val.tokens - 1} or prepare a larger validation split"
        )
    stride = experiment.eval.stride or seq_len
    if stride > seq_len:
        raise ConfigError(f"eval.stride={stride}, leaves tokens unscored; use at most data.seq_len={seq_len}")
    metric = {
        "val_shards": [shard.sha256 for shard in val.shards],
        "val_tokens": val.tokens,
        "seq_len": seq_len,
        "stride": stride,
        "precision": experiment.precision,
    }
    return DataRecord(
        dir=str(Path(data_dir).resolve()),
        content_id=manifest.content_id,
        source=manifest.source.label,
        is_fallback=manifest.source.is_fallback,
        tokenizer=manifest.tokenizer.kind,
        vocab_size=manifest.vocab_size,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        val_bytes=val.text_bytes,
        seq_len=seq_len,
        n_windows=sampler.n_windows,
        epoch_tokens=sampler.epoch_tokens,
        metric_id=hash_record(metric)[:16],
    )


def iter_variants(experiment: Experiment) -> list[Experiment]:
    """Return one experiment per listed variant and combination of the calibration axes (just this one where there are none)."""
    grid = experiment.grid
    for key in grid.axes:
        if key.split(".")[0] not in AXIS_SECTIONS or "." not in key:
            raise ConfigError(f"grid.axes: {key}, is not an axis; use a key of {', '.join(AXIS_SECTIONS)}, such as optim.lr")
    for key in itertools.chain.from_iterable(grid.variants):
        if key not in VARIANT_BUDGETS and (key.split(".")[0] not in AXIS_SECTIONS or "." not in key):
            allowed = ", ".join([*AXIS_SECTIONS, *VARIANT_BUDGETS])
            raise ConfigError(f"grid.variants: {key}, cannot vary; use a key of {allowed}, such as optim.lr")
    variants = []
    for together, values in itertools.product(grid.variants or ({},), list(itertools.product(*grid.axes.values()))):
        table = experiment.model_dump(exclude_none=True)
        for key, value in [*together.items(), *zip(grid.axes, values, strict=True)]:
            set_key(table, key, value, where="grid.axes" if key in grid.axes else "grid.variants")
        variants.append(parse_experiment(table, where="grid.variants" if together else "grid.axes"))
    return variants


def apply_rules(experiment: Experiment, model: ModelConfig, requested_tokens: int) -> Experiment:
    """Put numbers where the file has rules for the learning rate or the batch."""
    optim, flops = experiment.optim, count_flops(model)
    if not isinstance(optim.lr, LrRule) and not isinstance(optim.global_batch_size, BatchRule):
        return experiment
    params = count_params(model)
    scale = Scale(
        n_params_non_embedding=max(1, params.n_params_non_embedding),
        n_params_with_head=max(1, params.n_params_non_embedding + params.head_matrix),
        tokens=requested_tokens,
        flops_per_token_non_embedding=max(1, flops.flops_per_token - flops.head),
    )
    numbers: dict[str, float | int] = {}
    if isinstance(optim.lr, LrRule):
        numbers["lr"] = optim.lr.factor * LR_RULES[optim.lr.rule](scale)
    if isinstance(optim.global_batch_size, BatchRule):
        rule = optim.global_batch_size
        sequences = rule.factor * BATCH_RULES[rule.rule](scale) / model.seq_len
        numbers["global_batch_size"] = nearest_multiple(round(sequences), rule.multiple_of)
    return experiment.model_copy(update={"optim": optim.model_copy(update=numbers)})


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


def resolve_budgets(experiment: Experiment, model: ModelConfig) -> list[int]:
    """Return the requested tokens of each budget for one model. Units: tokens.

    Note: `tokens_per_param` counts all parameters (n_params); `flops` uses flops_per_token.
    """
    grid = experiment.grid
    if grid.tokens is not None:
        return list(grid.tokens)
    if grid.steps is not None:
        return [steps * read_batch_size(experiment) * model.seq_len for steps in grid.steps]
    if grid.tokens_per_param is not None:
        return [round(ratio * count_params(model).n_params) for ratio in grid.tokens_per_param]
    assert grid.flops is not None
    return [round(flops / count_flops(model).flops_per_token) for flops in grid.flops]


def add_cells(
    runs: dict[str, RunRecord],
    experiment: Experiment,
    data: DataRecord,
    size: Size,
    seed: int,
    budgets: list[int],
    role: Role,
) -> list[CellRecord]:
    """Add the cells of one size and seed to `runs`: one shared trunk under wsd, else a run for each budget."""
    model = resolve_size(experiment, size, data)
    added, ruled = [], experiment
    for requested_tokens in budgets:
        experiment = apply_rules(ruled, model, requested_tokens)
        n_steps = round_to_steps(experiment, requested_tokens)
        check_epochs(experiment, data, requested_tokens)
        what = resolve_what(experiment, data, model, seed, n_steps)
        check_engine(what, experiment.engine)
        run_id = f"{model.size}-s{seed}-{hash_record(what.model_dump(mode='json'))[:10]}"
        cell = resolve_cell(experiment, data, what, run_id, requested_tokens, n_steps, role)
        run = runs.get(run_id) or RunRecord(
            experiment=experiment.name,
            run_id=run_id,
            size=model.size,
            seed=seed,
            what=what,
            how=resolve_how(experiment, data),
            data=data,
            cells=(),
        )
        if cell.cell_id not in {other.cell_id for other in run.cells}:
            cells = sorted([*run.cells, cell], key=lambda c: c.n_steps)
            runs[run_id] = run.model_copy(update={"cells": tuple(cells)})
        added.append(cell)
    return added


def resolve_what(experiment: Experiment, data: DataRecord, model: ModelConfig, seed: int, n_steps: int) -> What:
    """Fix what a run is; under wsd the same for every budget."""
    schedule = experiment.schedule
    decays = schedule.kind in ("cosine", "linear")
    tokens_per_step = read_batch_size(experiment) * data.seq_len
    return What(
        model=model,
        precision=experiment.precision,
        data_content_id=data.content_id,
        seed=seed,
        data_seed=seed if experiment.data.seed is None else experiment.data.seed,
        optim=Optim(**experiment.optim.model_dump()),
        schedule=Schedule(
            kind=schedule.kind,
            n_warmup_steps=round(schedule.warmup_tokens / tokens_per_step),
            min_lr_fraction=schedule.min_lr_fraction if decays else None,
        ),
        eval_stride=experiment.eval.stride or data.seq_len,
        n_steps=None if schedule.kind == "wsd" else n_steps,
        init_sha256=hash_weights(experiment.model.init_from),
    )


def find_weights(init_from: str) -> Path:
    """Return the file of weights that `model.init_from` names: itself, or model.safetensors in that folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(init_from)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model.init_from={init_from!r}, there is no model.safetensors; name a finished cell's folder, a GPT-2 folder in "
            "Hugging Face format, or such a file"
        )
    return path.resolve()


def resolve_init(experiment: Experiment) -> str | None:
    """Return the full path of the weights to start from, None where they are drawn."""
    return str(find_weights(experiment.model.init_from)) if experiment.model.init_from is not None else None


def hash_weights(init_from: str | None) -> str | None:
    """Return the SHA-256 of the weights to start from: what they are, not where they lie, is part of the id."""
    if init_from is None:
        return None
    with find_weights(init_from).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_how(experiment: Experiment, data: DataRecord) -> How:
    """Collect what may change between attempts."""
    engine = experiment.engine
    check_micro_batch(read_batch_size(experiment), engine.micro_batch_size, engine.world_size or 1)
    return How(
        data_dir=data.dir,
        engine=engine,
        eval=experiment.eval,
        track=experiment.track,
        init_from=resolve_init(experiment),
    )


def check_micro_batch(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Return the sequences per rank and micro-step; every rank has the same share of every step.

    Raises:
        ConfigError: the global batch does not divide evenly.
    """
    if micro_batch_size is None:
        if global_batch_size % world_size:
            raise ConfigError(
                f"optim.global_batch_size={global_batch_size} is not a multiple of world_size={world_size}; "
                f"use {nearest_multiple(global_batch_size, world_size)}"
            )
        return global_batch_size // world_size
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        raise ConfigError(
            f"optim.global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
            f"{micro_batch_size} x {world_size} = {unit}; use {nearest_multiple(global_batch_size, unit)}"
        )
    return micro_batch_size


def nearest_multiple(value: int, unit: int) -> int:
    """Return the multiple of `unit`, at least one unit, nearest to `value`."""
    return max(1, round(value / unit)) * unit


def round_to_steps(experiment: Experiment, requested_tokens: int) -> int:
    """Round a budget to whole steps; refuse one that is under a step or missed by more than `MAX_ROUNDING`."""
    per_step = read_batch_size(experiment) * experiment.data.seq_len
    key = next(key for key in BUDGET_KEYS if getattr(experiment.grid, key) is not None)
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


def check_epochs(experiment: Experiment, data: DataRecord, tokens: int) -> None:
    """Refuse a budget that repeats the data more often than data.max_epochs."""
    epochs = tokens / data.epoch_tokens
    if epochs > experiment.data.max_epochs:
        raise ConfigError(
            f"data.max_epochs={experiment.data.max_epochs:g}, a budget of {tokens:,} tokens is {epochs:.2f} epochs of "
            f"the {data.epoch_tokens:,} training tokens; repeated data bends a law: lower the budget, or raise "
            "data.max_epochs"
        )


def resolve_cell(
    experiment: Experiment, data: DataRecord, what: What, run_id: str, requested_tokens: int, n_steps: int, role: Role
) -> CellRecord:
    """Fix one cell: budget, branch point, and every count that the table will hold."""
    model, schedule = what.model, experiment.schedule
    is_wsd = schedule.kind == "wsd"
    n_cooldown = max(1, round((schedule.cooldown_fraction or DEFAULT_COOLDOWN_FRACTION) * n_steps)) if is_wsd else 0
    if what.schedule.n_warmup_steps > n_steps - n_cooldown:
        raise ConfigError(
            f"schedule.warmup_tokens={schedule.warmup_tokens:,}, is {what.schedule.n_warmup_steps} steps of the {n_steps} "
            f"of the budget of {requested_tokens:,} tokens, which leaves no plateau; lower it or drop that budget"
        )
    shape, floor = (schedule.cooldown_shape or "sqrt", schedule.min_lr_fraction) if is_wsd else (None, None)
    budget = {
        "n_steps": n_steps,
        "n_cooldown_steps": n_cooldown,
        "cooldown_shape": shape,
        "cooldown_min_lr_fraction": floor,
    }
    tokens = n_steps * what.optim.global_batch_size * model.seq_len
    digest = hash_record({"what": what.model_dump(mode="json"), "budget": budget})[:10]
    params, flops_per_token = count_params(model), count_flops(model).flops_per_token
    return CellRecord(
        cell_id=f"{model.size}-s{what.seed}-{format_tokens(tokens)}-{digest}",
        run_id=run_id,
        experiment=experiment.name,
        role=role,
        size=model.size,
        n_layer=model.n_layer,
        n_head=model.n_head,
        d_model=model.d_model,
        seq_len=model.seq_len,
        vocab_size=model.vocab_size,
        seed=what.seed,
        data_seed=what.data_seed,
        n_params=params.n_params,
        n_params_non_embedding=params.n_params_non_embedding,
        n_params_matmul=params.n_params_matmul,
        flops_per_token=flops_per_token,
        requested_tokens=requested_tokens,
        tokens=tokens,
        n_steps=n_steps,
        branch_step=n_steps - n_cooldown,
        n_cooldown_steps=n_cooldown,
        cooldown_shape=shape,
        cooldown_min_lr_fraction=floor,
        flops=flops_per_token * tokens,
        flops_6nd=6 * params.n_params * tokens,
        flops_6nd_non_embedding=6 * params.n_params_non_embedding * tokens,
        unique_tokens=min(tokens, data.epoch_tokens),
        epochs=tokens / data.epoch_tokens,
        lr=what.optim.lr,
        global_batch_size=what.optim.global_batch_size,
        schedule=schedule.kind,
        precision=what.precision,
        stage=model.stage,
        parametrization=model.parametrization,
    )


def is_held_out_size(experiment: Experiment, size: Size) -> bool:
    """Say whether `hold_out.sizes` names this size."""
    hold_out = experiment.grid.hold_out
    if hold_out is None or hold_out.sizes is None:
        return False
    return size == max(experiment.grid.sizes, key=lambda s: s.n_layer * s.d_model**2)


def mark_held_out_budgets(experiment: Experiment, runs: dict[str, RunRecord]) -> dict[str, RunRecord]:
    """Give the role held_out to the largest budget of each size where `hold_out.budgets` asks for it."""
    hold_out = experiment.grid.hold_out
    if hold_out is None or hold_out.budgets is None:
        return runs
    largest: dict[str, int] = {}
    for run in runs.values():
        largest[run.size] = max([largest.get(run.size, 0), *(cell.n_steps for cell in run.cells)])
    return {
        run_id: run.model_copy(
            update={
                "cells": tuple(
                    cell.model_copy(update={"role": "held_out"}) if cell.n_steps == largest[run.size] else cell
                    for cell in run.cells
                )
            }
        )
        for run_id, run in runs.items()
    }


def format_tokens(tokens: int) -> str:
    """Write a token count for an id: 1,048,576 -> 1.05M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{unit}"
    return str(tokens)


def print_plan(plan: Plan) -> None:
    """Print one line per cell, and the totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=f"{plan.experiment}: {len(plan.cells)} cells in {len(plan.runs)} runs", title_justify="left")
    table.add_column("cell", no_wrap=True)
    for column in ("parameters", "tokens", "asked for", "steps", "cooldown", "epochs", "FLOPs"):
        table.add_column(column, justify="right")
    table.add_column("role")
    for cell in plan.cells:
        table.add_row(
            cell.cell_id,
            f"{cell.n_params:,}",
            f"{cell.tokens:,}",
            f"{cell.requested_tokens:,}",
            f"{cell.n_steps:,}",
            f"{cell.n_cooldown_steps:,}",
            f"{cell.epochs:.2f}",
            f"{cell.flops:.2e}",
            cell.role,
        )
    console.print(table)
    alone, shared = sum(cell.flops for cell in plan.cells), sum(run.flops for run in plan.runs)
    print(f"training FLOPs {shared:.3g}; {alone:.3g} without shared trunks ({shared / alone:.2f}x)")
    repeated = sum(cell.epochs > 1 for cell in plan.cells)
    print(f"data: {plan.data.source}, {plan.data.train_tokens:,} training tokens; {repeated} cells repeat some of it")
    for caution in list_cautions(plan):
        print(f"caution: {caution}", file=sys.stderr)
