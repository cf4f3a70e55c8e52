"""The page that `fit` prints, and the same as JSON: the law, its numbers, how they were made, what to doubt, what is left out."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from results.claims import NOT_IDENTIFIED, describe_seed_noise, list_claims, list_excluded, wrap_line
from results.diagnose import (
    Diagnosis,
    correlate_parameters,
    describe_hold_outs,
    describe_residuals,
    describe_sloppy,
    describe_specifications,
    diagnose,
    iter_gate,
)
from results.fit import Fit, FitError
from results.frontier import METHODS, Frontier, fit_envelope, fit_isoflop
from results.laws import jacobian
from results.profiles import profile_parameter
from results.study import CONVENTIONS, LEGEND, LOSSES, Fitted, Study, describe_study
from results.uncertainty import COVERAGE, LEVEL, METHOD

MAX_EXCLUDED_SHOWN = 20


def diagnose_study(study: Study) -> Diagnosis | None:
    """Diagnose a fit, where there is one and its law has a best split to be diagnosed."""
    if study.fitted is None or not study.fitted.fit.law.is_chinchilla:
        return None
    return diagnose(study.kept, study.fitted, study.convention)


def fit_frontiers(study: Study) -> dict[str, Frontier | str]:
    """Ask the estimators that need no surface for the best size at each compute; where one cannot say, why."""
    if study.fitted is None:
        return {}
    kept = study.kept
    cells = {name: kept[name].to_numpy(float) for name in ("tokens", "val_loss")}
    cells["n_params"] = kept[study.convention.column].to_numpy(float)
    cells["flops"] = (kept["flops"] if kept["flops"].notna().all() else kept["flops_6nd"]).to_numpy(float)
    found: dict[str, Frontier | str] = {}
    for name in ("envelope", *METHODS):
        try:
            found[name] = fit_envelope(cells) if name == "envelope" else fit_isoflop(cells, name)
        except FitError as error:
            found[name] = str(error)
    return found


def render_page(study: Study, diagnosis: Diagnosis | None, frontiers: Mapping[str, Frontier | str]) -> str:
    """Write the page."""
    law = study.choices.law
    lines = [f"{study.name}: {len(study.kept)} of {len(study.cells)} cells fitted", "", f"  {law.equation}", f"  {law.source}"]
    lines += [f"  {LOSSES[study.choices.loss]}; {LEGEND}", f"  N counts {study.convention.words} ({study.convention.column})"]
    if study.fitted is None:
        lines += ["", f"No law was fitted: {study.refusal}"]
    else:
        lines += ["", *render_claims(study.fitted)]
    for title, items in iter_sections(study, diagnosis, frontiers):
        lines += ["", title, *(f"  - {item}" for item in items)] if items else []
    lines += [] if list_excluded(study.cells) else ["", "Excluded cells: none"]
    return "\n".join(wrapped for line in lines for wrapped in wrap_line(line))


def iter_sections(
    study: Study, diagnosis: Diagnosis | None, frontiers: Mapping[str, Frontier | str]
) -> Iterator[tuple[str, list[str]]]:
    """Give each section's title and items."""
    if study.fitted is not None:
        yield "How it was fitted", render_method(study.fitted)
        yield "What to doubt", render_doubts(study.fitted, diagnosis)
        yield "Predicting dearer cells from cheaper ones", [*iter_hold_outs(study, diagnosis)]
        yield "Other choices", [*iter_choices(study, study.fitted, diagnosis, frontiers)]
    yield "Seed noise", [describe_seed_noise(study).removeprefix("Seed noise: ")]
    yield "Warnings", list(study.warnings)
    yield "Notes", list(study.notes)
    yield "Excluded cells", render_excluded(study)


def render_claims(fitted: Fitted) -> list[str]:
    """Write one line for each number."""
    rows = [(f"  {'':<58}{'value':>12}   {LEVEL:.0%} interval")]
    for claim in list_claims(fitted):
        if claim.problem:
            rows.append(f"  {claim.meaning:<58}{NOT_IDENTIFIED}: {claim.problem}")
        else:
            rows.append(f"  {claim.meaning:<58}{claim.value:>12}   {claim.interval}")
    return rows


def render_method(fitted: Fitted) -> list[str]:
    """Say how the fit and its intervals were made."""
    fit, resamples = fitted.fit, fitted.resamples
    unit = "% of the loss" if fit.objective.in_logs else ""
    spread = f"{(100 if fit.objective.in_logs else 1) * fit.residuals.std():.2g}{unit}"
    weighed = "" if np.all(fit.weights == 1) else ", weighted by seed noise"
    fixed = [f"held fixed: {', '.join(f'{name} {fit[name]:.6g}' for name in fit.fixed)}"] if fit.fixed else []
    return [
        *fixed,
        f"objective: {describe_objective(fit)}{weighed} = {fit.objective_value:.7g}; residuals: standard deviation {spread}",
        f"search: {fit.n_starts} starts, {fit.n_polished} polished; minima within 1% of the best: {len(fit.basins)}",
        f"intervals: {METHOD}; {resamples.n_runs} runs, {len(resamples.laws)} refits, "
        f"{resamples.share_unconverged:.1%} of them not converged",
        f"{COVERAGE}",
    ]


def describe_objective(fit: Fit) -> str:
    """Say what was minimised."""
    residual = "ln L fitted - ln L observed" if fit.objective.in_logs else "L fitted - L observed"
    if np.isfinite(fit.objective.delta):
        return f"sum of Huber (delta {fit.objective.delta:g}) of {residual}"
    return f"half the sum of squares of {residual}"


def render_doubts(fitted: Fitted, diagnosis: Diagnosis | None) -> list[str]:
    """Write what speaks against the numbers."""
    fit = fitted.fit
    gate = list(iter_gate(fitted, correlate_parameters(jacobian(fit.theta, fit.centred)[:, fit.free])))
    found = [*gate, *iter_bounds(fit)] or ["nothing speaks against the numbers being identified"]
    return found if diagnosis is None else [*found, describe_sloppy(diagnosis), *describe_residuals(diagnosis)]


def iter_bounds(fit: Fit) -> Iterator[str]:
    """Say what is known of a parameter that is open to one side."""
    for name, side in (open_side.split() for open_side in fit.open_sides):
        profile = profile_parameter(fit, name)
        bound = profile.low if side == "up" else profile.high
        yield f"{name} is at {'least' if side == 'up' else 'most'} {bound:.2g} (95%, by its profile), not {fit[name]:.3g}"


def iter_hold_outs(study: Study, diagnosis: Diagnosis | None) -> Iterator[str]:
    """Write how well the law predicts cells that it did not see."""
    held = study.cells[(study.cells["role"] == "held_out") & study.cells["val_loss"].notna()]
    if len(held) and study.fitted is not None:
        fit = study.fitted.fit
        inputs = {name: held[study.convention.column if name == "n_params" else name].to_numpy(float) for name in fit.law.inputs}
        misses = 100 * (fit.law.predict(fit.params, **inputs) / held["val_loss"].to_numpy(float) - 1)
        yield (
            f"{len(held)} held-out cell(s): mean error {np.abs(misses).mean():.2f}% (bias {misses.mean():+.2f}%, "
            f"largest {misses[np.argmax(np.abs(misses))]:+.2f}%)"
        )
    if diagnosis is not None:
        yield f"{next(describe_hold_outs(diagnosis))}"


def iter_choices(
    study: Study, reported: Fitted, diagnosis: Diagnosis | None, frontiers: Mapping[str, Frontier | str]
) -> Iterator[str]:
    """Write how the answer moves with what could have been done otherwise."""
    for name, fitted in ({study.convention.name: reported} | study.others).items():
        claims = {claim.name: claim for claim in list_claims(fitted)} if fitted is not None else {}
        said = [f"{key} {claims[key].value}" for key in ("alpha", "beta", "optimum_exponent") if key in claims]
        if said:
            yield f"N counts {CONVENTIONS[name].words}: {', '.join(said).replace('optimum_exponent', 'a')}"
    if study.with_excluded is not None:
        params = ", ".join(
            f"{name} {v:.4g}" for name, v in study.with_excluded.law.name_params(study.with_excluded.params).items()
        )
        yield f"with the excluded cells ({study.with_excluded.n_cells} cells): {params}"
    by_words: dict[str, list[str]] = {}
    for name, frontier in frontiers.items():
        by_words.setdefault(describe_frontier(frontier), []).append("envelope" if name == "envelope" else f"isoFLOP {name}")
    for words, names in by_words.items():
        yield f"best size by {', '.join(names)}: {words}"
    if diagnosis is not None:
        yield f"{next(describe_specifications(diagnosis))}"


def describe_frontier(frontier: Frontier | str) -> str:
    """Say the exponent of an estimator, or why there is none."""
    if isinstance(frontier, str):
        return f"none; {frontier}"
    law, n_refused = frontier.n_params, len(frontier.refused)
    refused = f"; {n_refused} budget(s) show none" if n_refused and frontier.method != "envelope" else ""
    return f"a {law.exponent:.3f} ({law.low:.3f} to {law.high:.3f}), {len(frontier.optima)} computes{refused}"


def render_excluded(study: Study) -> list[str]:
    """List the cells that were left out, each with its reason."""
    excluded = list_excluded(study.cells)
    rows = [f"{cell_id}: {reason}" for cell_id, reason in excluded[:MAX_EXCLUDED_SHOWN]]
    more = len(excluded) - len(rows)
    return [*rows, f"and {more} more: python -m results table writes them all"] if more else rows


def describe_page(study: Study, diagnosis: Diagnosis | None, frontiers: Mapping[str, Frontier | str]) -> dict[str, Any]:
    """Return everything on the page, and more, as plain values; the fields stand in results/FORMAT.md."""
    return describe_study(study) | {
        "diagnosis": None if diagnosis is None else describe_diagnosis(diagnosis),
        "frontiers": {name: {"problem": found} if isinstance(found, str) else asdict(found) for name, found in frontiers.items()},
    }


def describe_diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as plain values."""
    tests = {name: getattr(diagnosis, name) for name in ("structure", "lack_of_fit")}
    return {
        "gate": list(diagnosis.gate),
        "sloppy": describe_sloppy(diagnosis),
        "correlations": diagnosis.correlations.tolist(),
        "hold_outs": [asdict(one) for one in diagnosis.hold_outs],
        "influences": [asdict(one) for one in diagnosis.influences],
        "specifications": [asdict(one) for one in diagnosis.specifications],
        **{name: None if test is None else asdict(test) for name, test in tests.items()},
    }
