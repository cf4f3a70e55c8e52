"""The learning rate: what each step uses, at the borders above all."""

from dataclasses import dataclass
from itertools import pairwise

import pytest

from harness.schedule import CooldownShape, Schedule, ScheduleKind, compute_lr


@dataclass(frozen=True)
class Branch:
    branch_step: int = 80
    n_cooldown_steps: int = 20
    cooldown_shape: CooldownShape | None = "sqrt"
    cooldown_min_lr_fraction: float | None = 0.0


def lr_at(step: int, kind: ScheduleKind = "wsd", floor: float | None = None, branch: Branch | None = None) -> float:
    return compute_lr(step, 2.0, Schedule(kind=kind, n_warmup_steps=10, min_lr_fraction=floor), 100, branch)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_warmup_rises_evenly_to_the_peak_and_never_starts_at_zero(kind: ScheduleKind) -> None:
    assert [lr_at(step, kind) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert lr_at(10, kind) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_would_reach_its_floor_one_step_after_the_last(kind: ScheduleKind) -> None:
    values = [lr_at(step, kind, floor=0.1) for step in range(10, 100)]
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0.2
    assert lr_at(100, kind, floor=0.1) == pytest.approx(0.2)


def test_cosine_is_halfway_in_the_middle() -> None:
    assert lr_at(55, "cosine") == pytest.approx(1.0)


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_cooldown_begins_at_the_peak_and_falls_every_step(shape: CooldownShape) -> None:
    branch = Branch(cooldown_shape=shape)
    values = [lr_at(step, branch=branch) for step in range(80, 100)]
    assert values[0] == lr_at(79) == 2.0
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] > 0
    assert lr_at(100, branch=branch) == pytest.approx(0.0)


def test_a_cell_without_cooldown_stays_on_the_trunk() -> None:
    assert lr_at(50, "cosine", branch=Branch(n_cooldown_steps=0, cooldown_shape=None)) == lr_at(50, "cosine")
