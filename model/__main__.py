"""`python -m model`: look at sizes before training any."""

import sys
from typing import Annotated, Literal

import typer

from model.ladder import PUBLISHED, Rung, format_count, iter_ladder, iter_rungs, parse_count, published_model
from model.size import ModelConfig, SizeError, count_flops, count_params, list_flop_conventions, resolve_model

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

COLUMNS = (
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
)


@app.command()
def ladder(
    smallest: Annotated[str, typer.Option("--from", help="Fewest non-embedding parameters.")] = "0.01M",
    largest: Annotated[str, typer.Option("--to", help="Most non-embedding parameters.")] = "10M",
    by: Annotated[
        Literal["nearest", "depth", "shape"],
        typer.Option(
            help="nearest: to evenly spaced counts; depth: every depth at one aspect; shape: the one given by --layers."
        ),
    ] = "nearest",
    preset: Annotated[str, typer.Option(help="video, nanogpt, gpt2 or modern.")] = "nanogpt",
    per_decade: Annotated[int, typer.Option(min=1, help="nearest: sizes in each factor of ten.")] = 3,
    aspect: Annotated[int, typer.Option(min=1, help="depth: d_model / n_layer, before rounding to whole heads.")] = 32,
    d_head: Annotated[int | None, typer.Option(min=1, help="Width of a head; by default 16 to 128 by size, 16 by depth.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="shape: n_layer.")] = 6,
    heads: Annotated[int, typer.Option(min=1, help="shape: n_head.")] = 6,
    d_model: Annotated[int, typer.Option(min=1, help="shape: d_model.")] = 384,
    vocab_size: Annotated[int, typer.Option(min=1)] = 65,
    seq_len: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Print a ladder of sizes: parameters by component and training FLOPs per token."""
    title = f"{preset}, vocabulary {vocab_size:,}, seq_len {seq_len:,}"
    text = {"vocab_size": vocab_size, "seq_len": seq_len}
    if by == "shape":
        config = resolve_model(preset, n_layer=layers, n_head=heads, d_model=d_model, **text)
        print_sizes([(config.size, config)], title)
        return
    low, high = parse_count(smallest), parse_count(largest)
    if by == "depth":
        grown = list(iter_ladder(low, high, preset=preset, aspect=aspect, d_head=d_head or 16, **text))
        print_sizes([(config.size, config) for config in grown], title)
        return
    rungs = list(iter_rungs(low, high, per_decade=per_decade, preset=preset, d_head=d_head, **text))
    print_sizes([(rung.config.size, rung.config) for rung in rungs], title, rungs)
    print("nominal and off: non-embedding parameters asked for, and how far the nearest shape is from them")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help=f"A published size: {', '.join(PUBLISHED)}.")],
) -> None:
    """Print one published model: parameters and FLOPs by component, every convention, every option."""
    config = published_model(name)
    print_components(name, config)
    print_conventions(config)
    print("\noptions")
    for key, value in config.model_dump(exclude_none=True).items():
        print(f"  {key:18} {value}")


def print_components(name: str, config: ModelConfig) -> None:
    """Print parameters and training FLOPs per token of each component."""
    from rich.table import Table

    params, flops = count_params(config), count_flops(config)
    forward, backward = flops.forward, flops.backward
    table = Table(title=f"{name}: {config.size}", header_style="bold", title_justify="left")
    table.add_column("component")
    for column in ("parameters", "share", "FLOPs/token forward", "backward", "share"):
        table.add_column(column, justify="right")
    rows = {
        "token embedding": (params.token_embedding, 0, 0),
        "positions": (params.positions, 0, 0),
        "attention, matrices": (params.attention, forward.attention_matrices, backward.attention_matrices),
        "attention, scores": (0, forward.attention_scores, backward.attention_scores),
        "MLP": (params.mlp, forward.mlp, backward.mlp),
        "norms": (params.norms, 0, 0),
        "head": (params.head, forward.head, backward.head),
        "all": (params.n_params, forward.flops_per_token, backward.flops_per_token),
    }
    for component, (count, ahead, back) in rows.items():
        share = (ahead + back) / max(1, flops.flops_per_token)
        table.add_row(component, f"{count:,}", f"{count / params.n_params:.1%}", f"{ahead:,}", f"{back:,}", f"{share:.1%}")
    print_table(table)


def print_conventions(config: ModelConfig) -> None:
    """Print what the literature calls N, and FLOPs per token."""
    params, exact = count_params(config), count_flops(config).flops_per_token
    print("\nN, by convention")
    print(f"  {'total (Hoffmann)':36} {params.n_params:>20,}")
    print(f"  {'non-embedding (Kaplan)':36} {params.n_params_non_embedding:>20,}")
    print(f"  {'matmul, head included':36} {params.n_params_matmul:>20,}")
    print(f"\ntraining FLOPs per token, by convention (seq_len {config.seq_len:,})")
    for convention, flops in list_flop_conventions(config).items():
        print(f"  {convention:36} {flops:>20,}  {flops / max(1, exact):.3f}")


def print_sizes(rows: list[tuple[str, ModelConfig]], title: str, rungs: list[Rung] | None = None) -> None:
    """Print one line per model, led by what was asked for where something was."""
    from rich.table import Table

    table = Table(title=title, header_style="bold", title_justify="left")
    for column in ("nominal", "off") if rungs else ():
        table.add_column(column, justify="right")
    table.add_column("size", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for index, (name, config) in enumerate(rows):
        asked = (format_count(rungs[index].nominal), f"{rungs[index].off:+.1%}") if rungs else ()
        table.add_row(*asked, name, *list_columns(config, exactly=len(rows) == 1))
    print_table(table)


def list_columns(config: ModelConfig, exactly: bool) -> list[str]:
    """Return a model's counts as text."""
    params, flops = count_params(config), count_flops(config)
    counts = [params.n_params, params.n_params_non_embedding, params.n_params_matmul, params.token_embedding, params.positions]
    counts += [params.attention, params.mlp, params.norms, params.head, flops.flops_per_token]
    written = [f"{count:,}" if exactly else format_count(count) for count in counts]
    return [*written, f"{6 * params.n_params / flops.flops_per_token:.3f}"]


def print_table(table: object) -> None:
    """Print a table, wide enough where nobody's terminal says how wide."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main() -> None:
    """Run the command line; bad input ends in one line and status 2."""
    try:
        app()
    except SizeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
