"""The reproducibility checklist of a scaling study, filled from records; what no record says is "not recorded".

Source of the headings: Li et al. 2025, "(Mis)Fitting: A Survey of Scaling Laws", arXiv 2502.18969, its appendix's checklist.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from harness.records import Plan
from results.page import describe_objective
from results.study import Study
from results.uncertainty import METHOD

NOT_RECORDED = "not recorded"


def fill_checklist(study: Study, plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each part of the checklist with its questions and answers."""
    return [
        ("Functional form", [*iter_form(study)]),
        ("Training set-up", [*iter_training(study, plan)]),
        ("Data collection", [*iter_collection(study)]),
        ("Fitting", [*iter_fitting(study)]),
    ]


def iter_form(study: Study) -> Iterator[tuple[str, str]]:
    """Say what was fitted."""
    law = study.choices.law
    yield "equation", law.equation
    yield "source", law.source
    yield "variables", ", ".join(law.inputs)
    yield "parameters that are fitted", ", ".join(law.parameters)
    yield "N counts", f"{study.convention.words} ({study.convention.column})"
    yield "loss", study.choices.loss


def iter_training(study: Study, plan: Plan) -> Iterator[tuple[str, str]]:
    """Say what was trained, and how."""
    cells = study.cells
    yield "models", f"{cells['size'].nunique()} sizes, {cells['run_id'].nunique()} runs, {len(cells)} cells"
    for column, words in (("n_params", "parameters"), ("planned_tokens", "tokens"), ("n_layer", "layers"), ("d_model", "width")):
        yield words, range_of(cells[column])
    for column, words in (("seed", "seeds"), ("lr", "learning rates"), ("global_batch_size", "sequences per step")):
        yield words, values_of(cells[column])
    first = plan.runs[0].what if plan.runs else None
    yield "optimiser", NOT_RECORDED if first is None else f"{first.optim.kind}, weight decay {first.optim.weight_decay:g}"
    yield "schedule", values_of(cells["schedule"])
    ends = (cells["n_cooldown_steps"] > 0).all() or (cells["schedule"] != "constant").all()
    yield "schedule ends at the budget", "yes, in every cell" if ends else "no"
    yield "warm-up steps", NOT_RECORDED if first is None else str(first.schedule.n_warmup_steps)
    yield "precision", values_of(cells["precision"])
    yield "data and tokenizer", f"{plan.data.source}; {plan.data.tokenizer}, {plan.data.vocab_size:,} tokens"
    yield "FLOPs", "counted by component (attention included) beside 6 N D; C in the law is 6 N D"


def iter_collection(study: Study) -> Iterator[tuple[str, str]]:
    """Say which numbers were taken from the runs."""
    cells = study.cells
    yield "checkpoints", "the last of each cell; no intermediate one"
    yield "loss is measured on", f"the whole validation split ({values_of(cells['val_tokens_scored'])} tokens)"
    yield "smoothing", "none"
    yield "cells left out", f"{int(cells['excluded'].sum())} of {len(cells)}, each with its reason in the table"
    yield "repeated text", f"{int((cells['epochs'] > 1).sum())} cells read some text more than once"


def iter_fitting(study: Study) -> Iterator[tuple[str, str]]:
    """Say how the law was fitted."""
    if study.fitted is None:
        yield "fit", f"none: {study.refusal}"
        return
    fit, resamples = study.fitted.fit, study.fitted.resamples
    yield "objective", f"{describe_objective(fit)} = {fit.objective_value:.6g}"
    yield "weights", "equal" if (fit.weights == 1).all() else "by seed noise"
    yield "starts", f"{fit.n_starts}, of which {fit.n_polished} were polished"
    yield "minima within 1% of the best", str(len(fit.basins))
    yield "intervals", f"{METHOD}; {len(resamples.laws)} refits, {resamples.share_unconverged:.1%} not converged"
    yield "code", values_of(study.cells["code_hash"])
    yield "commit", values_of(study.cells["commit"])


def values_of(values: "pd.Series[Any]") -> str:
    """Write the distinct values of a column, or that there is none."""
    found = sorted(values.dropna().unique())
    shown = ", ".join(f"{value:,}" if isinstance(value, int) else f"{value}" for value in found[:8])
    return (f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown) or NOT_RECORDED


def range_of(values: "pd.Series[Any]") -> str:
    """Write the range of a column, or that there is none."""
    known = values.dropna()
    return f"{known.min():,} to {known.max():,}" if len(known) else NOT_RECORDED
