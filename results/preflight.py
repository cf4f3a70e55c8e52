"""Will this grid answer the question? Synthetic studies on the plan's own cells, fitted as real ones would be.

Losses are drawn from a prior law, with noise that is partly shared by the cells of a trunk. What comes back is compared with
what went in: bias, and the interval that holds 95% of the studies. A bias is the estimator's; a width is the grid's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.config import ConfigError
from harness.records import Plan
from harness.runs import read_json
from results.descend import LOG_HUBER, LOG_MSE, Objective
from results.design import SIGMA, ask, forecast_sd, list_candidates
from results.fit import FitError, fit_chinchilla, fit_many
from results.frontier import METHODS, Valley, split_budgets
from results.laws import CHINCHILLA, PUBLISHED, Chinchilla, FloatArray

PRIOR = PUBLISHED["Besiroglu et al. 2024"]
TERMS = (0.36, 0.34)  # nats: what that law's two terms are in the middle of its data (1e9 parameters, 2e10 tokens)
N_STUDIES, SHARED = 300, 0.5
LEVEL = (2.5, 50.0, 97.5)
MIN_SIZES = 5  # of an isoFLOP slice: as many as a cubic needs
WIDE = 2.0  # a factor: a quantity whose interval spans more is not answered by the grid


@dataclass(frozen=True)
class Grid:
    """A plan's cells as a fit will see them. Shapes: n_params, tokens, flops (n,); trunk (n,): which trunk each cell shares.

    counts: how many runs each cell stands for; 1 but in a design with fractions.
    """

    n_params: FloatArray
    tokens: FloatArray
    trunk: npt.NDArray[np.intp]
    held_out: tuple[tuple[str, float, float], ...] = ()  # name, parameters and tokens of cells that are predicted
    counts: FloatArray = field(default_factory=lambda: np.ones(1))

    @property
    def flops(self) -> FloatArray:
        """Compute as 6 N D."""
        return 6 * self.n_params * self.tokens


@dataclass(frozen=True)
class Outcome:
    """What the studies made of one quantity. All in the quantity's own unit, or as a factor of the truth where `is_factor`."""

    estimator: str
    quantity: str
    is_factor: bool
    truth: float
    bias: float  # of the median
    low: float
    high: float
    sd: float  # of the quantity, or of its logarithm
    problem: str = ""


@dataclass(frozen=True)
class Preflight:
    """The outcomes on a grid, and in words what it does not identify."""

    law: Chinchilla
    flops: float
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]


def read_grid(plan: Plan) -> Grid:
    """Take from a plan what will be fitted, and what will be predicted.

    Raises:
        FitError: nothing is to be fitted.
    """
    fitted = [cell for cell in plan.cells if cell.role in ("grid", "repeat")]
    if not fitted:
        raise FitError(f"{plan.experiment}: no cell is fitted; give some cells another role than held_out or scratch")
    _, trunk = np.unique([cell.run_id for cell in fitted], return_inverse=True)
    held_out = tuple((cell.cell_id, float(cell.n_params), float(cell.tokens)) for cell in plan.cells if cell.role == "held_out")
    n, d = (np.array([float(getattr(cell, name)) for cell in fitted]) for name in ("n_params", "tokens"))
    return Grid(n, d, trunk, held_out)


def choose_prior(grid: Grid, vocab_size: int) -> Chinchilla:
    """Return the published law, or where that gives losses above chance, its exponents with terms of usual size in this grid."""
    if float(np.max(PRIOR.loss(grid.n_params, grid.tokens))) < np.log(vocab_size):
        return PRIOR
    n, d = (float(np.exp(np.log(values).mean())) for values in (grid.n_params, grid.tokens))
    alpha, beta = PRIOR.alpha, PRIOR.beta
    return Chinchilla(E=PRIOR.E, A=TERMS[0] * n**alpha, B=TERMS[1] * d**beta, alpha=alpha, beta=beta)


def load_prior(path: Path) -> Chinchilla:
    """Read the law of an earlier study's fit.json.

    Raises:
        ConfigError: there is none.
    """
    try:
        fit = read_json(path)["fit"]
        return Chinchilla(**{name: float(fit["law"][name]) for name in ("E", "A", "B", "alpha", "beta")})
    except (FileNotFoundError, KeyError, TypeError):
        raise ConfigError(f"--prior={path}, holds no fitted law; give the results/fit.json of an earlier study") from None


def draw_losses(law: Chinchilla, grid: Grid, n_studies: int, sigma: float, shared: float, seed: int) -> FloatArray:
    """Draw ln L of every cell in every study. Shapes: (n_studies, n).

    Note: `shared` is the correlation between cells of one trunk.
    """
    draw = np.random.default_rng(seed)
    luck = draw.normal(size=(n_studies, int(grid.trunk.max()) + 1))[:, grid.trunk]
    own = draw.normal(size=(n_studies, len(grid.n_params)))
    noise = sigma * (np.sqrt(shared) * luck + np.sqrt(1 - shared) * own) / np.sqrt(grid.counts)
    return np.asarray(np.log(law.loss(grid.n_params, grid.tokens)) + noise)


def run_preflight(
    law: Chinchilla,
    grid: Grid,
    flops: float,
    *,
    n_studies: int = N_STUDIES,
    sigma: float = SIGMA,
    shared: float = SHARED,
    seed: int = 0,
) -> Preflight:
    """Draw studies and fit each with every estimator. `flops`: the compute whose best size is asked for, as 6 N D."""
    log_losses = draw_losses(law, grid, n_studies, sigma, shared, seed)
    problems = tuple(find_problems(law, grid, flops, sigma))
    outcomes: list[Outcome] = []
    if not any("cannot be fitted" in problem or "cannot tell" in problem for problem in problems):
        for name, objective in (("log-Huber", LOG_HUBER), ("log-MSE", LOG_MSE)):
            outcomes += judge_law(name, law, grid, flops, fit_studies(law, grid, log_losses, objective))
    for name, valley in METHODS.items():
        outcomes += judge_slices(f"isoFLOP {name}", law, grid, flops, log_losses, valley)
    wide = tuple(f"{o.estimator}, {o.quantity}: {o.problem}" for o in outcomes if o.problem)
    return Preflight(law, flops, tuple(outcomes), problems + wide)


def find_problems(law: Chinchilla, grid: Grid, flops: float, sigma: float) -> Iterator[str]:
    """Say what no estimator could learn from this grid, and what it has to reach for."""
    try:
        fit_chinchilla(grid.n_params, grid.tokens, law.loss(grid.n_params, grid.tokens))
    except FitError as error:
        yield f"the law cannot be fitted: {error}"
        return
    question = ask(law, list_candidates(grid.n_params, grid.tokens), [lambda found: np.log(found.allocate(flops).n_params)])
    if not np.isfinite(forecast_sd(question, np.broadcast_to(grid.counts, grid.n_params.shape), sigma)[0]):
        yield "the grid cannot tell the law's two terms apart: every budget follows one power of the size; add other budgets"
    best = law.allocate(flops)
    reach = max(best.n_params / grid.n_params.max(), best.tokens / grid.tokens.max())
    if reach > 1:
        yield (
            f"the best split of {flops:.3g} FLOPs lies a factor of {reach:.3g} beyond the largest size or budget: "
            "an extrapolation"
        )


def fit_studies(law: Chinchilla, grid: Grid, log_losses: FloatArray, objective: Objective) -> FloatArray:
    """Fit every study, from the truth. Shapes: (n_studies, n) -> (n_studies, 5).

    Note: real fits search for their start, and find the same minima (tests/test_fit.py).
    """
    cells = {"n_params": grid.n_params, "tokens": grid.tokens}
    start = [law.E, law.A, law.B, law.alpha, law.beta]
    order = [CHINCHILLA.parameters.index(name) for name in ("E", "A", "B", "alpha", "beta")]
    placed = np.empty(len(order))
    placed[order] = start
    weights = np.broadcast_to(grid.counts, grid.n_params.shape)
    found = fit_many(CHINCHILLA, cells, np.exp(log_losses), placed, objective, weights)
    return np.asarray(found[:, order])


def judge_law(name: str, law: Chinchilla, grid: Grid, flops: float, params: FloatArray) -> Iterator[Outcome]:
    """Compare the fitted laws with the one that the losses came from. Shapes: params (m, 5)."""
    e, a, b, alpha, beta = params.T
    both = alpha + beta
    with np.errstate(divide="ignore", invalid="ignore"):
        log_best = (np.log(alpha * a) - np.log(beta * b)) / both + beta / both * np.log(flops / 6)
    best = law.allocate(flops)
    yield judge(name, "alpha", law.alpha, alpha)
    yield judge(name, "beta", law.beta, beta)
    yield judge(name, "a = beta / (alpha + beta)", law.optimum_exponent, beta / both)
    yield judge(name, f"N*({flops:.3g})", best.n_params, np.exp(log_best), is_factor=True)
    for cell_id, n, d in grid.held_out or (("best split", best.n_params, best.tokens),):
        yield judge(name, f"loss of {cell_id}", float(law.loss(n, d)), e + a * n**-alpha + b * d**-beta, is_factor=True)


def judge_slices(
    name: str, law: Chinchilla, grid: Grid, flops: float, log_losses: FloatArray, valley: Valley
) -> Iterator[Outcome]:
    """Find the lowest point of each isoFLOP slice, draw a line through them in logs, and compare with the truth."""
    slices = find_slices(grid)
    if len(slices) < 2:
        return
    minima = np.stack([find_minima(np.log(grid.n_params[cells]), log_losses[:, cells], valley) for cells in slices])
    x = np.array([float(np.log(grid.flops[cells]).mean()) for cells in slices]) - np.log(flops)
    slope = ((x - x.mean())[:, None] * (minima - minima.mean(axis=0))).sum(axis=0) / ((x - x.mean()) ** 2).sum()
    yield judge(name, "a = beta / (alpha + beta)", law.optimum_exponent, slope)
    at_target = np.exp(minima.mean(axis=0) - slope * x.mean())
    yield judge(name, f"N*({flops:.3g})", law.allocate(flops).n_params, at_target, is_factor=True)


def find_slices(grid: Grid) -> list[npt.NDArray[np.intp]]:
    """Return the cells of each compute that has enough sizes for a valley; none where the computes are a continuum."""
    try:
        slices = split_budgets(grid.flops)
    except FitError:
        return []
    return [cells for cells in slices if np.unique(grid.n_params[cells]).size >= MIN_SIZES]


def find_minima(log_n: FloatArray, log_losses: FloatArray, valley: Valley) -> FloatArray:
    """Return where each study's slice is lowest, in ln N; NaN where it has no valley. Shapes: (m, n) -> (m,)."""
    x, place = np.unique(log_n, return_inverse=True)
    means = np.stack([log_losses[:, place == k].mean(axis=1) for k in range(x.size)], axis=1)
    return np.array([find_minimum(x, row, valley) for row in means])


def find_minimum(x: FloatArray, log_loss: FloatArray, valley: Valley) -> float:
    """Return the place of one valley, or NaN."""
    try:
        return valley(x, log_loss)[0]
    except FitError:
        return float("nan")


def judge(estimator: str, quantity: str, truth: float, values: FloatArray, *, is_factor: bool = False) -> Outcome:
    """Say how far and how wide the studies lie around the truth; a grid on which a tenth of them fail answers nothing."""
    kept = values[np.isfinite(values)]
    if len(kept) < 0.9 * len(values):
        lost = f"{1 - len(kept) / len(values):.0%} of the studies have no minimum inside the grid"
        return Outcome(estimator, quantity, is_factor, truth, np.nan, np.nan, np.nan, np.nan, lost)
    scaled = kept / truth if is_factor else kept
    low, median, high = (float(value) for value in np.percentile(scaled, LEVEL))
    bias = median - (1.0 if is_factor else truth)
    wide = high > WIDE * low if is_factor else high - low > abs(truth)
    problem = f"its interval, {low:.3g} to {high:.3g}, is too wide to quote it" if wide else ""
    sd = float(np.std(np.log(scaled) if is_factor else scaled))
    return Outcome(estimator, quantity, is_factor, truth, bias, low, high, sd, problem)


def render_preflight(name: str, found: Preflight, grid: Grid, sigma: float, shared: float, n_studies: int) -> str:
    """Write the page."""
    law = found.law
    lines = [
        f"{name}: {len(grid.n_params)} cells to fit, in {int(grid.trunk.max()) + 1} trunks; {n_studies} synthetic studies",
        f"  prior law: E {law.E:.4g}, A {law.A:.4g}, B {law.B:.4g}, alpha {law.alpha:.4g}, beta {law.beta:.4g}",
        f"  noise of ln L: {sigma:g}, of whose variance {shared:.0%} is shared in a trunk",
        "",
        f"  {'estimator':<18}{'quantity':<48}{'truth':>11}{'bias':>10}   95% of the studies",
    ]
    for outcome in found.outcomes:
        mark = "x" if outcome.is_factor else ""
        if np.isnan(outcome.low):
            lines.append(f"  {outcome.estimator:<18}{outcome.quantity:<48}{outcome.truth:>11.4g}   {outcome.problem}")
            continue
        bias = f"{outcome.bias:+.2%}" if outcome.is_factor else f"{outcome.bias:+.4f}"
        between = f"{mark}{outcome.low:.4g} to {mark}{outcome.high:.4g}"
        lines.append(f"  {outcome.estimator:<18}{outcome.quantity:<48}{outcome.truth:>11.4g}{bias:>10}   {between}")
    if not any(outcome.estimator.startswith("isoFLOP") for outcome in found.outcomes):
        lines.append(f"  isoFLOP estimators: no two computes have {MIN_SIZES} sizes each, so they do not apply")
    lines += ["", "This grid does not identify:" if found.problems else "Nothing asked for is beyond this grid."]
    return "\n".join([*lines, *(f"  - {problem}" for problem in found.problems)])
