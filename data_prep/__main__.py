"""python -m data_prep: plan, prepare, inspect, verify, show, export, bench."""

# numpy is imported inside the commands only, so that --help answers at once.
import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_prep.forecast import Forecast
    from data_prep.prepare import NodeDone, Prepared
    from data_prep.recipe import Request
    from data_prep.shards import Manifest

FIRST_TOKENS = 60
MIB = 1 << 20

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text to tokens on disk: prepare a data directory, look into it, check it.",
)


class Preset(StrEnum):
    DEMO = "demo"
    SHAKESPEARE_CHAR = "shakespeare-char"
    SHAKESPEARE_GPT2 = "shakespeare-gpt2"
    OPENWEBTEXT = "openwebtext"
    FINEWEB_EDU_10BT = "fineweb-edu-10bt"
    FILES = "files"
    TEXT = "text"


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"


class SplitMode(StrEnum):
    HASH = "hash"
    TAIL = "tail"
    FILES = "files"


class OnBad(StrEnum):
    ERROR = "error"
    SKIP = "skip"


class Backend(StrEnum):
    TIKTOKEN = "tiktoken"
    GIGATOKEN = "gigatoken"


class ExportFormat(StrEnum):
    LLMC = "llmc"


DataDir = Annotated[Path, typer.Argument(metavar="DIR", help="A prepared directory.")]
PresetName = Annotated[
    Preset, typer.Argument(help="demo: shakespeare-char, or what this machine has. text: one file, char level. files: any.")
]
TargetDir = Annotated[Path, typer.Option("--dir", help="Where to; reused when it holds the same already.")]
Input = Annotated[
    list[Path] | None,
    typer.Option(help="A file of text, or of preset files a folder; may be given again. txt, jsonl, parquet; gz, xz, zst."),
]
Val = Annotated[list[Path] | None, typer.Option(help="Of preset files: files that validate; no document of theirs trains.")]
Corpora = Annotated[
    Path | None, typer.Option(envvar="HARNESS_CORPORA", help="A folder of corpora, for machines without internet.")
]
TokenizerName = Annotated[str | None, typer.Option(help="char, byte, gpt2, bpe (trained on the text), or a tokenizer.json.")]
VocabSize = Annotated[int | None, typer.Option(help="Of a bpe to be trained: ids, end of text included.")]
BpeFile = Annotated[Path | None, typer.Option(help="GPT-2's vocab.bpe or r50k_base.tiktoken, for machines without internet.")]
SplitRule = Annotated[SplitMode | None, typer.Option("--split", help="hash of the document, tail of the text, or files.")]
ValFraction = Annotated[float | None, typer.Option(help="The part that validates; tail 0.1, hash 0.01 if not given.")]
Dedup = Annotated[bool | None, typer.Option("--dedup/--no-dedup", help="Leave out documents that come again.")]
TextKey = Annotated[str, typer.Option(help="The column of jsonl and parquet that holds the text.")]
Revision = Annotated[str | None, typer.Option(help="Of a data set of the hub: a commit or branch; pinned if not given.")]
OnBadRule = Annotated[OnBad, typer.Option("--on-bad", help="A document that cannot be read: stop, or count and skip it.")]
MaxBad = Annotated[float, typer.Option("--max-bad-fraction", help="More skipped documents than this are an error.")]
BackendName = Annotated[Backend, typer.Option("--backend", help="The encoder of gpt2 and bpe; gigatoken is faster, optional.")]
Workers = Annotated[int | None, typer.Option(help="Processes; one per core if not given. Changes no byte.")]
NodeIndex = Annotated[int | None, typer.Option(help="Which of several machines this is; run once more without it to pack.")]
NumNodes = Annotated[int, typer.Option(help="How many machines share the work.")]


def _request(
    preset: Preset,
    data_dir: Path,
    input: list[Path] | None,
    val: list[Path] | None,
    corpora: Path | None,
    tokenizer: str | None,
    vocab_size: int | None,
    bpe_file: Path | None,
    split: SplitMode | None,
    val_fraction: float | None,
    dedup: bool | None,
    text_key: str,
    revision: str | None,
    workers: int | None,
) -> "Request":
    from data_prep.recipe import Request

    return Request(
        preset.value,
        data_dir,
        input=tuple(input) if input else None,
        val=tuple(val or ()),
        corpora=corpora,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        bpe_file=bpe_file,
        split=split.value if split else None,
        val_fraction=val_fraction,
        dedup=dedup,
        text_key=text_key,
        revision=revision,
        workers=workers,
    )


@app.command()
def plan(
    preset: PresetName,
    data_dir: TargetDir,
    input: Input = None,
    val: Val = None,
    corpora: Corpora = None,
    tokenizer: TokenizerName = None,
    vocab_size: VocabSize = None,
    bpe_file: BpeFile = None,
    split: SplitRule = None,
    val_fraction: ValFraction = None,
    dedup: Dedup = None,
    text_key: TextKey = "text",
    revision: Revision = None,
    workers: Workers = None,
) -> None:
    """Say what a preparation would need: tokens, disk, memory. Writes nothing."""
    from data_prep.forecast import plan_preparation

    request = _request(
        preset, data_dir, input, val, corpora, tokenizer, vocab_size, bpe_file, split, val_fraction, dedup, text_key, revision,
        workers,
    )  # fmt: skip
    forecast = plan_preparation(request)
    for name, value in _needs(forecast).items():
        typer.echo(f"{name:<10} {value}")
    if forecast.peak_disk_bytes > forecast.free_bytes:
        typer.echo(f"{data_dir}: more than the free space there; free some or choose another --dir", err=True)
        raise typer.Exit(1)


def _needs(forecast: "Forecast") -> dict[str, str]:
    n_units = len(forecast.units)
    return {
        "source": forecast.label,
        "recipe": f"{forecast.recipe.tokenizer} tokenizer, split {forecast.recipe.split}, {forecast.dtype}",
        "units": f"{n_units:,}: {forecast.units[0]}" + (f" ... {forecast.units[-1]}" if n_units > 1 else ""),
        "text": f"about {forecast.text_bytes / 1e6:,.1f} MB",
        "tokens": f"about {forecast.tokens:,} ({forecast.bytes_per_token:.2f} bytes of text each)",
        "disk": f"about {forecast.shard_bytes / 1e6:,.1f} MB, {forecast.peak_disk_bytes / 1e6:,.1f} MB while it is prepared; "
        f"{forecast.free_bytes / 1e6:,.0f} MB are free",
        "memory": f"up to {forecast.memory_bytes / MIB:,.0f} MiB with {forecast.n_workers} workers",
    }


@app.command()
def prepare(
    preset: PresetName,
    data_dir: TargetDir,
    input: Input = None,
    val: Val = None,
    corpora: Corpora = None,
    tokenizer: TokenizerName = None,
    vocab_size: VocabSize = None,
    bpe_file: BpeFile = None,
    split: SplitRule = None,
    val_fraction: ValFraction = None,
    dedup: Dedup = None,
    text_key: TextKey = "text",
    revision: Revision = None,
    on_bad: OnBadRule = OnBad.ERROR,
    max_bad_fraction: MaxBad = 0.001,
    backend: BackendName = Backend.TIKTOKEN,
    workers: Workers = None,
    node_index: NodeIndex = None,
    num_nodes: NumNodes = 1,
) -> None:
    """Write a corpus as shards of token ids; stopped or killed, the same command goes on where it was."""
    from dataclasses import replace

    from data_prep.prepare import Prepared, prepare_request
    from data_prep.stop import StoppedError

    request = _request(
        preset, data_dir, input, val, corpora, tokenizer, vocab_size, bpe_file, split, val_fraction, dedup, text_key, revision,
        workers,
    )  # fmt: skip
    request = replace(
        request,
        on_bad=on_bad.value,
        max_bad_fraction=max_bad_fraction,
        backend=backend.value,
        node_index=node_index,
        num_nodes=num_nodes,
    )
    try:
        prepared = prepare_request(request)
    except StoppedError:
        typer.echo(f"{data_dir}: stopped as asked; run the same command again to go on")
        return
    if isinstance(prepared, Prepared):
        for text in prepared.notes:
            typer.echo(text, err=True)
    typer.echo(_summary(prepared))


def _summary(prepared: "Prepared | NodeDone") -> str:
    from data_prep.prepare import NodeDone

    if isinstance(prepared, NodeDone):
        rest = (
            f"{prepared.n_left:,} are left to other nodes"
            if prepared.n_left
            else "all are done: run it once without --node-index"
        )
        return f"{prepared.data_dir}: this node's share of {prepared.n_units:,} units is done, {rest}"
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
def verify(
    data_dir: DataDir,
    deep: Annotated[bool, typer.Option("--deep", help="Read and hash every byte and check every id.")] = False,
) -> None:
    """Check that every file is there and as long as it should be; exit 1 with a list of what is wrong."""
    from data_prep.prepare import verify
    from data_prep.shards import load_manifest

    faults = verify(data_dir, deep=deep)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        typer.echo(f"{data_dir}: faults={len(faults)}; restore the files, or remove the directory and prepare it again")
        raise typer.Exit(1)
    manifest = load_manifest(data_dir)
    n_shards = sum(len(record.shards) for record in manifest.splits.values())
    what = "every hash and id is right" if deep else "sizes are right; --deep checks every hash and id"
    typer.echo(f"{data_dir}: sound, {n_shards} shards, {what}, content id {manifest.content_id[:12]}")


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


@app.command()
def export(
    data_dir: DataDir,
    out: Annotated[Path, typer.Option(help="An empty or new directory.")],
    format: Annotated[ExportFormat, typer.Option(help="llmc: llm.c and modded-nanogpt.")] = ExportFormat.LLMC,
) -> None:
    """Write the tokens in the file format of another program."""
    from data_prep.export import export_llmc

    for path in export_llmc(data_dir, out):
        typer.echo(str(path))


@app.command()
def bench(
    input: Annotated[list[Path] | None, typer.Option(help="jsonl files; else gutenberg/ of --corpora.")] = None,
    corpora: Corpora = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each contender.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender, in turns.")] = 3,
) -> None:
    """Measure preparation and batches side by side with nanoGPT's idioms, each part by itself."""
    from data_prep.measure import run_bench
    from data_prep.shards import DataError

    files = list(input or sorted((corpora / "gutenberg").glob("train-*.jsonl.xz") if corpora else ()))
    if not files:
        raise DataError("bench: no text; give --input FILE, or --corpora DIR that holds gutenberg/train-*.jsonl.xz")
    run_bench(files, workers, repeats, typer.echo)


def main() -> None:
    """Run the command line; bad input ends in one line and status 2, a full disk in status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        from data_prep.shards import DataError

        if not isinstance(error, (DataError, OSError)):
            raise
        sys.exit(_report(error))
    except KeyboardInterrupt:
        print("interrupted; what was committed is kept", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if os.environ.get("HARNESS_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


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
