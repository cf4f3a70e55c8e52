"""`python -m harness`: plan an experiment, train one run of it, sample from what was trained."""

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
def plan(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option(help="Print only; write nothing.")] = False,
) -> None:
    """Resolve an experiment into runs and cells, print them, and freeze them in runs/<name>/plan.json."""
    from harness.config import load_experiment
    from harness.plan import plan_experiment, print_plan
    from harness.runs import write_plan

    planned = plan_experiment(load_experiment(experiment, overrides))
    print_plan(planned)
    if not dry_run:
        print(f"plan written to {write_plan(planned, runs_dir) / 'plan.json'}")


@app.command()
def train(
    run_dir: Annotated[Path, typer.Argument(help="runs/<experiment>/<run_id>, as the plan wrote it.")],
) -> None:
    """Train one run in this process (under torchrun: torchrun ... -m harness.train <run dir>)."""
    from harness.train import run_attempt

    sys.exit(run_attempt(run_dir, None, None))


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="A run's or a finished cell's folder.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 500,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 0,
) -> None:
    """Let a trained model write."""
    from harness.sample import sample_text

    print(sample_text(source, prompt, tokens, temperature, top_k, seed))


if __name__ == "__main__":
    run_command_line(app)
