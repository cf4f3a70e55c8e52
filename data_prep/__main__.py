"""python -m data_prep: prepare, inspect, verify and show a data directory."""

# numpy is imported inside the commands only, so that --help answers at once.
import errno
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_prep.prepare import Prepared
    from data_prep.shards import Manifest

FIRST_TOKENS = 60

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text to tokens on disk: prepare a data directory, look into it, check it.",
)


class Preset(StrEnum):
    DEMO = "demo"
    SHAKESPEARE_CHAR = "shakespeare-char"
    TEXT = "text"


class TokenizerKind(StrEnum):
    CHAR = "char"
    BYTE = "byte"


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"


DataDir = Annotated[Path, typer.Argument(metavar="DIR", help="A prepared directory.")]


@app.command()
def prepare(
    preset: Annotated[Preset, typer.Argument(help="demo: shakespeare-char, or what this machine has.")],
    data_dir: Annotated[Path, typer.Option("--dir", help="Where to; reused when it holds the same already.")],
    input: Annotated[Path | None, typer.Option(help="The text file, UTF-8.")] = None,
    corpora: Annotated[
        Path | None,
        typer.Option(envvar="HARNESS_CORPORA", help="A folder of corpora, for machines without internet."),
    ] = None,
    tokenizer: Annotated[TokenizerKind | None, typer.Option(help="Of preset text; char if not given.")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Of preset text: the last part of the text; 0.1 if not given.")
    ] = None,
) -> None:
    """Write a corpus as shards of token ids."""
    from data_prep.prepare import prepare

    kind = tokenizer.value if tokenizer else None
    prepared = prepare(preset.value, data_dir, input=input, corpora=corpora, tokenizer=kind, val_fraction=val_fraction)
    for note in prepared.notes:
        typer.echo(note, err=True)
    typer.echo(_summary(prepared))


def _summary(prepared: "Prepared") -> str:
    manifest = prepared.manifest
    train, val = (manifest.splits[split].tokens for split in ("train", "val"))
    return (
        f"{prepared.data_dir}: {'there already: ' if prepared.reused else ''}{manifest.source.label}, "
        f"{train:,} train + {val:,} val tokens, {manifest.tokenizer.name} tokenizer with {manifest.vocab_size} ids, "
        f"content id {manifest.content_id[:12]}"
    )


@app.command()
def inspect(data_dir: DataDir) -> None:
    """Show what a data directory holds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data_prep.shards import SPLITS, TokenShards, load_manifest
    from data_prep.tokenizer import load_tokenizer

    manifest = load_manifest(data_dir)
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    about = Table.grid(padding=(0, 2))
    for name, value in _facts(manifest).items():
        about.add_row(name, Text(value, overflow="fold"))
    table = Table("split")
    for column in ("tokens", "documents", "text bytes", "bytes/token", "shards"):
        table.add_column(column, justify="right", no_wrap=True)
    for split in SPLITS:
        record = manifest.splits[split]
        counts = (f"{count:,}" for count in (record.tokens, record.documents, record.text_bytes))
        table.add_row(split, *counts, f"{record.text_bytes / record.tokens:.3f}", str(len(record.shards)))
        first = TokenShards.open(data_dir, split, manifest).read(0, min(FIRST_TOKENS, record.tokens))
        about.add_row(f"{split} starts", Text(repr(tokenizer.decode(first)), overflow="fold"))
    console = Console()
    console.print(about)
    console.print(table)


def _facts(manifest: "Manifest") -> dict[str, str]:
    url = {"url": manifest.source.url} if manifest.source.url else {}
    return {
        "source": manifest.source.label,
        **url,
        "source sha256": manifest.source.sha256,
        "tokenizer": f"{manifest.tokenizer.name}, {manifest.vocab_size} ids, {manifest.dtype}",
        "split": f"{manifest.split.mode}, val_fraction {manifest.split.val_fraction}",
        "content id": manifest.content_id,
        "recipe id": manifest.recipe_id,
        "created": f"{manifest.created_utc} by {manifest.tool_version or 'an uninstalled checkout'}",
    }


@app.command()
def verify(data_dir: DataDir) -> None:
    """Hash every shard and check every id; exit 1 with a list of what is wrong."""
    from data_prep.prepare import verify
    from data_prep.shards import load_manifest

    faults = verify(data_dir)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        typer.echo(f"{data_dir}: faults={len(faults)}; restore the files, or remove the directory and prepare it again")
        raise typer.Exit(1)
    manifest = load_manifest(data_dir)
    n_shards = sum(len(record.shards) for record in manifest.splits.values())
    typer.echo(f"{data_dir}: sound, {n_shards} shards, content id {manifest.content_id[:12]}")


@app.command()
def show(
    data_dir: DataDir,
    sample: Annotated[int, typer.Option(min=0, help="The global sample counter.")],
    split: Annotated[Split, typer.Option(help="Which split.")] = Split.TRAIN,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="The data seed.")] = 0,
) -> None:
    """Print the text of exactly one training sample: seq_len tokens and the last one's target."""
    import numpy as np

    from data_prep.sampler import WindowSampler
    from data_prep.shards import TokenShards
    from data_prep.tokenizer import load_tokenizer

    shards = TokenShards.open(data_dir, split.value)
    sampler = WindowSampler(shards.n_tokens, seq_len, seed)
    starts = sampler.starts(np.array([sample]))
    ids = shards.gather(starts, seq_len + 1)[0]
    epoch, place = divmod(sample, sampler.n_windows)
    typer.echo(
        f"sample {sample:,}: epoch {epoch}, window {place + 1:,} of {sampler.n_windows:,}, "
        f"{split.value} ids {starts[0]:,}..{starts[0] + seq_len:,}",
        err=True,
    )
    typer.echo(load_tokenizer(data_dir / "tokenizer").decode(ids))


def main() -> None:
    """Run the command line; bad input ends in one line and status 2, a full disk in status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        from data_prep.shards import DataError

        if not isinstance(error, (DataError, OSError)):
            raise
        sys.exit(_report(error))


def _report(error: ValueError | OSError) -> int:
    if not isinstance(error, OSError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space and run it again" if is_full else "check the path and its permissions"
    print(f"error: {error.filename or 'output'}: {error.strerror or error}; {advice}", file=sys.stderr)
    return 1 if is_full else 2


if __name__ == "__main__":
    main()
