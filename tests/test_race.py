"""The race beside the published recipe is fair: the same objective, the same cells; and it is won."""

import numpy as np

from results.descend import LOG_HUBER
from results.laws import Chinchilla
from results.race import N_STARTS, START_GRID, render_race, run_race, simulate_points, weigh_misses


def test_both_sides_minimise_the_same_objective() -> None:
    cells = simulate_points()
    law = Chinchilla(1.8, 400, 2000, 0.34, 0.36)
    params = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    logs = np.log([cells[name] for name in ("n_params", "tokens", "val_loss")])
    ours = LOG_HUBER.sum(np.log(law.loss(cells["n_params"], cells["tokens"])) - logs[2])
    assert weigh_misses(params, logs) == float(ours) or abs(weigh_misses(params, logs) / float(ours) - 1) < 1e-12
    assert np.prod([axis.size for axis in START_GRID]) == N_STARTS


def test_the_recipe_is_beaten_at_an_objective_no_worse() -> None:
    race = run_race(simulate_points(), n_starts=6, n_bootstraps=4, rounds=1)
    assert race.fit.objective <= race.recipe_fit.objective * (1 + 1e-12)
    assert race.bootstraps.objective <= race.recipe_bootstraps.objective * (1 + 1e-12)
    assert race.recipe_fit.cpu_s > 100 * race.fit.cpu_s, "measured above 500; a fifth of that is a mistake and no slow machine"
    assert race.recipe_bootstraps.cpu_s > 3 * race.bootstraps.cpu_s, "measured above 8"
    assert "| fit | here" in render_race(race)
