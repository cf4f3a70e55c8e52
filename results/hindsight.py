"""What the plan said, beside what came: the lint's doubts, the forecast and the clock, branches and cells from scratch."""

import math
from collections.abc import Hashable, Iterator
from typing import Any

import pandas as pd

from harness.records import Plan

ALIKE = ("size", "planned_tokens", "seed", "lr", "global_batch_size", "precision")


def list_doubts(plan: Plan) -> list[str]:
    """Return what the lint warned of."""
    return [f"{finding.rule} ({finding.field}): {finding.message}" for finding in plan.findings]


def compare_forecast(plan: Plan, cells: pd.DataFrame) -> list[str]:
    """Say how the measured seconds in training steps compare with the forecast ones, over the finished cells."""
    if plan.forecast is None:
        return ["No forecast was stored with the plan."]
    forecast = plan.forecast
    where = f"{forecast.basis}, {forecast.n_devices} x {forecast.device}"
    said = f"Forecast ({where}): {forecast.device_hours:.3g} device-hours for the whole plan."
    expected = {cell.cell_id: cell.train_s for cell in forecast.cells}
    done = cells[(cells["state"] == "done") & cells["train_s"].notna() & cells["cell_id"].isin(expected)]
    ratios = sorted(float(row["train_s"]) / expected[row["cell_id"]] for row in done.to_dict("records"))
    if not ratios:
        return [said, "No finished cell has a measured time to set beside it."]
    middle = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return [
        said,
        f"Seconds in training steps, actual over forecast, {len(ratios)} finished cells: geometric mean {middle:.2f}, from "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}.",
    ]


def compare_scratch(cells: pd.DataFrame) -> Iterator[str]:
    """Say for each finished cell from scratch how it ended beside the branch of the same size, budget and seed."""
    done = cells[(cells["state"] == "done") & cells["val_loss"].notna()]
    branches = {key_of(row): float(row["val_loss"]) for row in done[done["role"] == "grid"].to_dict("records")}
    for row in done[done["role"] == "scratch"].to_dict("records"):
        branch = branches.get(key_of(row))
        if branch is not None:
            yield (
                f"{row['cell_id']}, from scratch under {row['schedule']}: val_loss {row['val_loss']:.4f}, "
                f"{row['val_loss'] - branch:+.4f} against its branch."
            )


def key_of(row: dict[Hashable, Any]) -> tuple[Any, ...]:
    """Return what a cell from scratch has in common with its branch."""
    return tuple(row[name] for name in ALIKE)
