"""What could confound a study, found in its plan: every field that varies is meant to, follows from a rule, or is an error.

Errors stop the plan; warnings, those of confounds.py among them, are stored in it, printed, and told in the report. No torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.config import ConfigError, Experiment
from harness.confounds import RULES, name_cells
from harness.grid import list_rules
from harness.records import CellRecord, Finding, Plan, RunRecord

# What a grid is made of: a size, a budget, a seed.
GRID_FIELDS = ("model.n_layer", "model.n_head", "model.d_model", "model.d_ff", "seed", "data_seed", "n_steps")
# Besides itself, a key decides these.
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "model.preset": ("model.",),
    "model.parametrization": ("model.base_",),
    "model.init_from": ("init_sha256",),
    "optim.global_batch_size": ("schedule.n_warmup_steps",),
    "schedule.kind": ("schedule.min_lr_fraction", "schedule.cooldown_"),
    "schedule.warmup_tokens": ("schedule.n_warmup_steps",),
}
# Differences that the literature knows as confounds, were they meant or not.
CONFOUNDS = {
    "model.init_std": "different initialisation",
    "model.residual_init": "different initialisation",
    "model.parametrization": "different initialisation and learning rates by layer",
    "init_sha256": "different initialisation",
    "precision": "different numerics",
    "engine.zero_stage": "different numerics between ZeRO stages",
    "engine.kind": "different numerics between engines",
    "data_content_id": "different text",
    "tokenizer": "different tokenizer: losses are per token and do not compare",
    "model.vocab_size": "different tokenizer: losses are per token and do not compare",
}
HOW_FIELDS = ("kind", "zero_stage")  # of the engine: how, and yet able to change a result


def lint_plan(plan: Plan, experiment: Experiment) -> tuple[Finding, ...]:
    """Return everything found, errors first."""
    found = [*find_differences(plan, experiment), *(finding for rule in RULES for finding in rule(plan))]
    return tuple(sorted(found, key=lambda finding: finding.severity != "error"))


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Stop at the first error.

    Raises:
        ConfigError: there is one.
    """
    for finding in findings:
        if finding.severity == "error":
            raise ConfigError(f"{finding.field}: {finding.message}")


def find_differences(plan: Plan, experiment: Experiment) -> Iterator[Finding]:
    """Yield an error for each field that differs between cells and neither varies on purpose nor follows from a rule."""
    meant, derived = list_meant(experiment), list_derived(experiment)
    for field, values in collect_fields(plan).items():
        if len(values) == 1:
            continue
        shown = ", ".join(f"{value!r} in {name_cells(cells)}" for value, cells in list(values.items())[:3])
        ids = tuple(cell.cell_id for cells in values.values() for cell in cells)
        if not matches(field, (*meant, *derived)):
            what = CONFOUNDS.get(field, "not meant to vary and follows from no rule")
            message = f"differs between cells ({shown}): {what}; make it equal, or name it in grid.axes or grid.variants"
            yield Finding(severity="error", rule="must_be_equal", field=field, cells=ids, message=message)
        elif field in CONFOUNDS:
            message = f"differs between cells ({shown}): {CONFOUNDS[field]}; do not fit them together"
            yield Finding(severity="warning", rule="confound", field=field, cells=ids, message=message)


def sort_fields(plan: Plan, experiment: Experiment) -> dict[str, list[str]]:
    """Sort every resolved field into meant to vary, derived by a rule, and equal in all cells."""
    derived = list_derived(experiment)
    kinds: dict[str, list[str]] = {"meant to vary": [], "derived by a rule": [], "equal": []}
    for field, values in collect_fields(plan).items():
        kind = "equal" if len(values) == 1 else "derived by a rule" if matches(field, derived) else "meant to vary"
        kinds[kind].append(field)
    return kinds


def list_meant(experiment: Experiment) -> tuple[str, ...]:
    """Return the fields (or beginnings of fields, ending in a dot or dash) that the file says vary."""
    grid = experiment.grid
    keys = [*grid.axes, *(key for variant in grid.variants for key in variant)]
    if grid.scratch is not None and grid.scratch.schedule != "wsd":
        keys.append("schedule.kind")
    return (*GRID_FIELDS, *keys, *(field for key in keys for field in CONSEQUENCES.get(key, ())))


def list_derived(experiment: Experiment) -> tuple[str, ...]:
    """Return the fields that follow from a rule."""
    keys = [key for key, _ in list_rules(experiment)]
    return (*keys, *(field for key in keys for field in CONSEQUENCES.get(key, ())))


def matches(field: str, names: Sequence[str]) -> bool:
    """Say whether a field is one of the names, or begins with one that ends in a dot or an underscore."""
    return any(field == name or (name[-1] in "._" and field.startswith(name)) for name in names)


def collect_fields(plan: Plan) -> dict[str, dict[Any, list[CellRecord]]]:
    """Return, for every resolved field, its values and the cells that have each."""
    fields: dict[str, dict[Any, list[CellRecord]]] = {}
    for run in plan.runs:
        for field, value in iter_fields(run):
            fields.setdefault(field, {}).setdefault(value, []).extend(run.cells)
        for cell in run.cells:
            fields.setdefault("schedule.cooldown_shape", {}).setdefault(cell.cooldown_shape, []).append(cell)
            floor = fields.setdefault("schedule.cooldown_min_lr_fraction", {})
            floor.setdefault(cell.cooldown_min_lr_fraction, []).append(cell)
    return fields


def iter_fields(run: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield what fixes a run, flat: model.d_model, optim.lr, seed, ...; and what of the engine may change a result."""
    for name, value in run.what.model_dump().items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value
    yield "tokenizer", run.data.tokenizer
    engine = run.how.engine.model_dump()
    yield from ((f"engine.{key}", engine[key]) for key in HOW_FIELDS if key in engine)
