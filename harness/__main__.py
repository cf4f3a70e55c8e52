"""`python -m harness`: plan an experiment, train one run of it, sample from what was trained."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harness.config import run_command_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

verify_app = typer.Typer(no_args_is_help=True, help="Check the machinery itself.", rich_markup_mode=None)
app.add_typer(verify_app, name="verify")

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file (*.toml).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: optim.lr=3e-4 (the value is TOML). Repeatable.")
]
RunsDir = Annotated[Path, typer.Option(help="Where experiments keep their runs.")]
MaxDeviceHours = Annotated[float, typer.Option(min=0.0, help="Ask before a plan that is forecast to take more.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command()
def plan(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print only; write nothing.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show new, kept and orphaned cells; write nothing.")] = False,
    show_engine: Annotated[bool, typer.Option(help="Print DeepSpeed's configuration of each run instead, as JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Measure a few steps of each size here.")] = False,
    cluster: Annotated[
        str | None, typer.Option(help="Forecast for a cluster: a name of launch/clusters, or a TOML file.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Forecast for a device, such as H100 or CPU.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of a device-hour.")] = None,
    max_device_hours: MaxDeviceHours = 100.0,
    yes: Yes = False,
) -> None:
    """Resolve an experiment into runs and cells, check and price them, and freeze them in runs/<name>/plan.json."""
    from harness.config import load_experiment
    from harness.cost import describe_here, forecast_plan, load_machine
    from harness.outlook import compare_plan, confirm_cost, print_plan, render_difference
    from harness.plan import plan_experiment
    from harness.runs import find_experiment_dir, write_plan
    from harness.zero import show_zero_configs

    loaded = load_experiment(experiment, overrides)
    planned, machine = plan_experiment(loaded), load_machine(cluster) if cluster else describe_here()
    if show_engine:
        print(show_zero_configs(planned))
        return
    if diff:
        folder = find_experiment_dir(runs_dir, planned.experiment)
        print(render_difference(compare_plan(planned, folder), folder))
        return
    given = {"device": device, "n_devices": devices or (1 if device else None), "price_per_device_hour": price or None}
    machine = machine.model_copy(update={key: value for key, value in given.items() if value is not None})
    measured = None
    if probe:
        from harness.probe import probe_sizes  # here, since torch comes with it

        measured = probe_sizes(planned)
    planned = forecast_plan(planned, machine, measured)
    print_plan(planned, loaded)
    if loaded.data.on_paper is not None:
        print("on paper: there is no data to train on, so no plan is written")
    elif not dry_run:
        assert planned.forecast is not None
        confirm_cost(planned.forecast, max_device_hours, yes)
        print(f"plan written to {write_plan(planned, runs_dir) / 'plan.json'}")


@app.command()
def train(
    run_dir: Annotated[Path, typer.Argument(help="runs/<experiment>/<run_id>, as the plan wrote it.")],
    allow_reshape: Annotated[bool, typer.Option(help="Cut ZeRO's parts anew for another number of ranks.")] = False,
) -> None:
    """Train one run in this process (under torchrun: torchrun ... -m harness.train <run dir>)."""
    from harness.train import run_attempt

    sys.exit(run_attempt(run_dir, None, None, allow_reshape=allow_reshape))


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="A run's, a cell's or a checkpoint's folder.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 500,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the fewest tokens that hold this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Texts to write, side by side in one batch.")] = 1,
) -> None:
    """Let a trained model write; a single text is shown as it is written. Ctrl-C ends it, and what is written stays."""
    from harness.sample import sample_text
    from model.generate import Draw

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    texts = sample_text(source, prompt, tokens, Draw(temperature, top_k, top_p), seed, n_samples=samples, show=show)
    print("" if samples == 1 else "\n---\n".join(texts))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's, a cell's or a checkpoint's folder.")],
    folder: Annotated[Path, typer.Option("--to", help="Where config.json and model.safetensors go.")],
) -> None:
    """Write a trained model in Hugging Face format: gpt2 and nanogpt as GPT-2, modern as Qwen3."""
    from harness.sample import load_trained
    from model.huggingface import export_model

    print(f"{folder}: {export_model(load_trained(source)[1], folder)}, for AutoModelForCausalLM.from_pretrained")


@app.command()
def mirror(
    run_dir: Annotated[Path, typer.Argument(help="runs/<experiment>/<run_id>.")],
    mode: Annotated[str, typer.Option(help="online sends; offline writes folders for wandb sync.")] = "online",
) -> None:
    """Send a run's metrics to wandb, again or for the first time; what wandb holds already is not sent twice."""
    from harness.config import ConfigError
    from harness.wandb_mirror import Watch, mirror_run

    if mode not in ("online", "offline"):
        raise ConfigError(f"--mode={mode}, is not one; use online or offline")
    mirror_run(run_dir, "online" if mode == "online" else "offline", Watch(None, None))


@app.command()
def bench(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment file (*.toml); none beside --nanogpt.")] = None,
    overrides: Overrides = None,
    size: Annotated[str | None, typer.Option(help="Which size of the grid, such as l6-h6-d384; the largest otherwise.")] = None,
    engines: Annotated[str, typer.Option(help="Of torch, zero0 to zero3, with commas; the experiment's otherwise.")] = "",
    precisions: Annotated[str, typer.Option(help="Of fp32, bf16_autocast, bf16_native, with commas.")] = "",
    compiled: Annotated[str, typer.Option("--compile", help="off, on or both.")] = "off",
    micro_batches: Annotated[str, typer.Option(help="Numbers with commas, or search: halve the global batch.")] = "",
    share: Annotated[str, typer.Option(help="Cells at a time, with commas: 1,2,4,8.")] = "",
    profile: Annotated[bool, typer.Option(help="Print where the time of a step goes.")] = False,
    probe: Annotated[bool, typer.Option(help="Only say from 20 steps how long the rest of the experiment will take.")] = False,
    own_work: Annotated[bool, typer.Option(help="Time what the loop itself takes for a step, without a model.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append the rows to this file of JSON lines.")] = None,
    nanogpt: Annotated[Path | None, typer.Option(help="A checkout of nanoGPT to time beside ours, on this CPU.")] = None,
    trainer: Annotated[
        Path | None, typer.Option(help="With --nanogpt: the whole trainer beside train.py, both on this prepared data.")
    ] = None,
    shape: Annotated[str, typer.Option(help="With --nanogpt: toy, char or bpe.")] = "toy",
    at_once: Annotated[int, typer.Option(min=1, help="With --trainer: processes at a time.")] = 1,
    blocks: Annotated[int, typer.Option(min=2, help="Timed blocks of each side, in turn.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a process.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="With --nanogpt: compare losses after this many equal batches.")] = 400,
) -> None:
    """Time a cell of an experiment over engines, precisions, compilation and micro-batches; or ours beside nanoGPT."""
    from harness.config import ConfigError

    if nanogpt is not None:
        from harness.bench_report import report_nanogpt

        report_nanogpt(nanogpt, shape, blocks, threads, steps, at_once=at_once, data_dir=trainer)
    elif experiment is None:
        raise ConfigError("bench: there is nothing to time; give an experiment file, or --nanogpt with a checkout")
    else:
        from harness.bench_report import Choice, report_cell, report_own_work, report_probe
        from harness.config import load_experiment
        from harness.plan import plan_experiment

        planned = plan_experiment(load_experiment(experiment, overrides))
        if probe:
            report_probe(planned, Path("runs"))
        elif own_work:
            report_own_work(planned, size)
        else:
            choice = Choice(size, engines, precisions, compiled, micro_batches, share)
            report_cell(planned, choice, n_blocks=blocks, n_threads=threads, profiled=profile, json_file=json_file)


@verify_app.command()
def width(
    to: Annotated[Path, typer.Option(help="Where coordinate_check.json goes.")] = Path("runs/verify/width"),
) -> None:
    """Coordinate check: do activations keep their scale as width grows? Draw it with python -m results plot."""
    verify_axis(to, "d_model")


@verify_app.command()
def depth(
    to: Annotated[Path, typer.Option(help="Where coordinate_check.json goes.")] = Path("runs/verify/depth"),
) -> None:
    """The same as depth grows, with base_n_layer under mup."""
    verify_axis(to, "n_layer")


def verify_axis(to: Path, axis: Literal["d_model", "n_layer"]) -> None:
    """Run a coordinate check, write it and print how the changes grew."""
    from harness.verify import render_growth, write_check

    path, facts = write_check(to, axis)
    print(render_growth(facts))
    print(f"written to {path}; draw it: python -m results plot {to}")


@verify_app.command()
def parallel(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each case.")] = 50,
    to: Annotated[Path, typer.Option(help="Where table.json, table.md and each case's files go.")] = Path("runs/verify/parallel"),
) -> None:
    """Train the cheapest cell on every engine, 1 and 2 ranks, and compare each step with one torch process."""
    from harness.config import load_experiment
    from harness.parity import render_markdown, verify_parallel
    from harness.plan import plan_experiment

    rows = verify_parallel(plan_experiment(load_experiment(experiment, overrides)), to, steps)
    tell_verdicts(rows, render_markdown(rows), {"format": "scaling-harness-parity", "format_version": 1, "steps": steps}, to)


@verify_app.command()
def resume(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=6, help="Optimiser steps of each case.")] = 50,
    to: Annotated[Path, typer.Option(help="Where table.json, table.md and each case's files go.")] = Path("runs/verify/resume"),
) -> None:
    """Kill and stop the smallest cell's training on every engine; it must end to the bit as if left alone."""
    from harness.config import load_experiment
    from harness.interruption import render_markdown, verify_resume

    rows = verify_resume(load_experiment(experiment, overrides), to, steps)
    tell_verdicts(rows, render_markdown(rows), {"format": "scaling-harness-resume", "format_version": 1, "steps": steps}, to)


def tell_verdicts(rows: list[dict[str, Any]], table: str, head: dict[str, Any], to: Path) -> None:
    """Write a check's rows and its table, print that, and end with 1 where a row that must hold does not."""
    from harness.parity import has_failed
    from harness.runs import write_json

    write_json(to / "table.json", {**head, "rows": rows})
    (to / "table.md").write_text(table + "\n")
    print(f"{table}\nwritten to {to}")
    sys.exit(1 if has_failed(rows) else 0)


if __name__ == "__main__":
    run_command_line(app)
