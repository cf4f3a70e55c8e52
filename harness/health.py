"""Whether a step is fit to be taken: what is not finite is left out and counted, what is unusual is counted. No torch."""

import math
import statistics
from dataclasses import replace

from harness.checkpoint import TrainState
from harness.ending import DivergedError
from harness.records import RunRecord

SPIKE_WINDOW = 128  # losses that a spike is measured against
SPIKE_SIGMAS = 6.0
MIN_WINDOW = 32  # fewer tell nothing; early losses fall too fast


def is_spike(recent: tuple[float, ...], loss: float) -> bool:
    """Say whether a loss is far above those before it.

    Source: OLMo-core's rule, six standard deviations over the last 128 steps.
    """
    if len(recent) < MIN_WINDOW:
        return False
    mean = statistics.fmean(recent)
    variance = statistics.fmean([(one - mean) ** 2 for one in recent])  # statistics.pstdev is exact, and 20 times as slow
    return loss > mean + SPIKE_SIGMAS * math.sqrt(variance)


def judge_step(state: TrainState, loss: float, is_finite: bool, run: RunRecord) -> tuple[TrainState, bool]:
    """Return the state with what this step's loss says of the run's health, and whether the update is to be made.

    Note: every rank judges the same numbers, so all decide alike.
    Raises:
        DivergedError: more steps had to be left out than allowed.
    """
    spike = is_finite and is_spike(state.recent_losses, loss)
    state = replace(state, train_loss=loss if math.isfinite(loss) else None, loss_spikes=state.loss_spikes + spike)
    if is_finite and not (spike and run.what.optim.skip_spikes):
        return replace(state, recent_losses=(*state.recent_losses, loss)[-SPIKE_WINDOW:]), True
    limit, skipped = run.how.engine.max_skipped_steps, state.skipped_steps + 1
    if skipped > limit:
        raise DivergedError(f"step {state.step + 1}: loss={loss:g}, no sound update; max_skipped_steps={limit} is used up")
    return replace(state, skipped_steps=skipped), False
