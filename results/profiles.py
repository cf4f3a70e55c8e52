"""Profile likelihood: how far a parameter may move, all others refitted, before the data object.

An interval from a profile knows sides that stay open, which a bootstrap shows as wild percentiles.
"""

from dataclasses import dataclass

import numpy as np

from results.descend import descend, find_bounds
from results.fit import Fit, find_threshold
from results.laws import FloatArray, theta_of_params

N_STEPS, N_REFINED = 60, 20
FIRST_STEP = 1e-3


@dataclass(frozen=True)
class Profile:
    """A parameter's values, in their order, and the least objective at each.

    Shapes: values, objective (m,). low, high: where the objective passes the threshold; infinite (or 0) where it never does.
    """

    parameter: str
    values: FloatArray
    objective: FloatArray
    threshold: float
    low: float
    high: float


def profile_parameter(fit: Fit, parameter: str, level: float = 0.95) -> Profile:
    """Move one parameter away from the fit, refit the others, and find where the objective passes its threshold.

    Note: the threshold takes cells to be independent (`fit.find_threshold`); with trunks the interval is too narrow.
    """
    index = fit.law.index(parameter)
    threshold = find_threshold(fit.residuals, fit.objective_value, fit.objective, level)
    centre, (low, high) = float(fit.theta[index]), (float(bound[index]) for bound in find_bounds(fit.centred))
    steps = np.geomspace(FIRST_STEP, 1.0, N_STEPS)
    below, above = centre - steps * (centre - low), centre + steps * (min(high, centre + 20.0) - centre)
    places = np.concatenate([below[::-1], [centre], above])
    objective = descend_at(fit, index, places)
    ends = []
    for sign, outward in ((-1.0, slice(N_STEPS, None, -1)), (1.0, slice(N_STEPS, None))):
        end = find_crossing(fit, index, places[outward], objective[outward], threshold)
        ends.append(sign * np.inf if end is None else end)
    is_log = bool(fit.law.is_log[index])
    values, (left, right) = (np.exp(places), np.exp(ends)) if is_log else (places, np.array(ends))
    return Profile(parameter, values, objective, threshold, float(left) if np.isfinite(ends[0]) else 0.0, float(right))


def descend_at(fit: Fit, index: int, places: FloatArray) -> FloatArray:
    """Return the least objective with one entry of theta held at each place, started from every basin of the fit."""
    starts = [theta_of_params(basin.params, fit.centred) for basin in fit.basins]
    theta, free = np.repeat([starts], len(places), axis=0), np.repeat(fit.free[None], len(places) * len(starts), axis=0)
    theta[:, :, index], free[:, index] = places[:, None], False
    theta = theta.reshape(-1, theta.shape[2])
    reached = descend(fit.centred, theta, fit.centred.log_loss, fit.objective, fit.weights, free, tolerance=1e-9).objective
    return np.asarray(reached.reshape(len(places), -1).min(axis=1))


def find_crossing(fit: Fit, index: int, places: FloatArray, objective: FloatArray, threshold: float) -> float | None:
    """Return where the objective, followed outward, passes the threshold for good; None where it does not."""
    inside = np.flatnonzero(objective <= threshold)
    last = int(inside[-1])
    if last == len(places) - 1:
        return None
    finer = np.linspace(places[last], places[last + 1], N_REFINED)
    reached = np.maximum.accumulate(descend_at(fit, index, finer))
    return float(np.interp(threshold, reached, finer))
