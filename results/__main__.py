"""`python -m results`: from an experiment's runs to one table, a fitted law, pictures and a report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.config import ConfigError, run_command_line
from results.sources import find_experiment, find_law, fit_loaded, load_study, load_table, read_fixed, read_plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

Source = Annotated[
    Path, typer.Argument(help="An experiment file (*.toml), or an experiment's folder (runs/<name>).", show_default=False)
]
RunsDir = Annotated[Path, typer.Option(help="Where experiments keep their runs; for an experiment file.")]
Params = Annotated[
    Literal["total", "non_embedding", "matmul"], typer.Option(help="What N counts: n_params, or one of the others.")
]


OptionalSource = Annotated[
    Path | None,
    typer.Argument(
        help="An experiment file (*.toml), an experiment's folder (runs/<name>), or a folder of them.", show_default=False
    ),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Anyone's table instead: CSV, TSV or Parquet, a finished cell a row.")]
Mapping = Annotated[
    list[str] | None,
    typer.Option("--map", help='A column of --csv: "ours=theirs", "n_params=Size (B) * 1e9", "val_loss=ln(ppl)". Repeatable.'),
]
Where = Annotated[list[str] | None, typer.Option(help='Fit only such rows of --csv: "dataset=rpj", "loss<4". Repeatable.')]
HoldOut = Annotated[list[str] | None, typer.Option(help='Hold such rows of --csv out of the fit and score them: "flops>1e21".')]
Out = Annotated[Path | None, typer.Option(help="Folder for what is written. Default: the experiment's results folder.")]


@app.command()
def table(
    source: OptionalSource = None,
    csv: Csv = None,
    mapping: Mapping = None,
    where: Where = None,
    hold_out: HoldOut = None,
    runs_dir: RunsDir = Path("runs"),
    out: Out = None,
) -> None:
    """Write table.csv and table.parquet: one row for every planned cell, or for every row of a foreign table."""
    from results.table import write_table

    loaded = load_table(source, csv, mapping, where, hold_out, runs_dir)
    cells = loaded.cells
    for path in write_table(cells, out or loaded.results_dir or Path(f"{loaded.name}-results")):
        print(path)
    print(f"{len(cells)} cells, {int((cells['state'] == 'done').sum())} done, {int(cells['excluded'].sum())} left out of a fit")
    hashes = cells["code_hash"].dropna().unique()
    if len(hashes) > 1:
        print(f"warning: cells were trained by {len(hashes)} versions of the code: {', '.join(sorted(hashes))}")
    for warning in loaded.warnings:
        print(f"warning: {warning}")


@app.command()
def fit(
    source: OptionalSource = None,
    csv: Csv = None,
    mapping: Mapping = None,
    where: Where = None,
    hold_out: HoldOut = None,
    runs_dir: RunsDir = Path("runs"),
    params: Params = "total",
    law: Annotated[
        str, typer.Option(help="chinchilla, tied, kaplan_n[_floor], kaplan_d[_floor], kaplan_nd[_floor], repeated.")
    ] = "chinchilla",
    objective: Annotated[Literal["log_huber", "log_mse", "mse"], typer.Option(help="What is minimised.")] = "log_huber",
    delta: Annotated[float, typer.Option(min=1e-9, help="Where log_huber turns from squares to sizes, in ln L.")] = 1e-3,
    loss: Annotated[Literal["val_loss", "val_bpb"], typer.Option(help="Nats per token, or bits per byte.")] = "val_loss",
    fix: Annotated[list[str] | None, typer.Option(help='Hold a parameter fixed: "E=1.69". Repeatable.')] = None,
    by_noise: Annotated[bool, typer.Option("--by-noise", help="Weight cells by seed noise, where cells repeat.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print fit.json instead of a page.")] = False,
    out: Out = None,
) -> None:
    """Fit a law; print it with intervals, doubts and hold-out score; write fit.json (of a foreign table, with --out)."""
    import json
    from dataclasses import replace

    from harness.runs import write_json
    from results.descend import OBJECTIVES
    from results.page import describe_page, diagnose_study, fit_frontiers, render_page
    from results.study import Choices

    chosen = replace(OBJECTIVES[objective], delta=delta) if objective == "log_huber" else OBJECTIVES[objective]
    form = find_law(law)
    choices = Choices(params, form, chosen, loss, by_noise, read_fixed(form, fix or []))
    loaded = load_table(source, csv, mapping, where, hold_out, runs_dir)
    study, _ = fit_loaded(loaded, choices)
    diagnosis, frontiers = diagnose_study(study), fit_frontiers(study)
    facts, results_dir = describe_page(study, diagnosis, frontiers), out or loaded.results_dir
    if results_dir is not None:
        results_dir.mkdir(parents=True, exist_ok=True)
        write_json(results_dir / "fit.json", facts)
    written = f"\n\nwritten to {results_dir / 'fit.json'}" if results_dir is not None else ""
    print(json.dumps(facts, indent=1) if as_json else f"{render_page(study, diagnosis, frontiers)}{written}")


@app.command()
def bench(
    csv: Csv = None,
    mapping: Mapping = None,
    where: Where = None,
    starts: Annotated[int, typer.Option(min=1, max=4500, help="How many of the recipe's 4,500 starts are run.")] = 45,
    bootstraps: Annotated[int, typer.Option(min=1, max=4000, help="How many of its 4,000 bootstraps.")] = 40,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Race fit and bootstraps against the published recipe, on cells of --csv or simulated ones."""
    from results.external import load_external
    from results.race import render_race, run_race, simulate_points

    cells = simulate_points()
    if csv is not None:
        table = load_external(csv, mapping or [], where or []).cells
        kept = table[~table["excluded"]]
        cells = {name: kept[name].to_numpy(float) for name in ("n_params", "tokens", "val_loss")}
    print(f"{len(cells['val_loss'])} cells; medians of {rounds} round(s), both sides in turn; CPU seconds of this process")
    print(render_race(run_race(cells, starts, bootstraps, rounds)))


@app.command()
def plot(source: Source, runs_dir: RunsDir = Path("runs"), params: Params = "total") -> None:
    """Draw the figures, as PNG, SVG and PDF: of an experiment, or of the coordinate check in a folder."""
    from harness.runs import load_plan
    from results.plot import draw_pictures, write_pictures
    from results.plot_compute import draw_compute
    from results.table import load_curves
    from results.transfer import COORDINATES, has_sweep, load_coordinates, plot_coordinates, plot_transfer

    if (source / COORDINATES).is_file():
        for path in write_pictures([plot_coordinates(*load_coordinates(source))], source):
            print(path)
        return
    experiment_dir = find_experiment(source, runs_dir)
    study = load_study(experiment_dir, params)
    curves = load_curves(experiment_dir)
    pictures = draw_pictures(study, curves) + draw_compute(study, curves, load_plan(experiment_dir))
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
    from results.page import describe_page, diagnose_study, fit_frontiers
    from results.plot import draw_pictures, write_pictures
    from results.plot_compute import draw_compute
    from results.predict import score_experiment
    from results.report import Evidence, write_report
    from results.table import load_curves, measure_cost, write_table

    experiment_dir = find_experiment(source, runs_dir)
    results_dir = experiment_dir / "results"
    study, curves = load_study(experiment_dir, params), load_curves(experiment_dir)
    cost = measure_cost(experiment_dir, study.cells, curves)
    write_table(study.cells, results_dir)
    frontiers = fit_frontiers(study)
    write_json(results_dir / "fit.json", describe_page(study, diagnose_study(study), frontiers))
    plan = load_plan(experiment_dir)
    pictures = draw_pictures(study, curves) + draw_compute(study, curves, plan)
    write_pictures(pictures, results_dir / "figures")
    scores = score_experiment(experiment_dir, study.cells)
    write_report(study, Evidence(plan, cost, pictures, frontiers, scores), results_dir)
    print(f"{results_dir}: report.html, report.md, table.csv, table.parquet, fit.json, {len(pictures)} figures in figures/")
    print(render_summary(study, cost))


@app.command()
def diagnose(
    source: OptionalSource = None,
    csv: Csv = None,
    mapping: Mapping = None,
    where: Where = None,
    hold_out: HoldOut = None,
    runs_dir: RunsDir = Path("runs"),
    params: Params = "total",
    out: Out = None,
) -> None:
    """Say what to doubt about a fit: identification, influence, hold-out, residuals, other specifications; draw them."""
    from results.diagnose import diagnose, render_diagnosis
    from results.plot import write_pictures
    from results.plot_diagnosis import draw_diagnosis
    from results.study import Choices

    loaded = load_table(source, csv, mapping, where, hold_out, runs_dir)
    study, fitted = fit_loaded(loaded, Choices(params))
    diagnosis = diagnose(study.kept, fitted, study.convention)
    text, results_dir = render_diagnosis(study.name, diagnosis), out or loaded.results_dir
    print(text)
    if results_dir is not None:
        results_dir.mkdir(parents=True, exist_ok=True)
        (results_dir / "diagnosis.md").write_text(f"```\n{text}\n```\n")
        for path in write_pictures(draw_diagnosis(diagnosis), results_dir / "figures"):
            print(path)


@app.command()
def allocate(
    source: OptionalSource = None,
    flops: Annotated[float | None, typer.Option(help="Split this budget.")] = None,
    loss: Annotated[float | None, typer.Option(help="Find the cheapest way to this loss.")] = None,
    served_tokens: Annotated[float, typer.Option(help="Tokens that the model will serve; they cost 2 N each.")] = 0.0,
    csv: Csv = None,
    mapping: Mapping = None,
    where: Where = None,
    runs_dir: RunsDir = Path("runs"),
    params: Params = "total",
) -> None:
    """Say which model to train, on how many tokens, for a budget or for a loss, with intervals."""
    from results.decide import decide_budget, decide_loss, render_decision
    from results.study import Choices

    if (flops is None) == (loss is None):
        raise ConfigError("allocate: give a budget with --flops or a loss with --loss, and not both")
    study, fitted = fit_loaded(load_table(source, csv, mapping, where, None, runs_dir), Choices(params))
    if flops is not None:
        decision = decide_budget(fitted, flops, served_tokens)
    else:
        decision = decide_loss(fitted, loss or 0.0, served_tokens)
    print(render_decision(decision, study.convention))


@app.command()
def coverage(
    to: Annotated[Path, typer.Option(help="Folder for coverage.csv and coverage.md.")],
    studies: Annotated[int, typer.Option(min=1, help="Simulated studies for each design.")] = 2000,
    seed: int = 0,
) -> None:
    """Measure how often 95% intervals hold the truth, on grids with and without shared trunks; minutes."""
    from results.coverage import measure_all, render_coverage, write_coverage

    found = measure_all(studies, seed)
    print(render_coverage(found))
    for path in write_coverage(found, to):
        print(path)


@app.command()
def lessons(
    to: Annotated[Path, typer.Option(help="Folder for README.md and its figures.")],
    fixtures: Annotated[Path, typer.Option(envvar="HARNESS_FIXTURES", help="The folder of published points.")],
) -> None:
    """Compute what published data sets teach about fits, and write the page with its figures."""
    from results.lessons import write_lessons

    for path in write_lessons(fixtures, to):
        print(path)


@app.command()
def predict(source: Source, runs_dir: RunsDir = Path("runs"), params: Params = "total") -> None:
    """Seal the losses of held-out cells before they are trained: write predictions/<n>.json and print its digest."""
    from harness.runs import load_plan
    from results.predict import seal_predictions

    experiment_dir = find_experiment(source, runs_dir)
    path, seal = seal_predictions(load_study(experiment_dir, params), load_plan(experiment_dir), experiment_dir)
    for one in seal["predictions"]:
        print(
            f"{one['cell_id']}: {one['loss']:.4f} ({one['low']:.4f} to {one['high']:.4f}), {one['reach']:.2g}x the fitted compute"
        )
    print(f"{path}\ndigest {seal['digest']}")
    print("commit the file (git add --force), or its digest in a message, before the cells are trained")


@app.command()
def score(source: Source, runs_dir: RunsDir = Path("runs")) -> None:
    """Set sealed predictions beside what was trained: of an experiment, or of every one in a folder; write score.json."""
    from dataclasses import asdict

    from harness.runs import write_json
    from results.predict import render_scores, score_studies

    folder = find_experiment(source, runs_dir)
    scores = score_studies(folder)
    if (folder / "plan.json").exists():
        (folder / "results").mkdir(exist_ok=True)
        write_json(folder / "results" / "score.json", {"scores": [asdict(one) for one in scores]})
    print(render_scores(scores))


@app.command()
def compare(one: Source, other: Source, runs_dir: RunsDir = Path("runs"), params: Params = "total") -> None:
    """Set two studies side by side: their numbers, whether these can be told apart, and what else differs."""
    from results.compare import compare_studies

    first, second = (load_study(find_experiment(source, runs_dir), params) for source in (one, other))
    print(compare_studies(first, second))


if __name__ == "__main__":
    run_command_line(app)
