"""Figures of how compute is best spent, in the house style of plot.py: slices, optimum, surface, and what the cells say of it."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.records import Plan
from model.ladder import format_count
from results.fit import FitError
from results.frontier import METHODS, Frontier, find_optimum, fit_isoflop, split_budgets
from results.laws import PUBLISHED, FloatArray
from results.plot import (
    DARKEST,
    INK,
    LOSS_LABEL,
    PALETTE,
    STYLE,
    Label,
    Picture,
    begin_figure,
    draw_band,
    finish_axes,
    label_lines,
    list_labels,
    pick_shades,
    scale_log,
    scale_powers,
    select_scored,
    split_series,
    spread_grid,
)
from results.study import Fitted, Study
from results.table import select_curve
from results.uncertainty import Quantity

QUIET = "#8a8a8a"
STYLES = ("--", ":")
REACH = 10.0  # how far beyond the fitted compute an optimum is drawn


def draw_compute(study: Study, curves: pd.DataFrame, plan: Plan) -> list[Picture]:
    """Draw every figure about compute that the study has data for."""
    with mpl.rc_context(STYLE):
        return [*draw_spending(study, curves), *draw_cost(study.cells, plan)]


def draw_cost(cells: pd.DataFrame, plan: Plan) -> list[Picture]:
    """Draw what the cells took, where that was recorded."""
    pictures = []
    forecast_s = {cell.cell_id: cell.train_s for cell in plan.forecast.cells} if plan.forecast else {}
    if (cells["train_s"].notna() & cells["cell_id"].isin(list(forecast_s))).any():
        pictures.append(plot_forecast(cells, forecast_s))
    if cells["tokens_per_s"].notna().any():
        pictures.append(plot_throughput(cells))
    return pictures


def draw_spending(study: Study, curves: pd.DataFrame) -> list[Picture]:
    """Draw where compute is best spent."""
    if study.cells["val_loss"].notna().sum() == 0:
        return []
    pictures = [plot_curves_vs_flops(study, curves)]
    isoflop = try_isoflop(study)
    if isoflop is not None:
        pictures.append(plot_isoflop(study, isoflop))
    if study.fitted is not None and study.fitted.fit.law.is_chinchilla:
        fitted = study.fitted
        pictures += [plot_optimum(study, fitted), plot_surface(study, fitted), plot_ratio(study, fitted)]
        pictures += [plot_parity(study, fitted), plot_pairs(fitted)]
    if study.seed_noise is not None:
        pictures.append(plot_seed_noise(study))
    return pictures


def try_isoflop(study: Study) -> Frontier | None:
    """Return the valleys by a cubic, where budgets were planned as slices."""
    try:
        return fit_isoflop(read_slices(study))
    except FitError:
        return None


def read_slices(study: Study) -> dict[str, FloatArray]:
    """Return what a slice is made of."""
    columns = {"n_params": study.convention.column, "tokens": "tokens", "val_loss": "val_loss", "flops": "flops"}
    return {name: study.kept[column].to_numpy(float) for name, column in columns.items()}


def plot_curves_vs_flops(study: Study, curves: pd.DataFrame) -> Picture:
    """Draw each cell's validation loss during training against its FLOPs, and the lowest seen at each compute."""
    figure, axes = begin_figure("training FLOPs", LOSS_LABEL)
    cells = select_scored(study)
    series = split_series(cells, study.convention.column)
    evals = curves[(curves["kind"] == "eval") & np.isfinite(curves["loss"]) & (curves["flops"] > 0)]
    for one in series:
        for cell in one.cells.to_dict("records"):
            curve = select_curve(evals, cell["run_id"], cell["cell_id"], cell["branch_step"])
            axes.plot(curve["flops"], curve["loss"], color=one.shade, linewidth=0.9, alpha=0.8)
    seen = evals.sort_values("flops")
    axes.step(seen["flops"], seen["loss"].cummin(), where="post", color=INK, linewidth=0.9, linestyle=":")
    finish_axes(axes, cells["val_loss"])
    scale_powers(axes.xaxis)
    label_lines(axes, [*list_labels(series), Label(float(cells["val_loss"].min()), "lowest", INK, ":")], "parameters")
    caption = (
        f"Validation loss during training against FLOPs, {len(cells)} cells by model size. Dotted: the lowest loss at each "
        "compute, which only finished cooldowns reach."
    )
    return Picture("curves_vs_flops", "Learning curves against compute", figure, caption)


def plot_isoflop(study: Study, frontier: Frontier) -> Picture:
    """Draw loss against parameters at each compute, with the lowest point of each slice and its spread over three methods."""
    figure, axes = begin_figure(f"{study.convention.words} (N)", LOSS_LABEL)
    cells = read_slices(study)
    groups = split_budgets(cells["flops"])
    labels, edges = [], 0
    for rows, shade in zip(groups, pick_shades(len(groups)), strict=True):
        order = rows[np.argsort(cells["n_params"][rows])]
        axes.plot(
            cells["n_params"][order], cells["val_loss"][order], "o", color=shade, markeredgecolor="white", markeredgewidth=0.4
        )
        axes.plot(cells["n_params"][order], cells["val_loss"][order], color=shade, linewidth=0.9)
        minima = find_minima(cells, rows)
        edges += not minima
        if minima:
            sizes = [one for one, _ in minima]
            axes.plot(sizes, [loss for _, loss in minima], color=INK, linewidth=1.2)
            axes.plot(minima[0][0], minima[0][1], "D", color=INK, markersize=4.5)
        labels.append(Label(float(cells["val_loss"][rows].min()), f"{cells['flops'][rows].mean():.1e}", shade))
    finish_axes(axes, cells["val_loss"])
    label_lines(axes, labels, "FLOPs")
    law = frontier.n_params
    caption = (
        f"Slices of equal compute. Diamonds: their lowest points by a cubic, lines: where a parabola and an interpolant do; "
        f"{edges} of {len(groups)} slices show no lowest point, so that their best size is not identified. N* grows as "
        f"C^{law.exponent:.3f} ({law.low:.3f} to {law.high:.3f})."
    )
    return Picture("isoflop", "IsoFLOP slices", figure, caption)


def find_minima(cells: dict[str, FloatArray], rows: np.typing.NDArray[np.intp]) -> list[tuple[float, float]]:
    """Return the lowest point of a slice by each method that finds one, the cubic's first; none where the cubic finds none."""
    found: list[tuple[float, float]] = []
    for name in sorted(METHODS, key=lambda name: name != "cubic"):
        try:
            flops = float(cells["flops"][rows].mean())
            args = (cells["n_params"][rows], cells["tokens"][rows], flops, cells["val_loss"][rows])
            best = find_optimum(*args, METHODS[name])
        except FitError:
            if not found:
                return []
            continue
        found.append((best.n_params, best.loss))
    return found


def spread_compute(fitted: Fitted, n_points: int = 40) -> FloatArray:
    """Return computes over those fitted and as far beyond as an optimum is drawn."""
    n_params, tokens = np.exp(fitted.fit.centred.x + fitted.fit.centred.mean[:, None])
    return np.geomspace(float((6 * n_params * tokens).min()), REACH * fitted.flops, n_points)


def draw_published(axes: Axes, flops: FloatArray, quantity: str) -> None:
    """Draw what published laws say of the best split, dashed and dotted."""
    for style, law in zip(STYLES, PUBLISHED.values(), strict=True):
        axes.plot(flops, [getattr(law.allocate(c), quantity) for c in flops], color=QUIET, linestyle=style, linewidth=1.0)


def mark_reach(axes: Axes, fitted: Fitted) -> None:
    """Mark the largest fitted compute: to the right of it everything is extrapolated."""
    axes.axvline(fitted.flops, color=QUIET, linewidth=0.7)
    scale_log(axes.xaxis)
    scale_powers(axes.xaxis)
    axes.set_yscale("log")


def plot_optimum(study: Study, fitted: Fitted) -> Picture:
    """Draw the best parameters and the best tokens against compute, with bands, beside published laws."""
    figure = Figure(figsize=(7.2, 3.0))
    flops = spread_compute(fitted)
    for axes, quantity, words in zip(
        figure.subplots(1, 2), ("n_params", "tokens"), ("best parameters, N*", "best tokens, D*"), strict=True
    ):
        draw_band(axes, fitted, flops, optimum_of(quantity, flops), INK)
        draw_published(axes, flops, quantity)
        mark_reach(axes, fitted)
        axes.set_xlabel("training FLOPs (C = 6 N D)")
        axes.set_ylabel(words)
    best = fitted.fit.constants.allocate(fitted.flops)
    caption = (
        f"The best split of compute, with 95% intervals; at {best.flops:.2e} FLOPs (vertical line, beyond which all is "
        f"extrapolated) {format_count(best.n_params)} parameters on {format_count(best.tokens)} tokens. Grey: published laws, "
        f"{name_published()}; they are for other text and tokens, so only slopes compare."
    )
    return Picture("optimum", "Best parameters and tokens", figure, caption)


def optimum_of(quantity: str, flops: FloatArray) -> Quantity:
    """Return one side of the best split of each compute as a quantity of a law."""
    return lambda law: [getattr(law.allocate(c), quantity) for c in flops]


def name_published() -> str:
    """Say which published law has which style of line."""
    words = ("dashed", "dotted")
    return ", ".join(f"{name} ({style})" for name, style in zip(PUBLISHED, words, strict=True))


def plot_surface(study: Study, fitted: Fitted) -> Picture:
    """Draw contours of the fitted loss over parameters and tokens, the cells, and the best split."""
    figure, axes = begin_figure(f"{study.convention.words} (N)", "training tokens (D)")
    cells = study.kept
    n_grid, d_grid = spread_grid(cells[study.convention.column]), spread_grid(cells["tokens"])
    loss = fitted.fit.constants.loss(*np.meshgrid(n_grid, d_grid))
    lines = axes.contour(n_grid, d_grid, loss, levels=10, cmap=PALETTE, vmin=loss.min(), vmax=loss.max() * 1.15, linewidths=0.9)
    axes.clabel(lines, fmt="%.3g", fontsize=7)
    axes.plot(cells[study.convention.column], cells["tokens"], "o", color=INK, markeredgecolor="white", markeredgewidth=0.4)
    best = [fitted.fit.constants.allocate(c) for c in spread_compute(fitted)]
    axes.plot([one.n_params for one in best], [one.tokens for one in best], color="#c8401e", linewidth=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    scale_log(axes.xaxis)
    axes.set_xlim(n_grid[0], n_grid[-1])
    axes.set_ylim(d_grid[0], d_grid[-1])
    inside = [one for one in best if n_grid[0] <= one.n_params <= n_grid[-1] and d_grid[0] <= one.tokens <= d_grid[-1]]
    where = "does not cross" if not inside else "crosses"
    caption = (
        f"Contours of the fitted loss, {loss.min():.3g} to {loss.max():.3g} nats per token, and the {len(cells)} fitted cells. "
        f"Red: the best split of each compute, which {where} the trained range."
    )
    return Picture("surface", "Loss surface", figure, caption)


def plot_ratio(study: Study, fitted: Fitted) -> Picture:
    """Draw tokens per parameter of the best split against compute, with the ratios that were trained."""
    figure, axes = begin_figure("training FLOPs (C = 6 N D)", "tokens per parameter")
    flops = spread_compute(fitted)
    draw_band(axes, fitted, flops, lambda law: [np.exp(law.log_tokens_per_param(c)) for c in flops], INK)
    draw_published(axes, flops, "tokens_per_param")
    kept = study.kept
    sizes, tokens = kept[study.convention.column].to_numpy(float), kept["tokens"].to_numpy(float)
    axes.plot(
        6 * sizes * tokens, tokens / sizes, "o", color=PALETTE(DARKEST + 0.35), markeredgecolor="white", markeredgewidth=0.4
    )
    mark_reach(axes, fitted)
    interval = fitted.intervals["tokens_per_param"]
    said = f"{interval.estimate:.3g} ({interval.low:.3g} to {interval.high:.3g})"
    quoted = said if interval.identified else f"not identified by this grid ({interval.problem})"
    caption = (
        f"Tokens per parameter of the best split, with 95% intervals; at {fitted.flops:.2e} FLOPs (vertical line): {quoted}. "
        f"Marks: the {len(kept)} fitted cells. Grey: {name_published()}."
    )
    return Picture("tokens_per_param", "Tokens per parameter", figure, caption)


def plot_parity(study: Study, fitted: Fitted) -> Picture:
    """Draw what the law says of each cell against what was measured; held-out cells are hollow."""
    figure, axes = begin_figure("fitted or predicted loss", "measured loss (nats per token)")
    cells = select_scored(study)
    predicted = fitted.fit.constants.loss(cells[study.convention.column].to_numpy(float), cells["tokens"].to_numpy(float))
    loss = cells["val_loss"].to_numpy(float)
    ends = np.array([min(predicted.min(), loss.min()), max(predicted.max(), loss.max())])
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    left_out = cells["excluded"].to_numpy(bool)
    shade = PALETTE(DARKEST + 0.35)
    axes.plot(predicted[~left_out], loss[~left_out], "o", color=shade, markeredgecolor="white", markeredgewidth=0.4)
    axes.plot(predicted[left_out], loss[left_out], "o", color="white", markeredgecolor=shade)
    fitted_error = float(np.abs(100 * (predicted / loss - 1))[~left_out].mean())
    held = (cells["role"] == "held_out").to_numpy(bool)
    error = 100 * (predicted / loss - 1)
    said = f"{held.sum()} held-out cells: mean error {np.abs(error[held]).mean():.2f}%" if held.any() else "No cell is held out"
    caption = f"Measured loss against the law. Hollow: cells that were not fitted. {said}; of fitted ones: {fitted_error:.2f}%."
    return Picture("parity", "Measured against predicted", figure, caption)


def plot_pairs(fitted: Fitted) -> Picture:
    """Draw the refits' parameters against each other, each term taken at the middle of the grid, where they are least tangled."""
    fit = fitted.fit
    terms = np.array([centre_terms(fitted, law) for law in fitted.resamples.laws])
    names = ("E", "N term", "D term", "alpha", "beta")
    figure = Figure(figsize=(6.4, 6.0))
    grid = figure.subplots(4, 4)
    for row, column in np.ndindex(4, 4):
        axes, shade = grid[row, column], PALETTE(DARKEST + 0.35)
        if column > row:
            axes.set_axis_off()
            continue
        low, high = np.quantile(terms, 0.005, axis=0), np.quantile(terms, 0.995, axis=0)
        axes.scatter(terms[:, column], terms[:, row + 1], s=2, color=shade, alpha=0.35, linewidths=0, rasterized=True)
        axes.set_xlim(low[column], high[column])
        axes.set_ylim(low[row + 1], high[row + 1])
        axes.tick_params(labelsize=6)
        axes.locator_params(nbins=3)
        axes.label_outer()
        if row == 3:
            axes.set_xlabel(names[column])
        if column == 0:
            axes.set_ylabel(names[row + 1])
    strongest = np.abs(np.corrcoef(terms.T) - np.eye(5))
    i, j = np.unravel_index(int(np.argmax(strongest)), strongest.shape)
    caption = (
        f"{len(terms)} refits under other luck, {fit.n_cells} cells; terms at the middle of the grid. The strongest correlation "
        f"is {strongest[i, j]:.3f}, between {names[i]} and {names[j]}."
    )
    return Picture("pairs", "Parameters against each other", figure, caption)


def centre_terms(fitted: Fitted, law: object) -> tuple[float, ...]:
    """Return E, the two terms at the middle of the grid, and the exponents."""
    n_params, tokens = np.exp(fitted.fit.centred.mean)
    E, A, B, alpha, beta = (float(getattr(law, name)) for name in ("E", "A", "B", "alpha", "beta"))
    return E, A / n_params**alpha, B / tokens**beta, alpha, beta


def plot_seed_noise(study: Study) -> Picture:
    """Draw how far cells that differ in the seed alone lie from their mean."""
    figure, axes = begin_figure("training FLOPs (C = 6 N D)", "val_loss less the group's mean")
    alike = ["size", "planned_tokens", "lr", "global_batch_size", "schedule", "precision"]
    groups = [group for _, group in study.kept.groupby(alike, dropna=False) if len(group) > 1]
    for group in groups:
        deviations = group["val_loss"] - group["val_loss"].mean()
        axes.plot(
            group["flops_6nd"], deviations, "o", color=PALETTE(DARKEST + 0.35), markeredgecolor="white", markeredgewidth=0.4
        )
    noise = study.seed_noise
    assert noise is not None
    axes.axhspan(-noise.sd, noise.sd, color=PALETTE(0.5), alpha=0.15, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    scale_log(axes.xaxis)
    scale_powers(axes.xaxis)
    caption = (
        f"{noise.n_cells} cells in {noise.n_groups} group(s) with other seeds: standard deviation {noise.sd:.2g} nats "
        f"per token ({noise.low:.2g} to {noise.high:.2g}), shaded."
    )
    return Picture("seed_noise", "Seed noise", figure, caption)


def plot_forecast(cells: pd.DataFrame, forecast_s: dict[str, float]) -> Picture:
    """Draw measured seconds in training steps against the forecast ones."""
    figure, axes = begin_figure("forecast seconds in training steps", "measured seconds")
    done = cells[cells["train_s"].notna() & cells["cell_id"].isin(list(forecast_s))]
    expected = np.array([forecast_s[cell_id] for cell_id in done["cell_id"]])
    measured = done["train_s"].to_numpy(float)
    ends = np.array([min(expected.min(), measured.min()), max(expected.max(), measured.max())])
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    axes.plot(expected, measured, "o", color=PALETTE(DARKEST + 0.35), markeredgecolor="white", markeredgewidth=0.4)
    axes.set_yscale("log")
    scale_log(axes.xaxis)
    ratio = float(np.exp(np.log(measured / expected).mean()))
    caption = f"Forecast against measured seconds of {len(done)} cells: measured over forecast {ratio:.2f} (geometric mean)."
    return Picture("forecast", "Forecast against actual cost", figure, caption)


def plot_throughput(cells: pd.DataFrame) -> Picture:
    """Draw tokens and FLOPs per second against size. Note: the table has no MFU, so FLOPs per second stand for it."""
    figure = Figure(figsize=(7.2, 2.8))
    done = cells[cells["tokens_per_s"].notna()]
    rates = done["tokens_per_s"] * done["flops_per_token"]
    for axes, values, words in zip(
        figure.subplots(1, 2), (done["tokens_per_s"], rates), ("tokens per second", "FLOPs per second"), strict=True
    ):
        axes.plot(done["n_params"], values, "o", color=PALETTE(DARKEST + 0.35), markeredgecolor="white", markeredgewidth=0.4)
        axes.set_xlabel("all parameters")
        axes.set_ylabel(words)
        axes.set_yscale("log")
        scale_log(axes.xaxis, n_ticks=4)
    caption = f"Throughput of {len(done)} cells: {rates.min():.3g} to {rates.max():.3g} training FLOPs per second."
    return Picture("throughput", "Throughput by size", figure, caption)
