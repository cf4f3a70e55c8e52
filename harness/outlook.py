"""The plan as a page."""

import sys

from harness.records import Plan


def print_plan(plan: Plan) -> None:
    """Print one line per cell, and the totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=f"{plan.experiment}: {len(plan.cells)} cells in {len(plan.runs)} runs", title_justify="left")
    table.add_column("cell", no_wrap=True)
    for column in ("parameters", "tokens", "asked for", "steps", "cooldown", "epochs", "FLOPs"):
        table.add_column(column, justify="right")
    table.add_column("role")
    for cell in plan.cells:
        table.add_row(
            cell.cell_id,
            f"{cell.n_params:,}",
            f"{cell.tokens:,}",
            f"{cell.requested_tokens:,}",
            f"{cell.n_steps:,}",
            f"{cell.n_cooldown_steps:,}",
            f"{cell.epochs:.2f}",
            f"{cell.flops:.2e}",
            cell.role,
        )
    console.print(table)
    alone, shared = sum(cell.flops for cell in plan.cells), sum(run.flops for run in plan.runs)
    print(f"training FLOPs {shared:.3g}; {alone:.3g} without shared trunks ({shared / alone:.2f}x)")
    repeated = sum(cell.epochs > 1 for cell in plan.cells)
    print(f"data: {plan.data.source}, {plan.data.train_tokens:,} training tokens; {repeated} cells repeat some of it")
