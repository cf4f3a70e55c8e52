"""The learning rate at each step. No torch.

`step` counts from 0: the value at `step` is the one that the optimiser step from `step` to `step + 1` uses.
"""

import math
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

ScheduleKind = Literal["constant", "cosine", "linear", "wsd"]
CooldownShape = Literal["sqrt", "linear"]


class Schedule(BaseModel):
    """A trunk's schedule as resolved; the cooldown belongs to the cell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ScheduleKind
    n_warmup_steps: int
    min_lr_fraction: float | None  # of cosine and linear


class Cooldown(Protocol):
    """What a cell says of its cooldown."""

    @property
    def branch_step(self) -> int: ...
    @property
    def n_cooldown_steps(self) -> int: ...
    @property
    def cooldown_shape(self) -> CooldownShape | None: ...
    @property
    def cooldown_min_lr_fraction(self) -> float | None: ...


def compute_lr(step: int, peak: float, schedule: Schedule, n_steps_horizon: int | None, cooldown: Cooldown | None) -> float:
    """Return the learning rate on the trunk, or in a cell's cooldown where one is given and has steps."""
    if cooldown is not None and cooldown.n_cooldown_steps:
        return peak * compute_cooldown_factor(step, cooldown)
    return peak * compute_trunk_factor(step, schedule, n_steps_horizon)


def compute_trunk_factor(step: int, schedule: Schedule, n_steps_horizon: int | None) -> float:
    """Return the fraction of the peak: linear warmup, then constant, or a decay to the horizon (cosine and linear)."""
    n_warmup_steps, floor = schedule.n_warmup_steps, schedule.min_lr_fraction or 0.0
    if step < n_warmup_steps:
        return (step + 1) / n_warmup_steps
    if schedule.kind in ("constant", "wsd"):
        return 1.0
    assert n_steps_horizon is not None, "a decaying schedule has a horizon"
    progress = (step - n_warmup_steps) / max(1, n_steps_horizon - n_warmup_steps)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * remaining


def compute_cooldown_factor(step: int, cooldown: Cooldown) -> float:
    """Return the fraction of the peak in a wsd cooldown; the first step of a branch still has the peak.

    Source: Hägele et al. 2024 (arXiv 2405.18392), section 3: 1 - sqrt(progress) did better than linear.
    """
    progress, floor = (
        (step - cooldown.branch_step) / cooldown.n_cooldown_steps,
        cooldown.cooldown_min_lr_fraction or 0.0,
    )
    remaining = 1.0 - (math.sqrt(progress) if cooldown.cooldown_shape == "sqrt" else progress)
    return floor + (1.0 - floor) * remaining
