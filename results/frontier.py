"""The best size at each compute without a surface: Chinchilla's approaches 1 (envelope) and 2 (isoFLOP), and their power law.

Sources: Hoffmann et al. 2022, arXiv 2203.15556, sections 3.1 and 3.2; the Akima interpolant is that of Porian et al. 2024, arXiv
2406.19146, section 3. A parabola is biased where the two exponents of the law differ and the slice is wide, most of all in the
scale of N* (arXiv 2603.22339); the cubic is hardly so. So the methods are shown side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.interpolate import Akima1DInterpolator
from scipy.special import stdtrit

from results.fit import FitError
from results.laws import FloatArray

MAX_GAP = 0.05  # cells whose FLOPs differ by less than this share belong to one budget
MAX_SPAN = 0.25  # and a budget may not be wider than this
N_BETWEEN = 25  # places tried between two neighbours of a slice
N_COMPUTES = 200  # computes at which the envelope is read
MIN_RUNS = 3  # sizes that must reach a compute for its best to count
MIN_BUDGETS = 3


@dataclass(frozen=True)
class Optimum:
    """The best size at one compute. Units: flops, parameters, tokens, nats per token."""

    flops: float
    n_params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class PowerLaw:
    """ln y = intercept + exponent ln x, with the t interval of the exponent (independent points)."""

    exponent: float
    intercept: float
    low: float
    high: float

    def predict(self, x: npt.ArrayLike) -> FloatArray:
        """Evaluate y."""
        return np.asarray(np.exp(self.intercept + self.exponent * np.log(x)))


@dataclass(frozen=True)
class Frontier:
    """N* and D* as powers of compute, the points they rest on, and the budgets that gave none, each with its reason."""

    method: str
    optima: tuple[Optimum, ...]
    refused: tuple[str, ...]
    n_params: PowerLaw
    tokens: PowerLaw


def fit_isoflop(
    cells: Mapping[str, npt.ArrayLike], method: str = "cubic", weights: Mapping[float, float] | None = None
) -> Frontier:
    """Find the valley of each budget by `parabola`, `cubic` or `akima`; `cells` holds n_params, tokens, flops and val_loss.

    `weights`: of each budget, in the power law.

    Raises:
        FitError: fewer than three budgets have a valley.
    """
    n, d, c, loss = (np.asarray(cells[name], dtype=float) for name in ("n_params", "tokens", "flops", "val_loss"))
    optima, refused = [], []
    for rows in split_budgets(c):
        flops = float(np.exp(np.log(c[rows]).mean()))
        try:
            optima.append(find_optimum(n[rows], d[rows], flops, loss[rows], METHODS[method]))
        except FitError as error:
            refused.append(f"{flops:.3g} FLOPs: {error}")
    return describe_frontier(method, optima, refused, weights)


def split_budgets(flops: FloatArray) -> list[npt.NDArray[np.intp]]:
    """Group cells of like compute.

    Raises:
        FitError: computes lie so close together that they are a continuum.
    """
    order = np.argsort(flops, kind="stable")
    ends = np.flatnonzero(np.diff(np.log(flops[order])) > np.log1p(MAX_GAP)).astype(int)
    groups = [rows for rows in np.split(order, ends + 1) if rows.size]
    for rows in groups:
        if flops[rows].max() > (1 + MAX_SPAN) * flops[rows].min():
            raise FitError(
                f"flops: {rows.size} cells from {flops[rows].min():.3g} to {flops[rows].max():.3g} lie too close together to be "
                "told apart as budgets, so there are no isoFLOP slices; plan cells with grid.flops, or use the law"
            )
    return groups


def find_optimum(n: FloatArray, d: FloatArray, flops: float, loss: FloatArray, find_valley: "Valley") -> Optimum:
    """Find the lowest point of one slice; tokens at it by interpolation between neighbours, in logs."""
    x, order = np.unique(np.log(n), return_index=True)
    losses = np.array([np.log(loss[np.log(n) == value]).mean() for value in x])  # repeats of a size: the mean of their logs
    at, log_loss = find_valley(x, losses)
    return Optimum(flops, float(np.exp(at)), float(np.exp(np.interp(at, x, np.log(d[order])))), float(np.exp(log_loss)))


Valley = Callable[[FloatArray, FloatArray], tuple[float, float]]  # ln N and ln L of a slice -> those of its lowest point


def fit_polynomial(x: FloatArray, log_loss: FloatArray, degree: int) -> tuple[float, float]:
    """Fit L by a polynomial in ln N and return its local minimum.

    Raises:
        FitError: too few sizes, a curve that opens downwards, or a minimum that no cell lies beyond.
    """
    check_slice(x, degree + 2)
    centre = x.mean()
    curve = np.polynomial.Polynomial.fit(x - centre, np.exp(log_loss), degree, domain=[])
    bend = curve.deriv(2)
    roots = [complex(root) for root in curve.deriv().roots()]
    places = [root.real for root in roots if abs(root.imag) < 1e-9 * (1 + abs(root))]
    minima = [place for place in places if bend(place) > 0]
    if not minima:
        raise FitError("the curve opens downwards: no best size; add cells on both sides of the valley")
    inside = [place for place in minima if x[0] - centre < place < x[-1] - centre]
    if not inside:
        raise FitError(describe_edge(minima[0] > x[-1] - centre))
    best = min(inside, key=curve)
    return best + float(centre), float(np.log(curve(best)))


def fit_parabola(x: FloatArray, log_loss: FloatArray) -> tuple[float, float]:
    """Return the minimum of the parabola."""
    return fit_polynomial(x, log_loss, 2)


def fit_cubic(x: FloatArray, log_loss: FloatArray) -> tuple[float, float]:
    """Return the local minimum of the cubic."""
    return fit_polynomial(x, log_loss, 3)


def fit_akima(x: FloatArray, log_loss: FloatArray) -> tuple[float, float]:
    """Return the lowest of places between neighbours on Akima's interpolant of ln L in ln N.

    Raises:
        FitError: too few sizes, or the lowest is the smallest or the largest.
    """
    check_slice(x, 4)
    places = np.concatenate([np.linspace(a, b, N_BETWEEN, endpoint=False) for a, b in pairwise(x)] + [x[-1:]])
    values = Akima1DInterpolator(x, log_loss)(places)
    best = int(np.argmin(values))
    if best in (0, len(places) - 1):
        raise FitError(describe_edge(best > 0))
    return float(places[best]), float(values[best])


METHODS: dict[str, Valley] = {"parabola": fit_parabola, "cubic": fit_cubic, "akima": fit_akima}


def check_slice(x: FloatArray, n_needed: int) -> None:
    """Refuse a slice of too few sizes."""
    if x.size < n_needed:
        raise FitError(f"{x.size} size(s), of at least {n_needed}; add {n_needed - x.size} more to this budget")


def describe_edge(is_largest: bool) -> str:
    """Say that the minimum is at the edge, and which cells would close the valley."""
    return f"the minimum is at the edge: no cell lies beyond it; add {'larger' if is_largest else 'smaller'} sizes to this budget"


def fit_envelope(cells: Mapping[str, npt.ArrayLike]) -> Frontier:
    """Read the lowest loss at each compute from the curves of each size over its budgets, and which size reaches it.

    Note: between budgets a size's ln L is interpolated in ln C. A best size that is the smallest or largest there counts as no
    optimum, since beyond it none was trained.

    Raises:
        FitError: too few computes at which at least three sizes can be compared.
    """
    n, d, c, loss = (np.log(np.asarray(cells[name], dtype=float)) for name in ("n_params", "tokens", "flops", "val_loss"))
    if not n.size:
        raise FitError("no cell has a loss to compare; train some")
    sizes = np.unique(n)
    grid = np.linspace(c.min(), c.max(), N_COMPUTES)
    curves = np.full((2, sizes.size, grid.size), np.nan)
    for i, size in enumerate(sizes):
        rows = np.flatnonzero(n == size)
        rows = rows[np.argsort(c[rows], kind="stable")]
        for k, column in enumerate((loss, d)):
            curves[k, i] = np.interp(grid, c[rows], column[rows], left=np.nan, right=np.nan) if rows.size > 1 else np.nan
    optima: list[Optimum] = []
    at_edge = 0
    for j in np.flatnonzero(np.isfinite(curves[0]).sum(axis=0) >= MIN_RUNS):
        there = np.flatnonzero(np.isfinite(curves[0, :, j]))
        best = int(there[np.argmin(curves[0, there, j])])
        if best in (there[0], there[-1]):
            at_edge += 1
        else:
            optima.append(Optimum(*(float(np.exp(v)) for v in (grid[j], sizes[best], curves[1, best, j], curves[0, best, j]))))
    refused = [f"{at_edge} of {N_COMPUTES} computes: the best size there is the smallest or the largest"] if at_edge else []
    return describe_frontier("envelope", optima, refused, None)


def describe_frontier(
    method: str, optima: Sequence[Optimum], refused: Sequence[str], weights: Mapping[float, float] | None
) -> Frontier:
    """Put a power law through optima.

    Raises:
        FitError: fewer than three of them, or all of one compute.
    """
    if len(optima) < MIN_BUDGETS:
        more = f"; and {len(refused) - 2} more" if len(refused) > 2 else ""
        why = f" ({'; '.join(refused[:2])}{more})" if refused else ""
        raise FitError(
            f"{len(optima)} compute(s) show a best size, of at least {MIN_BUDGETS}{why}; "
            "plan at least three budgets (grid.flops) with sizes on both sides of the best"
        )
    if len({optimum.n_params for optimum in optima}) < MIN_BUDGETS:
        raise FitError(
            "fewer than three different sizes are ever the best, so how the best grows is not seen; add sizes between them"
        )
    flops = np.array([optimum.flops for optimum in optima])
    share = np.array([1.0 if weights is None else weights[optimum.flops] for optimum in optima])
    by_n, by_d = (fit_power_law(flops, [getattr(o, name) for o in optima], share) for name in ("n_params", "tokens"))
    return Frontier(method, tuple(optima), tuple(refused), by_n, by_d)


def fit_power_law(x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None = None, level: float = 0.95) -> PowerLaw:
    """Fit a line in logs by weighted least squares."""
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    share = np.ones_like(log_x) if weights is None else np.asarray(weights, dtype=float)
    mean_x, mean_y = np.average(log_x, weights=share), np.average(log_y, weights=share)
    spread = float((share * (log_x - mean_x) ** 2).sum())
    slope = float((share * (log_x - mean_x) * (log_y - mean_y)).sum() / spread)
    rest = log_y - mean_y - slope * (log_x - mean_x)
    df = max(len(log_x) - 2, 1)
    reach = float(stdtrit(df, (1 + level) / 2) * np.sqrt((share * rest**2).sum() / df / spread))
    return PowerLaw(slope, float(mean_y - slope * mean_x), slope - reach, slope + reach)
