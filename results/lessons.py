"""What published data sets teach about fits: each lesson is computed from the points, and written with its figure.

The points are read from a folder (`--fixtures`, or HARNESS_FIXTURES) that holds chinchilla, datablations, gadre_overtraining
and porian; they are not part of this repository. Sources: Besiroglu et al. 2024, arXiv 2404.10102 (Hoffmann et al. 2022,
figure 4, read off); Muennighoff et al. 2023, arXiv 2305.16264; Gadre et al. 2024, arXiv 2403.08540; Porian et al. 2024,
arXiv 2406.19146.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config import ConfigError
from results.descend import LOG_HUBER, MSE
from results.design import list_candidates, pick_cells
from results.fit import Fit, FitError, fit_chinchilla, fit_law
from results.holdout import score_hold_out
from results.laws import PUBLISHED, TIED, Chinchilla, FloatArray
from results.plot import Picture, write_pictures
from results.plot_lessons import (
    Mark,
    plot_designs,
    plot_filter,
    plot_hold_outs,
    plot_ladder,
    plot_over_training,
    plot_repeated,
)
from results.profiles import Profile, profile_parameter
from results.repeated import REPEATED
from results.uncertainty import estimate_spread, resample_runs

MUENNIGHOFF = {
    "E": float(np.exp(0.6254804)),
    "A": float(np.exp(6.255414)),
    "B": float(np.exp(7.3049974)),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}
MUENNIGHOFF_REPEATED = {"R_D": 15.387756, "R_N": 5.309743}
CUTS = (1e20, 2e20, 3e20, 5e20, 1e21, 2e21, 3e21)
PORIAN_STEPS = {  # what was mended, one after another: hparams, warmup, decay, param_count
    "Kaplan et al.'s set-up": ("base", "long", "kaplan", "kaplan"),
    "+ head counted": ("base", "long", "kaplan", "standard"),
    "+ warmup by size": ("base", "short", "kaplan", "standard"),
    "+ decay to the end": ("base", "short", "chinchilla", "standard"),
    "+ tuned rates": ("tuned", "short", "const", "standard"),
}
SHARES, N_RANDOM = (0.05, 0.1, 0.2), 15


@dataclass(frozen=True)
class Lesson:
    """One thing learned: a heading, what the numbers say, and a figure."""

    heading: str
    text: str
    picture: Picture


def read_points(folder: Path, name: str) -> pd.DataFrame:
    """Read one published table.

    Raises:
        ConfigError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; set HARNESS_FIXTURES to the folder of published data, or pass --fixtures")
    return pd.read_csv(path)


def load_chinchilla(folder: Path) -> pd.DataFrame:
    """Return the 245 points, lowest loss first."""
    points = read_points(folder, "chinchilla/svg_extracted_data.csv").rename(columns={"Model Size": "n_params"})
    points = points.assign(tokens=points["Training FLOP"] / 6 / points["n_params"], val_loss=points["loss"])
    return points.sort_values("loss", ignore_index=True)


def fit_points(points: pd.DataFrame) -> Fit:
    """Fit Chinchilla's law to points."""
    return fit_chinchilla(points["n_params"], points["tokens"], points["val_loss"])


def measure_objective(law: Chinchilla, points: pd.DataFrame) -> float:
    """Return the objective that the authors name, at given constants."""
    predicted = law.loss(points["n_params"], points["tokens"])
    return float(LOG_HUBER.sum(np.log(predicted / points["val_loss"].to_numpy())))


def learn_filter(folder: Path) -> Lesson:
    """Chinchilla: five of 245 points decide the exponent, and printed constants are not the minimum."""
    points = load_chinchilla(folder)
    dropped = list(range(26))
    fits = [fit_points(points.iloc[: len(points) - k]) for k in dropped]
    kept = points.iloc[:-5]
    spread = estimate_spread(resample_runs(fits[5], [f"{i:03}" for i in range(len(kept))]), lambda law: law.optimum_exponent)
    reached = {name: measure_objective(law, kept) for name, law in PUBLISHED.items()}
    a = [fit.constants.optimum_exponent for fit in fits]
    law = fits[5].constants
    return Lesson(
        "Five points of 245 move the exponent out of its interval",
        f"With all points of Chinchilla's figure 4 the best model grows as C^{a[0]:.3f}; without the five highest losses, the "
        f"rule of "
        f"Besiroglu et al., as C^{a[5]:.3f} (95% interval {float(spread.low):.3f} to {float(spread.high):.3f}, from luck alone). "
        f"Without them the minimum of the authors' objective is {fits[5].objective_value:.6e}, at E {law.E:.4f}, A {law.A:.1f}, "
        f"B {law.B:.0f}, alpha {law.alpha:.4f}, beta {law.beta:.4f}; constants in print reach "
        + " and ".join(f"{value:.4e} ({name}, as rounded)" for name, value in reached.items())
        + ". Report what was left out, the objective, and constants with enough digits.",
        plot_filter(dropped, a, (float(spread.low), float(spread.high))),
    )


def learn_hold_out(folder: Path) -> Lesson:
    """Chinchilla: the law predicts dearer cells about as well as a power law in compute."""
    points = load_chinchilla(folder).iloc[:-5]
    cells = {name: points[name].to_numpy(float) for name in ("n_params", "tokens", "val_loss")}
    scores = [score_hold_out(cells, cut) for cut in CUTS]
    return Lesson(
        "A law is worth its hold-out score, not its residuals",
        f"Fitted below a compute and scored above it, Chinchilla's law errs by {describe_range([one.mape for one in scores])}%; "
        f"a one-dimensional power law through the best losses so far by "
        f"{describe_range([one.power_law or np.nan for one in scores])}%, "
        f"the best loss seen by {describe_range([one.best_seen for one in scores])}%. Its skill against the better of the two is "
        f"{describe_range([one.skill for one in scores])}: on these points the second dimension buys the split of compute, "
        f"hardly a "
        "better loss.",
        plot_hold_outs(scores),
    )


def describe_range(values: list[float]) -> str:
    """Write the lowest and the highest."""
    return f"{min(values):.2f} to {max(values):.2f}"


def load_repeated(folder: Path) -> dict[str, FloatArray]:
    """Return the 182 runs behind the published constants of repeated text."""
    runs = read_points(folder, "datablations/datablations_runs.csv")
    kept = runs[runs["in_paper_fit"] == 1].rename(columns={"params": "n_params"})
    return {name: kept[name].to_numpy(float) for name in ("n_params", "tokens", "unique_tokens", "val_loss")}


def profile_repeated(folder: Path) -> tuple[Fit, Profile, float]:
    """Fit R_D and R_N beside the published five constants; return the fit, R_D's profile, and the printed constants' "
    "objective."""
    cells = load_repeated(folder)
    fit = fit_law(REPEATED, cells, fixed=MUENNIGHOFF)
    printed = [(MUENNIGHOFF | MUENNIGHOFF_REPEATED)[name] for name in REPEATED.parameters]
    predicted = REPEATED.predict(printed, **{name: cells[name] for name in REPEATED.inputs})
    reached = float(LOG_HUBER.sum(np.log(predicted / cells["val_loss"])))
    return fit, profile_parameter(fit, "R_D"), reached


def learn_repeated(folder: Path) -> Lesson:
    """Datablations: the value of repeated tokens has a lower bound and no upper one."""
    fit, profile, printed = profile_repeated(folder)
    return Lesson(
        "Repeated tokens keep value for at least about eight epochs; more the data do not say",
        f"The published R_D = {MUENNIGHOFF_REPEATED['R_D']:.1f} stands at a local minimum (objective {printed:.8f}). "
        f"The lowest is at R_D = {fit['R_D']:.1f}, R_N = {fit['R_N']:.2f} ({fit.objective_value:.8f}), "
        f"and the profile stays inside its 95% "
        f"threshold "
        f'from {profile.low:.1f} upward without end. {len(fit.basins)} minima lie within 1% of the best. Quote "R_D at least '
        f"about "
        f'{profile.low:.0f}", start from many places, and draw the profile.',
        plot_repeated(profile, fit, printed, MUENNIGHOFF_REPEATED["R_D"]),
    )


def load_gadre(folder: Path) -> pd.DataFrame:
    """Return the 104 over-trained runs, scored on C4."""
    runs = read_points(folder, "gadre_overtraining/gadre_runs.csv")
    return runs.rename(columns={"params": "n_params", "loss_c4_val": "val_loss"})


def fit_five(runs: pd.DataFrame) -> tuple[Fit, FloatArray]:
    """Fit the five small runs that the paper fits; return also the relative error in percent of every run of the data set."""
    small, tiny = runs["n_params"] < 1e9, runs["n_params"] < 2e7
    few = runs[(small & (runs["token_multiplier"] == 20)) | (tiny & (runs["token_multiplier"] == 320))]
    fit = fit_law(TIED, few, MSE)  # type: ignore[arg-type]
    predicted = TIED.predict(fit.params, n_params=runs["n_params"], tokens=runs["tokens"])
    return fit, 100 * (predicted / runs["val_loss"].to_numpy() - 1)


def learn_over_training(folder: Path) -> Lesson:
    """Gadre: five small runs predict far over-training, and the smallest runs worst."""
    errors = {str(name): (runs, fit_five(runs)[1]) for name, runs in load_gadre(folder).groupby("dataset")}
    large = {name: error[(runs["n_params"] > 1e9).to_numpy()] for name, (runs, error) in errors.items()}
    said = "; ".join(f"{name} {', '.join(f'{value:+.2f}' for value in values)}" for name, values in large.items())
    under = np.concatenate([np.abs(error[(runs["token_multiplier"] < 20).to_numpy()]) for runs, error in errors.values()])
    over = np.concatenate([np.abs(error[(runs["token_multiplier"] >= 20).to_numpy()]) for runs, error in errors.values()])
    return Lesson(
        "Five small runs predict a 1.4B model at 640 tokens per parameter; under-trained runs bend away",
        f"Fitted to five runs of up to 0.4B parameters, the tied law predicts the 1.4B (20 and 640 tokens per parameter) and "
        f"6.9B runs "
        f"with errors in percent of {said}. At 20 tokens per parameter or more the mean error over all runs is "
        f"{over.mean():.2f}%, "
        f"below that {under.mean():.2f}%: the smallest budgets do not lie on this law.",
        plot_over_training(errors),
    )


def learn_ladder(folder: Path) -> Lesson:
    """Porian: five choices that are no part of the law move the exponent from Kaplan's to Hoffmann's."""
    pairs = read_points(folder, "porian/porian_optimal_pairs.csv")
    printed = read_points(folder, "porian/porian_published_exponents.csv")
    marks = []
    for words, choice in PORIAN_STEPS.items():
        exponent = fit_exponent(select_step(pairs, choice))
        row = select_step(printed, choice).iloc[0]
        marks.append(Mark(words, exponent, float(row["a_lo"]), float(row["a_hi"])))
    return Lesson(
        "Choices outside the law move the exponent by more than ten intervals",
        "Porian et al. mend one choice of Kaplan et al.'s set-up after another, and the exponent of the best size goes "
        + " -> ".join(f"{mark.value:.3f}" for mark in marks)
        + f", each with a 95% interval of about {np.median([mark.high - mark.low for mark in marks]):.3f}. An interval from "
        f"luck alone "
        "says nothing about warmup, decay, head or tuning: they belong into the table, and into a specification curve.",
        plot_ladder(marks),
    )


def select_step(rows: pd.DataFrame, choice: tuple[str, str, str, str]) -> pd.DataFrame:
    """Return the rows on RefinedWeb made with these choices."""
    wanted = dict(zip(("hparams", "warmup", "decay", "param_count"), choice, strict=True))
    is_step = np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])
    kept: pd.DataFrame = rows[is_step & (rows["source"] == "summary_df")]  # RefinedWeb
    return kept


def fit_exponent(pairs: pd.DataFrame) -> float:
    """Fit ln N* against ln C, each budget weighted by its own uncertainty as in the paper."""
    pairs = pairs.dropna(subset=["n_star", "n_star_std"])
    slope, _ = np.polyfit(np.log(pairs["flops"]), np.log(pairs["n_star"]), 1, w=1 / pairs["n_star_std"])
    return float(slope)


@dataclass(frozen=True)
class Duel:
    """Cells chosen one by one against random ones for the same FLOPs. Units: share of the pool; mean errors in percent."""

    pool: str
    share: float
    chosen: float
    random: float  # the median of `N_RANDOM`


def iter_duels(folder: Path) -> Iterator[Duel]:
    """Choose cells of published pools, fit them, and predict the dearer cells; see `pick_cells`."""
    points = load_chinchilla(folder).iloc[:-5]
    pools = [("Chinchilla", points, (points["Training FLOP"] < 1e21).to_numpy())]
    pools += [
        (f"Gadre {name}", runs, (runs["n_params"] < 1e9).to_numpy()) for name, runs in load_gadre(folder).groupby("dataset")
    ]
    for name, cells, may in pools:
        draw = np.random.default_rng(0)
        for share in SHARES:
            yield Duel(name, share, *fight(cells[may], cells[~may], share, draw))


def fight(pool: pd.DataFrame, later: pd.DataFrame, share: float, draw: np.random.Generator) -> tuple[float, float]:
    """Return the error of cells chosen in three rounds, and the median error of random choices."""
    candidates, aims = (list_candidates(part["n_params"], part["tokens"]) for part in (pool, later))
    budget, law, taken = share * float(candidates.flops.sum()), PUBLISHED["Hoffmann et al. 2022"], list[int]()
    for stage in (0.25, 0.6, 1.0):
        taken += pick_cells(law, candidates, aims, stage * budget - float(candidates.flops[taken].sum()), taken=taken)
        law = fit_points(pool.iloc[taken]).constants
    randoms = [score_random(pool, later, candidates.flops, budget, draw) for _ in range(N_RANDOM)]
    return score(law, later), float(np.median(randoms))


def score_random(pool: pd.DataFrame, later: pd.DataFrame, flops: FloatArray, budget: float, draw: np.random.Generator) -> float:
    """Spend a budget on cells in random order, fit them, and score the fit; infinite where they support none."""
    taken = []
    for cell in draw.permutation(len(pool)):
        if flops[cell] <= budget:
            taken.append(int(cell))
            budget -= float(flops[cell])
    try:
        return score(fit_points(pool.iloc[taken]).constants, later)
    except FitError:
        return float("inf")


def score(law: Chinchilla, cells: pd.DataFrame) -> float:
    """Return the mean error of a law in percent of the loss."""
    return float(100 * np.mean(np.abs(law.loss(cells["n_params"], cells["tokens"]) / cells["val_loss"] - 1)))


def learn_design(folder: Path) -> Lesson:
    """Cells chosen for what they teach beat random ones, not always."""
    duels = list(iter_duels(folder))
    wins = sum(duel.chosen < duel.random for duel in duels)
    return Lesson(
        "Cells chosen for what they teach per FLOP beat random ones, mostly",
        f"At {', '.join(f'{share:.0%}' for share in SHARES)} of a published pool's FLOPs, cells chosen by `pick_cells` "
        f"predicted the "
        f"dearer cells better than the median of {N_RANDOM} random choices in {wins} of {len(duels)} cases. The constants of the "
        "choice were set after looking at these and other pools: a default, not a proof.",
        plot_designs([(f"{duel.pool}, {duel.share:.0%}", duel.chosen, duel.random) for duel in duels]),
    )


LESSONS: tuple[Callable[[Path], Lesson], ...] = (
    learn_filter,
    learn_ladder,
    learn_hold_out,
    learn_repeated,
    learn_over_training,
    learn_design,
)


def write_lessons(fixtures: Path, folder: Path) -> list[Path]:
    """Compute every lesson, and write README.md and the figures."""
    lessons = [learn(fixtures) for learn in LESSONS]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [path for path in write_pictures([lesson.picture for lesson in lessons], folder) if path.suffix == ".png"]
    for path in pictures:
        path.with_suffix(".svg").unlink()
    page = folder / "README.md"
    page.write_text(render_lessons(lessons))
    return [page, *pictures]


def render_lessons(lessons: list[Lesson]) -> str:
    """Write the page."""
    parts = [
        "# What the published data sets taught us",
        "Every number below is computed from published points by `python -m results lessons`; the points themselves stay with "
        "their "
        "authors (Hoffmann et al. 2022 as read off by Besiroglu et al. 2024; Muennighoff et al. 2023; Gadre et al. 2024; "
        "Porian et "
        "al. 2024).",
    ]
    for number, lesson in enumerate(lessons, start=1):
        parts += [f"## {number}. {lesson.heading}", lesson.text, f"![{lesson.picture.title}]({lesson.picture.name}.png)"]
        parts.append(f"*{lesson.picture.caption}*")
    parts.append("```bash\npython -m results lessons --to results/published/lessons\n```")
    return "\n\n".join(parts) + "\n"
