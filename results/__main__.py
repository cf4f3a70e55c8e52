"""`python -m results`: from an experiment's runs to one table, a fitted law, pictures and a report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.config import ConfigError, run_command_line

if TYPE_CHECKING:
    from harness.records import Plan
    from results.study import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

Source = Annotated[
    Path, typer.Argument(help="An experiment file (*.toml), or an experiment's folder (runs/<name>).", show_default=False)
]
RunsDir = Annotated[Path, typer.Option(help="Where experiments keep their runs; for an experiment file.")]
Params = Annotated[
    Literal["total", "non_embedding", "matmul"], typer.Option(help="What N counts: n_params, or one of the others.")
]


@app.command()
def table(source: Source, runs_dir: RunsDir = Path("runs")) -> None:
    """Write table.csv and table.parquet: one row for every planned cell."""
    from results.table import load_cells, write_table

    experiment_dir = find_experiment(source, runs_dir)
    cells = load_cells(experiment_dir)
    for path in write_table(cells, experiment_dir / "results"):
        print(path)
    print(f"{len(cells)} cells, {int((cells['state'] == 'done').sum())} done, {int(cells['excluded'].sum())} left out of a fit")


@app.command()
def fit(
    source: Source,
    runs_dir: RunsDir = Path("runs"),
    params: Params = "total",
    as_json: Annotated[bool, typer.Option("--json", help="Print fit.json instead of a page.")] = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta, print the numbers with intervals, and write fit.json."""
    import json

    from harness.runs import write_json
    from results.claims import render_page
    from results.fit import FitError
    from results.study import describe_study

    experiment_dir = find_experiment(source, runs_dir)
    study = load_study(experiment_dir, params)
    if study.fitted is None:
        raise FitError(f"{experiment_dir}: {study.refusal}")
    facts, path = describe_study(study), experiment_dir / "results" / "fit.json"
    write_json(path, facts)
    print(json.dumps(facts, indent=1) if as_json else f"{render_page(study)}\n\nwritten to {path}")


@app.command()
def plot(source: Source, runs_dir: RunsDir = Path("runs"), params: Params = "total") -> None:
    """Draw the figures, as PNG and SVG: of an experiment, or of the coordinate check in a folder."""
    from results.plot import draw_pictures, write_pictures
    from results.table import load_curves
    from results.transfer import COORDINATES, has_sweep, load_coordinates, plot_coordinates, plot_transfer

    if (source / COORDINATES).is_file():
        for path in write_pictures([plot_coordinates(*load_coordinates(source))], source):
            print(path)
        return
    experiment_dir = find_experiment(source, runs_dir)
    study = load_study(experiment_dir, params)
    pictures = draw_pictures(study, load_curves(experiment_dir))
    pictures += [plot_transfer(study.cells)] if has_sweep(study.cells) else []
    if not pictures:
        raise ConfigError(f"{experiment_dir}: no cell has a loss yet, so there is nothing to draw; train some cells first")
    for path in write_pictures(pictures, experiment_dir / "results" / "figures"):
        print(path)


@app.command()
def transfer(source: Source, runs_dir: RunsDir = Path("runs")) -> None:
    """Print the best learning rate at each width under both parametrizations; write transfer.md and the figure."""
    from results.plot import write_pictures
    from results.table import load_cells, write_table
    from results.transfer import find_optima, has_sweep, plot_transfer, render_optima

    experiment_dir = find_experiment(source, runs_dir)
    cells, results_dir = load_cells(experiment_dir), experiment_dir / "results"
    if not has_sweep(cells):
        raise ConfigError(f"{experiment_dir}: has no sweep of at least 3 learning rates under standard and mup; train one")
    text = render_optima(find_optima(cells))
    write_table(cells, results_dir)
    (results_dir / "transfer.md").write_text(f"# Transfer across widths\n\n{text}\n")
    print(text)
    for path in write_pictures([plot_transfer(cells)], results_dir / "figures"):
        print(path)


@app.command()
def baseline(source: Source, runs_dir: RunsDir = Path("runs")) -> None:
    """Print a baseline's loss beside the video's and nanoGPT's."""
    from results.baseline import render_baseline
    from results.table import load_cells, write_table

    experiment_dir = find_experiment(source, runs_dir)
    cells = load_cells(experiment_dir)
    write_table(cells, experiment_dir / "results")
    print(render_baseline(cells))


@app.command()
def staircase(source: Source, runs_dir: RunsDir = Path("runs")) -> None:
    """Print the loss of the video's stages beside the video's values, and write staircase.md."""
    from results.staircase import list_steps, render_staircase, write_staircase
    from results.table import load_cells, write_table

    experiment_dir = find_experiment(source, runs_dir)
    cells = load_cells(experiment_dir)
    steps = list_steps(cells)
    write_table(cells, experiment_dir / "results")
    print(render_staircase(steps))
    print(f"\nwritten to {write_staircase(steps, experiment_dir / 'results')}")


@app.command()
def preflight(
    source: Source,
    runs_dir: RunsDir = Path("runs"),
    flops: Annotated[
        float | None, typer.Option(min=1.0, help="Compute whose best size is asked for; by default 10 x the grid's.")
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="fit.json of an earlier study, as the law to draw from.")] = None,
    studies: Annotated[int, typer.Option(min=20, help="Synthetic studies.")] = 300,
    sigma: Annotated[float, typer.Option(min=1e-6, help="Noise of ln L from luck alone.")] = 0.004,
    shared: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of its variance that cells of one trunk have in common.")
    ] = 0.5,
) -> None:
    """Before training: draw losses on this grid, fit them, and say what it will and will not answer."""
    from results.preflight import choose_prior, load_prior, read_grid, render_preflight, run_preflight

    plan = read_plan(source, runs_dir)
    grid = read_grid(plan)
    law = load_prior(prior) if prior else choose_prior(grid, plan.data.vocab_size)
    found = run_preflight(law, grid, flops or 10 * float(grid.flops.max()), n_studies=studies, sigma=sigma, shared=shared)
    print(render_preflight(plan.experiment, found, grid, sigma, shared, studies))


@app.command()
def suggest(
    source: Source,
    flops: Annotated[float, typer.Option(min=1.0, help="Training FLOPs to spend.")],
    runs_dir: RunsDir = Path("runs"),
    target: Annotated[str, typer.Option(help="optimum, loss or exponent.")] = "optimum",
    at: Annotated[
        float | None, typer.Option(min=1.0, help="The compute that the target is about; by default 10 x the grid's.")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option(help="fit.json whose law is believed; by default this experiment's, else a published one.")
    ] = None,
    cells: Annotated[int, typer.Option(min=1, help="At most so many.")] = 12,
    write: Annotated[Path | None, typer.Option(help="Write the cells as TOML.")] = None,
) -> None:
    """Propose the cells that shrink the interval of a target most per FLOP, beside those planned."""
    from results.preflight import choose_prior, load_prior, read_grid
    from results.suggest import render_suggestion, render_toml, suggest_cells

    plan = read_plan(source, runs_dir)
    grid, fitted = read_grid(plan), find_experiment(source, runs_dir) / "results" / "fit.json"
    path = prior or (fitted if fitted.exists() else None)
    law = load_prior(path) if path else choose_prior(grid, plan.data.vocab_size)
    found = suggest_cells(plan, law, flops, target, at or 10 * float(grid.flops.max()), at_most=cells)
    print(f"law: {path or 'published exponents'}\n{render_suggestion(found, flops)}")
    if write:
        write.write_text(render_toml(found, plan), encoding="utf-8")
        print(f"written to {write}")


@app.command()
def report(source: Source, runs_dir: RunsDir = Path("runs"), params: Params = "total") -> None:
    """Write table, fit, figures, report.html and report.md, and print a summary of five lines."""
    from harness.runs import load_plan, write_json
    from results.claims import render_summary
    from results.plot import draw_pictures, write_pictures
    from results.report import write_report
    from results.study import describe_study
    from results.table import load_curves, measure_cost, write_table

    experiment_dir = find_experiment(source, runs_dir)
    results_dir = experiment_dir / "results"
    study, curves = load_study(experiment_dir, params), load_curves(experiment_dir)
    cost = measure_cost(experiment_dir, study.cells, curves)
    write_table(study.cells, results_dir)
    write_json(results_dir / "fit.json", describe_study(study))
    pictures = draw_pictures(study, curves)
    write_pictures(pictures, results_dir / "figures")
    write_report(study, load_plan(experiment_dir), cost, pictures, results_dir)
    print(f"{results_dir}: report.html, report.md, table.csv, table.parquet, fit.json, {len(pictures)} figures in figures/")
    print(render_summary(study, cost))


def find_experiment(source: Path, runs_dir: Path) -> Path:
    """Return an experiment's folder from its file or from itself.

    Raises:
        ConfigError: neither, or the file is not an experiment.
    """
    from harness.config import load_experiment
    from harness.runs import find_experiment_dir

    if source.suffix == ".toml":
        return find_experiment_dir(runs_dir, load_experiment(source).name)
    if source.is_dir():
        return source
    raise ConfigError(f"{source}: is neither an experiment file (*.toml) nor a folder; give one of them")


def read_plan(source: Path, runs_dir: Path) -> "Plan":
    """Plan an experiment file anew, or read the frozen plan of a folder."""
    from harness.config import load_experiment
    from harness.plan import plan_experiment
    from harness.runs import load_plan

    return plan_experiment(load_experiment(source)) if source.suffix == ".toml" else load_plan(find_experiment(source, runs_dir))


def load_study(experiment_dir: Path, params: str) -> "Study":
    """Read an experiment's cells and fit them."""
    from harness.runs import load_plan
    from results.study import fit_study
    from results.table import load_cells

    return fit_study(load_plan(experiment_dir).experiment, load_cells(experiment_dir), params)


if __name__ == "__main__":
    run_command_line(app)
