"""Two studies side by side: what was asked, what was found, and what of it may be compared at all."""

from collections.abc import Iterator

from results.claims import NOT_IDENTIFIED, list_claims
from results.study import Study
from results.uncertainty import Interval

NAMES = ("E", "alpha", "beta", "optimum_exponent")
# What must agree for two losses, or two exponents, to be about the same thing.
ALIKE = {
    "metric_id": "validation metric: losses do not compare, exponents may",
    "data_content_id": "training data",
    "tokenizer": "tokenizer: nats per token do not compare",
    "precision": "precision",
    "schedule": "learning-rate schedule",
    "parametrization": "parametrization",
    "code_hash": "version of the code",
    "device_name": "device",
}


def compare_studies(one: Study, other: Study) -> str:
    """Write two studies side by side."""
    rows = [("", one.name, other.name, ""), *iter_rows(one, other)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    differences = [*iter_differences(one, other)]
    told = ["", "What differs:", *(f"  - {text}" for text in differences)] if differences else ["", "Nothing recorded differs."]
    return "\n".join([*lines, *told, *iter_cells(one, other)])


def iter_rows(one: Study, other: Study) -> Iterator[tuple[str, str, str, str]]:
    """Give one line for each number: its name, both values, and whether they can be told apart."""
    yield "cells fitted", str(len(one.kept)), str(len(other.kept)), ""
    yield "law", one.choices.law.name, other.choices.law.name, ""
    yield "N counts", one.convention.name, other.convention.name, ""
    if one.fitted is None or other.fitted is None:
        yield "fit", one.refusal or "fitted", other.refusal or "fitted", ""
        return
    mine, theirs = ({claim.name: claim for claim in list_claims(study.fitted)} for study in (one, other) if study.fitted)
    for name in NAMES:
        if name in mine and name in theirs:
            found = judge_difference(one.fitted.intervals[name], other.fitted.intervals[name])
            said = [NOT_IDENTIFIED if claim.problem else claim.phrase for claim in (mine[name], theirs[name])]
            yield name, said[0], said[1], found


def judge_difference(one: Interval, other: Interval) -> str:
    """Say whether two numbers differ by more than their intervals, as independent estimates."""
    if not (one.identified and other.identified):
        return ""
    gap = other.estimate - one.estimate
    reach = ((one.high - one.estimate) ** 2 + (other.estimate - other.low) ** 2) ** 0.5
    if gap < 0:
        reach = ((one.estimate - one.low) ** 2 + (other.high - other.estimate) ** 2) ** 0.5
    return f"{gap:+.3g}, {'beyond' if abs(gap) > reach else 'within'} both intervals ({reach:.3g})"


def iter_differences(one: Study, other: Study) -> Iterator[str]:
    """Say each recorded condition in which the fitted cells differ."""
    for column, words in ALIKE.items():
        mine, theirs = (", ".join(sorted(map(str, study.kept[column].dropna().unique()))) for study in (one, other))
        if mine != theirs:
            yield f"{words}: {mine or 'not recorded'} | {theirs or 'not recorded'}"


def iter_cells(one: Study, other: Study) -> Iterator[str]:
    """Set cells that both studies trained beside each other: the same id is the same question."""
    columns = ["cell_id", "val_loss"]
    both = one.cells[columns].merge(other.cells[columns], on="cell_id", suffixes=("_one", "_other")).dropna()
    if len(both):
        gaps = both["val_loss_other"] - both["val_loss_one"]
        yield ""
        yield (
            f"{len(both)} cells stand in both: val_loss differs by {gaps.abs().mean():.2g} on average, at most "
            f"{gaps.abs().max():.2g} ({both['cell_id'].iloc[int(gaps.abs().to_numpy().argmax())]})."
        )
