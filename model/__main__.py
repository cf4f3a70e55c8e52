"""`python -m model`: look at sizes before training any."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model.ladder import PUBLISHED, Rung, format_count, iter_ladder, iter_rungs, parse_count, published_model
from model.size import ModelConfig, SizeError, count_flops, count_params, list_flop_conventions, resolve_model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

COUNTS = ("total", "non-\nembedding", "matmul")
COMPONENTS = ("token\nembedding", "positions", "attention", "MLP", "norms", "head")
COSTS = ("FLOPs a\ntoken", "6N by\nexact")
PIPE_WIDTH = 160  # where there is no terminal to say how wide it is


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
    build_console().print(table)


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
    """Print one line per model, led by what was asked for where something was; the components where there is room."""
    console = build_console()
    table = build_sizes(rows, title, rungs, with_components=True)
    needed = console.measure(table, options=console.options.update_width(1_000)).maximum
    if needed > console.width:
        table = build_sizes(rows, title, rungs, with_components=False)
    console.print(table)
    if rungs:
        print("nominal, off: non-embedding parameters asked for, and how far the nearest shape is from them")
    print("FLOPs a token: training, all matrices, the full square of attention scores, and the head; 6N: 6 x total")
    if needed > console.width:
        print(f"parameters by component: in a terminal of {needed} columns, or through a pipe")


def build_sizes(rows: list[tuple[str, ModelConfig]], title: str, rungs: list[Rung] | None, with_components: bool) -> "Table":
    """Return the table of sizes."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, header_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in ("nominal", "off") if rungs else ():
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("size", no_wrap=True)
    for column in (*COUNTS, *(COMPONENTS if with_components else ()), *COSTS):
        table.add_column(column, justify="right", no_wrap=True)
    for index, (name, config) in enumerate(rows):
        asked = (format_count(rungs[index].nominal), f"{rungs[index].off:+.1%}") if rungs else ()
        table.add_row(*asked, name, *list_columns(config, len(rows) == 1, with_components))
    return table


def list_columns(config: ModelConfig, exactly: bool, with_components: bool) -> list[str]:
    """Return a model's counts as text."""
    params, flops = count_params(config), count_flops(config)
    write = (lambda count: f"{count:,}") if exactly else format_count
    written = [write(count) for count in (params.n_params, params.n_params_non_embedding, params.n_params_matmul)]
    if with_components:
        parts = (params.token_embedding, params.positions, params.attention, params.mlp, params.norms)
        written += [*(write(count) for count in parts), "tied" if config.tied and not params.head else write(params.head)]
    return [*written, write(flops.flops_per_token), f"{6 * params.n_params / flops.flops_per_token:.3f}"]


def build_console() -> "Console":
    """Return where tables are printed, wide enough where nobody's terminal says how wide."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def main() -> None:
    """Run the command line; bad input ends in one line and status 2."""
    try:
        app()
    except SizeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
