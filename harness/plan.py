"""Experiment -> frozen plan: every run and cell fully resolved, nothing left to derive. No torch."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.sampler import WindowSampler
from data_prep.shards import check_sizes, load_manifest
from harness.config import ConfigError, Experiment
from harness.grid import PlannedCell, list_cells, nearest_multiple
from harness.lint import lint_plan, refuse_errors
from harness.records import CellRecord, DataRecord, How, Plan, RunRecord, What, hash_record
from harness.zero import check_engine
from model.size import count_flops, count_params

DEFAULT_COOLDOWN_FRACTION = 0.2  # Hägele et al. 2024, section 4: 10 to 20% of the steps match a full cosine
ON_PAPER = "on paper"  # the content id of data that does not exist: such a plan cannot be trained


def plan_experiment(experiment: Experiment) -> Plan:
    """Resolve an experiment into runs and cells.

    Raises:
        ConfigError: an impossible or unsound combination.
        DataError: the data directory is not prepared or not whole.
        SizeError: a shape that cannot be built.
    """
    data = describe_data(experiment)
    planned = list_cells(experiment, data)
    weights = {path: hash_weights(path) for path in {cell.experiment.model.init_from for cell in planned}}
    runs: dict[str, tuple[PlannedCell, What, dict[str, CellRecord]]] = {}
    for wanted in planned:
        check_epochs(experiment, data, wanted.requested_tokens)
        what = resolve_what(wanted, data, weights[wanted.experiment.model.init_from])
        check_engine(what, wanted.experiment.engine)
        document = what.model_dump(mode="json")
        run_id = f"{wanted.model.size}-s{wanted.seed}-{hash_record(document)[:10]}"
        cell = resolve_cell(wanted, data, what, document, run_id)
        cells = runs.setdefault(run_id, (wanted, what, {}))[2]
        if cells.setdefault(cell.cell_id, cell).role != cell.role:
            raise ConfigError(
                f"grid.extra: {cell.cell_id}, is planned twice, as {cells[cell.cell_id].role} and as {cell.role}; drop one"
            )
    plan = Plan(
        experiment=experiment.name,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        source=experiment.model_dump(mode="json", exclude_none=True),
        data=data,
        runs=tuple(
            RunRecord(
                experiment=experiment.name,
                run_id=run_id,
                size=wanted.model.size,
                seed=wanted.seed,
                what=what,
                how=resolve_how(wanted, data),
                data=data,
                cells=tuple(sorted(cells.values(), key=lambda cell: cell.n_steps)),
            )
            for run_id, (wanted, what, cells) in runs.items()
        ),
    )
    findings = lint_plan(plan, experiment)
    refuse_errors(findings)
    return plan.model_copy(update={"findings": findings})


def describe_data(experiment: Experiment) -> DataRecord:
    """Read what the plan needs to know of the data.

    Raises:
        ConfigError: the validation split does not hold a window, or the stride leaves tokens out.
    """
    seq_len, section, stride = experiment.data.seq_len, experiment.data, experiment.eval.stride or experiment.data.seq_len
    if stride > seq_len:
        raise ConfigError(f"eval.stride={stride}, leaves tokens unscored; use at most data.seq_len={seq_len}")
    facts = describe_directory(section.dir) if section.dir is not None else describe_paper(experiment)
    if facts["val_tokens"] < seq_len + 1:
        raise ConfigError(
            f"{section.dir or 'data.on_paper'}: data.seq_len={seq_len}, is longer than the validation split of "
            f"{facts['val_tokens']:,} tokens allows; use at most {facts['val_tokens'] - 1} or prepare a larger validation split"
        )
    sampler = WindowSampler(n_tokens=facts["train_tokens"], seq_len=seq_len, seed=0)
    metric = {
        "val_shards": facts.pop("val_shards"),
        "val_tokens": facts["val_tokens"],
        "seq_len": seq_len,
        "stride": stride,
        "precision": experiment.precision,
    }
    return DataRecord(
        **facts,
        seq_len=seq_len,
        n_windows=sampler.n_windows,
        epoch_tokens=sampler.epoch_tokens,
        metric_id=hash_record(metric)[:16],
    )


def describe_directory(data_dir: str) -> dict[str, Any]:
    """Return the facts of a prepared directory."""
    manifest = load_manifest(Path(data_dir))
    check_sizes(Path(data_dir), manifest)
    train, val = manifest.splits["train"], manifest.splits["val"]
    return {
        "dir": str(Path(data_dir).resolve()),
        "content_id": manifest.content_id,
        "source": manifest.source.label,
        "is_fallback": manifest.source.is_fallback,
        "tokenizer": manifest.tokenizer.kind,
        "vocab_size": manifest.vocab_size,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
        "val_bytes": val.text_bytes,
        "val_shards": [shard.sha256 for shard in val.shards],
    }


def describe_paper(experiment: Experiment) -> dict[str, Any]:
    """Return the facts of data that does not exist."""
    paper = experiment.data.on_paper
    assert paper is not None, "the schema asks for a directory or figures"
    return {
        "dir": "",
        "content_id": ON_PAPER,
        "source": "figures on paper, not a text",
        "is_fallback": False,
        "tokenizer": "none",
        "vocab_size": paper.vocab_size,
        "train_tokens": paper.train_tokens,
        "val_tokens": paper.val_tokens,
        "val_bytes": round(paper.val_tokens * paper.bytes_per_token),
        "val_shards": [],
    }


def resolve_what(wanted: PlannedCell, data: DataRecord, init_sha256: str | None) -> What:
    """Fix what a run is; where budgets share a trunk, the same for each of them."""
    experiment = wanted.experiment
    return What(
        model=wanted.model,
        precision=experiment.precision,
        data_content_id=data.content_id,
        seed=wanted.seed,
        data_seed=wanted.seed if experiment.data.seed is None else experiment.data.seed,
        optim=wanted.optim,
        schedule=wanted.schedule,
        eval_stride=experiment.eval.stride or data.seq_len,
        n_steps=None if wanted.shares_trunk else wanted.n_steps,
        init_sha256=init_sha256,
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


def resolve_how(wanted: PlannedCell, data: DataRecord) -> How:
    """Collect what may change between attempts."""
    experiment = wanted.experiment
    check_micro_batch(wanted.optim.global_batch_size, experiment.engine.micro_batch_size, experiment.engine.world_size or 1)
    return How(
        data_dir=data.dir,
        engine=experiment.engine,
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


def check_epochs(experiment: Experiment, data: DataRecord, tokens: int) -> None:
    """Refuse a budget that repeats the data more often than data.max_epochs."""
    epochs = tokens / data.epoch_tokens
    if epochs > experiment.data.max_epochs:
        raise ConfigError(
            f"data.max_epochs={experiment.data.max_epochs:g}, a budget of {tokens:,} tokens is {epochs:.2f} epochs of "
            f"the {data.epoch_tokens:,} training tokens; repeated data bends a law: lower the budget, or raise "
            "data.max_epochs"
        )


def resolve_cell(wanted: PlannedCell, data: DataRecord, what: What, document: dict[str, Any], run_id: str) -> CellRecord:
    """Fix one cell: budget, branch point, and every count that the table will hold."""
    model, schedule, n_steps = what.model, wanted.experiment.schedule, wanted.n_steps
    is_wsd, per_step = what.schedule.kind == "wsd", what.optim.global_batch_size * model.seq_len
    n_cooldown = max(1, round((schedule.cooldown_fraction or DEFAULT_COOLDOWN_FRACTION) * n_steps)) if is_wsd else 0
    if what.schedule.n_warmup_steps > n_steps - n_cooldown:
        raise ConfigError(
            f"schedule.warmup_tokens={what.schedule.n_warmup_steps * per_step:,}, is {what.schedule.n_warmup_steps} steps "
            f"of the {n_steps} of the budget of {wanted.requested_tokens:,} tokens, which leaves no plateau; "
            "lower it or drop that budget"
        )
    shape, floor = (schedule.cooldown_shape or "sqrt", schedule.min_lr_fraction) if is_wsd else (None, None)
    budget = {
        "n_steps": n_steps,
        "n_cooldown_steps": n_cooldown,
        "cooldown_shape": shape,
        "cooldown_min_lr_fraction": floor,
    }
    tokens = n_steps * per_step
    digest = hash_record({"what": document, "budget": budget})[:10]
    params, flops_per_token = count_params(model), count_flops(model).flops_per_token
    return CellRecord(
        cell_id=f"{model.size}-s{what.seed}-{format_tokens(tokens)}-{digest}",
        run_id=run_id,
        experiment=wanted.experiment.name,
        role=wanted.role,
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
        requested_tokens=wanted.requested_tokens,
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
        schedule=what.schedule.kind,
        precision=what.precision,
        stage=model.stage,
        parametrization=model.parametrization,
    )


def format_tokens(tokens: int) -> str:
    """Write a token count for an id: 1,048,576 -> 1.05M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{unit}"
    return str(tokens)
