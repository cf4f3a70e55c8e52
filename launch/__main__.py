"""`python -m launch`: run an experiment, and see how far it is."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.config import run_command_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file (*.toml).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: optim.lr=3e-4 (the value is TOML). Repeatable.")
]
RunsDir = Annotated[Path, typer.Option(help="Where experiments keep their runs.")]


@app.command()
def submit(
    experiment: ExperimentFile,
    cluster: Annotated[str, typer.Option(help="A name of launch/clusters, or a TOML file.")] = "local",
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    max_device_hours: Annotated[
        float, typer.Option(min=0.0, help="Ask before an experiment that is forecast to take more.")
    ] = 100.0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Plan an experiment and train all of it that is not finished. Ctrl-C saves and stops; submit again to go on."""
    from harness.config import ConfigError, load_experiment
    from harness.cost import describe_here, forecast_plan
    from harness.outlook import confirm_cost
    from harness.plan import plan_experiment
    from harness.runs import find_experiment_dir, list_pending_cells, write_plan
    from launch.cluster import load_cluster
    from launch.local import submit as submit_local

    place = load_cluster(cluster)
    loaded = load_experiment(experiment, overrides)
    if loaded.data.on_paper is not None:
        raise ConfigError(f"{experiment.name}: data.on_paper, there is nothing to train on; prepare data and give data.dir")
    plan = forecast_plan(plan_experiment(loaded), place.machine or describe_here())
    experiment_dir = find_experiment_dir(runs_dir, plan.experiment)
    if any(list_pending_cells(experiment_dir / run.run_id, run) for run in plan.runs):
        for finding in plan.findings:
            print(f"warning: {finding.rule} ({finding.field}): {finding.message}")
        assert plan.forecast is not None
        confirm_cost(plan.forecast, max_device_hours, yes)
    sys.exit(submit_local(plan, write_plan(plan, runs_dir), place))


@app.command()
def status(experiment: ExperimentFile, runs_dir: RunsDir = Path("runs")) -> None:
    """Show every run of an experiment: state, progress, loss, rate, attempts, and the cause of a failure."""
    from rich.console import Console

    from harness.config import load_experiment
    from harness.runs import find_experiment_dir, load_plan
    from launch.progress import read_progress, render_page

    experiment_dir = find_experiment_dir(runs_dir, load_experiment(experiment).name)
    plan = load_plan(experiment_dir)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(render_page(plan.experiment, read_progress(experiment_dir, plan)))


if __name__ == "__main__":
    run_command_line(app)
