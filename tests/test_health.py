"""Steps that are not sound are left out and counted; losses that jump are counted, alike after a resume."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_experiment

from harness.checkpoint import TrainState
from harness.ending import DivergedError
from harness.health import MIN_WINDOW, SPIKE_WINDOW, judge_step
from harness.plan import plan_experiment
from harness.records import RunRecord


@pytest.fixture
def run(data_dir: Path) -> RunRecord:
    return plan_experiment(tiny_experiment(data_dir)).runs[0]


def settled(n_losses: int = MIN_WINDOW) -> TrainState:
    return TrainState(step=n_losses, recent_losses=tuple(2.0 + 0.01 * (n % 2) for n in range(n_losses)))


def test_a_sound_step_is_taken_and_remembered(run: RunRecord) -> None:
    state, is_sound = judge_step(TrainState(), 3.0, True, run)
    assert (is_sound, state.train_loss, state.recent_losses, state.skipped_steps) == (True, 3.0, (3.0,), 0)
    for _ in range(2 * SPIKE_WINDOW):
        state, _ = judge_step(state, 2.0, True, run)
    assert len(state.recent_losses) == SPIKE_WINDOW


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0])
def test_a_bad_number_anywhere_is_left_out_up_to_a_limit(run: RunRecord, loss: float) -> None:
    """A finite mean loss too: the gradient of some rank was not finite."""
    run, state = run.with_engine(max_skipped_steps=2), settled()
    for n in (1, 2):
        state, is_sound = judge_step(state, loss, False, run)
        assert (is_sound, state.skipped_steps) == (False, n)
        assert state.recent_losses == settled().recent_losses, "not measured against"
        assert state.train_loss == (loss if math.isfinite(loss) else None)
    with pytest.raises(DivergedError, match="max_skipped_steps=2 is used up"):
        judge_step(state, loss, False, run)


def test_a_jump_of_the_loss_is_counted_and_the_step_taken(run: RunRecord) -> None:
    state, is_sound = judge_step(settled(), 2.1, True, run)
    assert (is_sound, state.loss_spikes, state.skipped_steps) == (True, 1, 0)
    assert judge_step(settled(), 2.02, True, run)[0].loss_spikes == 0
    assert judge_step(settled(MIN_WINDOW - 1), 9.0, True, run)[0].loss_spikes == 0, "early losses tell nothing"


def test_a_jump_is_left_out_where_that_is_asked_for_and_makes_another_run(run: RunRecord, data_dir: Path) -> None:
    optim = {"lr": 3e-3, "global_batch_size": 8, "skip_spikes": True}
    skipping = plan_experiment(tiny_experiment(data_dir, optim=optim)).runs[0]
    assert skipping.run_id != run.run_id
    state, is_sound = judge_step(settled(), 2.1, True, skipping)
    assert (is_sound, state.loss_spikes, state.skipped_steps) == (False, 1, 1)
    again = judge_step(replace(settled(), train_s=9.0), 2.1, True, skipping)
    assert again[1] == is_sound, "it follows from what the checkpoint holds"
