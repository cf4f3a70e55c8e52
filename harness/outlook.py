"""The plan as a page: its cells, what each size needs, what varies, what to doubt, what it takes, what changed. No torch."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.config import ConfigError, Experiment
from harness.lint import sort_fields
from harness.records import CellRecord, Forecast, Plan, SizeForecast
from harness.zero import list_cautions
from model.ladder import format_count

MAX_ROWS = 60  # more cells are shown size by size
MAX_NAMED = 20
WIDTH = 170  # where no terminal says how wide


def print_plan(plan: Plan, experiment: Experiment) -> None:
    """Print the whole page."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(tabulate_cells(plan) if len(plan.cells) <= MAX_ROWS else tabulate_groups(plan))
    if plan.forecast is not None:
        console.print(tabulate_sizes(plan.forecast))
    print("\n".join([*describe_fields(plan, experiment), *describe_findings(plan), *describe_totals(plan)]))


def start_table(title: str, first: str, columns: Sequence[str]) -> Table:
    """Return a table whose first column is a name and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def tabulate_cells(plan: Plan) -> Table:
    """Return one line for each cell."""
    title = f"{plan.experiment}: {len(plan.cells)} cells in {len(plan.runs)} runs"
    columns = (
        "parameters",
        "tokens",
        "rounded by",
        "steps",
        "cooldown",
        "D/N",
        "epochs",
        "lr",
        "batch",
        "FLOPs",
        "6ND",
        "device h",
        "role",
    )
    table = start_table(title, "cell", columns)
    hours = {cell.cell_id: cell.device_s / 3600 for cell in plan.forecast.cells} if plan.forecast else {}
    for cell in plan.cells:
        table.add_row(
            cell.cell_id,
            format_count(cell.n_params),
            format_count(cell.tokens),
            f"{cell.tokens / cell.requested_tokens - 1:+.2%}",
            f"{cell.n_steps:,}",
            f"{cell.n_cooldown_steps:,}",
            f"{cell.tokens / cell.n_params:.3g}",
            f"{cell.epochs:.2f}",
            f"{cell.lr:.3g}",
            f"{cell.global_batch_size:,}",
            f"{cell.flops:.2e}",
            f"{cell.flops_6nd:.2e}",
            f"{hours[cell.cell_id]:.3g}" if hours else "",
            cell.role,
        )
    return table


def tabulate_groups(plan: Plan) -> Table:
    """Return one line for each size and role, where there are too many cells."""
    groups: dict[tuple[str, str], list[CellRecord]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.size, cell.role), []).append(cell)
    title = f"{plan.experiment}: {len(plan.cells):,} cells in {len(plan.runs):,} runs, by size"
    table = start_table(title, "size", ("cells", "N", "fewest tokens", "most tokens", "most steps", "FLOPs", "role"))
    for (size, role), cells in groups.items():
        tokens = [cell.tokens for cell in cells]
        steps, flops = max(cell.n_steps for cell in cells), sum(cell.flops for cell in cells)
        counts = (f"{len(cells):,}", format_count(cells[0].n_params), f"{min(tokens):,}", f"{max(tokens):,}", f"{steps:,}")
        table.add_row(size, *counts, f"{flops:.2e}", role)
    return table


def tabulate_sizes(forecast: Forecast) -> Table:
    """Return what a step of each size needs on one rank; by ZeRO stage the largest micro-batch that fits, and its peak."""
    title = (
        f"one rank of each size on {forecast.device}: memory in GiB, seconds a step ({forecast.basis}), "
        "micro-batch in sequences; by ZeRO stage the largest that fits, and its peak"
    )
    columns = ["batch", "ranks", "micro", "state", "activations", "logits", "peak", "compute", "links", "step"]
    table = start_table(title, "size", [*columns, *(f"ZeRO-{stage.zero_stage}" for stage in forecast.sizes[0].stages)])
    for size in forecast.sizes[:MAX_ROWS]:
        memory = size.memory
        state = memory["weights"] + memory["gradients"] + memory["optimizer"]
        gib = [f"{value / 2**30:.3g}" for value in (state, memory["activations"], memory["logits"], memory["peak"])]
        micro = f"{size.micro_batch_size} x {size.n_micro_steps}" + ("" if size.fits else " *")
        seconds = [f"{value:.3g}" for value in (size.compute_s, size.communication_s, size.step_s)]
        stages = [
            f"{stage.micro_batch_size}: {stage.peak_bytes / 2**30:.3g}" if stage.micro_batch_size else "no"
            for stage in size.stages
        ]
        table.add_row(size.size, f"{size.global_batch_size:,}", f"{size.world_size:,}", micro, *gib, *seconds, *stages)
    return table


def describe_fields(plan: Plan, experiment: Experiment) -> Iterator[str]:
    """Yield what varies and what follows from a rule; everything else is equal, or the lint would have stopped."""
    kinds = sort_fields(plan, experiment)
    for kind in ("meant to vary", "derived by a rule"):
        yield f"{kind}: {', '.join(kinds[kind]) or 'nothing'}"
    yield "equal in all cells: every other field"


def describe_findings(plan: Plan) -> Iterator[str]:
    """Yield what the lint and the forecast warn of."""
    cautions = list_cautions(plan)
    yield "warnings:" if plan.findings or cautions else "warnings: none"
    yield from (f"  {caution}" for caution in cautions)
    yield from (f"  {finding.rule} ({finding.field}): {finding.message}" for finding in plan.findings)
    for size in plan.forecast.sizes if plan.forecast else ():
        if not size.fits:
            yield f"  memory (engine.micro_batch_size): {size.size}: {describe_misfit(size)}"


def describe_misfit(size: SizeForecast) -> str:
    """Say what to do about a micro-batch that does not fit."""
    stages = [str(stage.zero_stage) for stage in size.stages if stage.micro_batch_size]
    helpful = f"; ZeRO stage {' or '.join(stages)} has room" if stages else "; no ZeRO stage has room"
    needed = f"needs {size.memory['peak'] / 2**30:.3g} GiB at {size.micro_batch_size} sequence(s)"
    return f"the planned micro-batch does not fit; * {needed}{helpful}"


def describe_totals(plan: Plan) -> Iterator[str]:
    """Yield FLOPs, data, and what it all takes."""
    alone, shared = sum(cell.flops for cell in plan.cells), sum(run.flops for run in plan.runs)
    six = sum(cell.flops_6nd for cell in plan.cells)
    yield f"training FLOPs: {shared:.3g}; without shared trunks {alone:.3g} ({shared / alone:.2f}x), as 6ND {six:.3g}"
    repeated = sum(cell.epochs > 1 for cell in plan.cells)
    yield f"data: {plan.data.source}, {plan.data.train_tokens:,} training tokens; {repeated} cells repeat some of it"
    if plan.forecast is not None:
        yield describe_forecast(plan.forecast)


def describe_forecast(forecast: Forecast) -> str:
    """Say in one line what a plan takes."""
    price = f", price {forecast.price:,.2f}" if forecast.price is not None else ""
    return (
        f"forecast ({forecast.basis}): {forecast.device_hours:,.3g} device-hours, {format_wall(forecast.wall_s)} on "
        f"{forecast.n_devices:,} x {forecast.device}{price}, up to {forecast.disk_bytes / 1e9:,.3g} GB of disk"
    )


def format_wall(seconds: float) -> str:
    """Write a wall time in its largest fitting unit."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def confirm_cost(forecast: Forecast, max_device_hours: float, yes: bool) -> None:
    """Ask before much is spent, where somebody can answer.

    Raises:
        ConfigError: it is more than the limit, and nobody said yes.
    """
    if yes or forecast.device_hours <= max_device_hours:
        return
    said = f"forecast: {forecast.device_hours:,.3g} device-hours, more than the limit of {max_device_hours:g}"
    if not (sys.stdin.isatty() and input(f"{said}; go on? [y/N] ").strip().lower() in ("y", "yes")):
        raise ConfigError(f"{said}; add --yes, or raise --max-device-hours")


@dataclass(frozen=True)
class Difference:
    """How a plan differs from what lies in its experiment's folder. Done cells among the kept and the orphaned are counted."""

    new: tuple[str, ...]
    kept: tuple[str, ...]
    orphaned: tuple[str, ...]
    done: frozenset[str]


def compare_plan(plan: Plan, experiment_dir: Path) -> Difference:
    """Compare a plan's cells with those in the folder."""
    folders = {path.name: path for path in experiment_dir.glob("*/cells/*")}
    planned = [cell.cell_id for cell in plan.cells]
    return Difference(
        new=tuple(cell_id for cell_id in planned if cell_id not in folders),
        kept=tuple(cell_id for cell_id in planned if cell_id in folders),
        orphaned=tuple(sorted(set(folders) - set(planned))),
        done=frozenset(cell_id for cell_id, path in folders.items() if (path / "summary.json").exists()),
    )


def render_difference(difference: Difference, experiment_dir: Path) -> str:
    """Write new, kept and orphaned cells; what is orphaned stays on disk."""
    lines = [f"against {experiment_dir}:"]
    for mark, kind, cells in (
        ("+", "new", difference.new),
        ("=", "kept", difference.kept),
        ("-", "orphaned", difference.orphaned),
    ):
        done = sum(cell in difference.done for cell in cells)
        left = "; no plan asks for them, nothing deletes them" if kind == "orphaned" and cells else ""
        lines.append(f"  {len(cells):,} {kind}{f', {done:,} of them done' if kind != 'new' else ''}{left}")
        if kind != "kept":
            lines += [f"    {mark} {cell}{' (done)' if cell in difference.done else ''}" for cell in cells[:MAX_NAMED]]
            lines += [f"    {mark} and {len(cells) - MAX_NAMED:,} more"] if len(cells) > MAX_NAMED else []
    return "\n".join(lines)
