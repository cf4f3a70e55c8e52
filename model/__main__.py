"""`python -m model`: look at sizes before training any."""

import sys
from typing import Annotated

import typer

from model.ladder import PUBLISHED, format_count, iter_ladder, parse_count, published_model
from model.size import ModelConfig, SizeError, count_flops, count_params

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)


@app.command()
def ladder(
    smallest: Annotated[str, typer.Option("--from", help="Fewest non-embedding parameters.")] = "0.01M",
    largest: Annotated[str, typer.Option("--to", help="Most non-embedding parameters.")] = "10M",
    preset: Annotated[str, typer.Option(help="video, nanogpt or gpt2.")] = "nanogpt",
    aspect: Annotated[int, typer.Option(min=1, help="d_model / n_layer, before rounding to whole heads.")] = 32,
    d_head: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 16,
    vocab_size: Annotated[int, typer.Option(min=1)] = 65,
    seq_len: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Print a ladder of sizes: parameters by component and training FLOPs per token."""
    configs = iter_ladder(
        parse_count(smallest),
        parse_count(largest),
        preset=preset,
        aspect=aspect,
        d_head=d_head,
        vocab_size=vocab_size,
        seq_len=seq_len,
    )
    print_sizes([(config.size, config) for config in configs], f"{preset}, vocabulary {vocab_size:,}, seq_len {seq_len:,}")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help=f"A published size: {', '.join(PUBLISHED)}.")],
) -> None:
    """Print one published model: every option, parameters and FLOPs by component."""
    config = published_model(name)
    print_sizes([(name, config)], f"{name}")
    typer.echo("\n".join(f"  {key} = {value}" for key, value in config.model_dump().items()))


def print_sizes(rows: list[tuple[str, ModelConfig]], title: str) -> None:
    """Print one line per model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, header_style="bold", title_justify="left")
    table.add_column("size")
    for column in (
        "total",
        "non-embedding",
        "matmul",
        "tokens emb.",
        "positions",
        "attention",
        "MLP",
        "norms",
        "head",
        "FLOPs/token",
        "6N/exact",
    ):
        table.add_column(column, justify="right")
    for name, config in rows:
        params, flops = count_params(config), count_flops(config)
        counts = (
            params.n_params,
            params.n_params_non_embedding,
            params.n_params_matmul,
            params.token_embedding,
            params.positions,
            params.attention,
            params.mlp,
            params.norms,
            params.head,
            flops.flops_per_token,
        )
        table.add_row(
            name,
            *(f"{count:,}" if len(rows) == 1 else format_count(count) for count in counts),
            f"{6 * params.n_params / flops.flops_per_token:.3f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """Run the command line; bad input ends in one line and status 2."""
    try:
        app()
    except SizeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
