"""Text to a verified data directory: choose the corpus, cut the splits, encode, write, publish.

Everything is written into a hidden directory beside the target and renamed at the end, so a data directory is either
absent or complete, an interrupted preparation leaves nothing to trip over, and nobody's files are ever deleted.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_prep.corpus import (
    TINY_SHAKESPEARE_SHA256,
    Corpus,
    NoTinyShakespeareError,
    find_tiny_shakespeare,
    python_sources,
    text_file,
)
from data_prep.shards import (
    MAX_SHARD_TOKENS,
    SPLITS,
    DataError,
    Manifest,
    SplitRule,
    TokenizerRecord,
    canonical_json,
    content_id,
    iter_faults,
    iter_size_faults,
    load_manifest,
    sync_directory,
    write_manifest,
    write_split,
)
from data_prep.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Ids,
    Tokenizer,
    dtype_for,
    load_tokenizer,
    write_tokenizer,
)

PRESETS = ("demo", "shakespeare-char", "text")
TOKENIZERS = ("char", "byte")
MIN_SPLIT_TOKENS = 2  # one to read and one to predict


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a data directory, and nothing else: no paths, times, versions."""

    source_sha256: str
    tokenizer: str = "char"
    split: str = "tail"
    val_fraction: float = 0.1
    max_shard_tokens: int = MAX_SHARD_TOKENS

    @property
    def id(self) -> str:
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()


SHAKESPEARE_CHAR = Recipe(TINY_SHAKESPEARE_SHA256)  # nanoGPT's data/shakespeare_char


@dataclass(frozen=True)
class Prepared:
    """A complete data directory and what is worth telling about how it came to be."""

    data_dir: Path
    manifest: Manifest
    reused: bool
    notes: tuple[str, ...] = ()


def prepare(
    preset: str,
    data_dir: Path,
    *,
    input: Path | None = None,
    corpora: Path | None = None,
    tokenizer: str | None = None,
    val_fraction: float | None = None,
) -> Prepared:
    """Prepare a preset in a directory, or reuse the directory when it already holds the same recipe.

    Raises: DataError on bad input and when the directory holds anything else; nothing is overwritten then.
    """
    _check_options(preset, input, tokenizer, val_fraction)
    if preset == "text" and input is not None:
        corpus = text_file(input)
        recipe = Recipe(corpus.source.sha256, tokenizer or "char", val_fraction=val_fraction or 0.1)
        return _reuse_or_write(data_dir, recipe, lambda: corpus)
    if preset == "demo" and input is None:
        return _prepare_demo(data_dir, corpora)
    return _reuse_or_write(data_dir, SHAKESPEARE_CHAR, lambda: find_tiny_shakespeare(input, corpora))


def _check_options(preset: str, input: Path | None, tokenizer: str | None, val_fraction: float | None) -> None:
    if preset not in PRESETS:
        raise DataError(f"prepare: preset={preset!r}, there is none of that name; use {', '.join(PRESETS)}")
    if preset == "text" and input is None:
        raise DataError("prepare: preset=text, no text given; add --input FILE")
    if preset != "text" and (tokenizer or val_fraction):
        raise DataError(
            f"prepare: preset={preset}, fixes tokenizer and split; leave out --tokenizer and --val-fraction, "
            "or use preset text --input FILE"
        )
    if tokenizer not in (None, *TOKENIZERS):
        raise DataError(f"prepare: tokenizer={tokenizer!r}, not known; use {' or '.join(TOKENIZERS)}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"prepare: val_fraction={val_fraction}, not between 0 and 1; 0.1 is usual")


def _prepare_demo(data_dir: Path, corpora: Path | None) -> Prepared:
    """Prepare Tiny Shakespeare, else the text every machine has; keep whichever of the two is already there."""
    existing = _load_existing(data_dir)
    if existing is not None and existing.source.is_fallback:
        note = f"{data_dir}: holds the fallback text; remove the directory to look for Tiny Shakespeare again"
        recipe = Recipe(existing.source.sha256, tokenizer="byte")
        return _reuse_or_write(data_dir, recipe, python_sources, (note,))
    if existing is not None:
        return _reuse_or_write(data_dir, SHAKESPEARE_CHAR, lambda: find_tiny_shakespeare(None, corpora))
    try:
        corpus, recipe, notes = find_tiny_shakespeare(None, corpora), SHAKESPEARE_CHAR, tuple[str, ...]()
    except NoTinyShakespeareError as error:
        corpus = python_sources()
        recipe = Recipe(corpus.source.sha256, tokenizer="byte")
        notes = (f"{error}; going on with {corpus.source.label}",)
    return _reuse_or_write(data_dir, recipe, lambda: corpus, notes)


def _reuse_or_write(data_dir: Path, recipe: Recipe, find_corpus: Callable[[], Corpus], notes: tuple[str, ...] = ()) -> Prepared:
    existing = _load_existing(data_dir)
    if existing is None:
        if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
            raise DataError(f"{data_dir}: not empty and no data directory (no manifest.json); choose another --dir")
        return Prepared(data_dir, _write(data_dir, recipe, find_corpus(), _publish), reused=False, notes=notes)
    _check_same_recipe(data_dir, existing, recipe)
    damage = next(_iter_cheap_faults(data_dir, existing), None)
    if damage is None:
        return Prepared(data_dir, existing, reused=True, notes=notes)
    try:
        manifest = _write(data_dir, recipe, find_corpus(), _restore)
    except DataError as error:
        raise DataError(f"{damage}; it cannot be written again, since {error}") from None
    return Prepared(data_dir, manifest, reused=False, notes=(*notes, f"{damage}; written again"))


def _load_existing(data_dir: Path) -> Manifest | None:
    return load_manifest(data_dir) if (data_dir / "manifest.json").exists() else None


def _check_same_recipe(data_dir: Path, existing: Manifest, recipe: Recipe) -> None:
    wanted, there = asdict(recipe), existing.recipe
    keys = [key for key in sorted({*wanted, *there}) if wanted.get(key) != there.get(key)]
    if keys:
        differences = ", ".join(f"{key}={_short(there.get(key))} instead of {_short(wanted.get(key))}" for key in keys)
        raise DataError(
            f"{data_dir}: holds {existing.source.label} by another recipe ({differences}); "
            "choose another --dir or remove this one"
        )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 16 else text


def _write(data_dir: Path, recipe: Recipe, corpus: Corpus, put_in_place: Callable[[Path, Path, Manifest], None]) -> Manifest:
    """Write every file in a staging directory, then put them in place."""
    if corpus.source.sha256 != recipe.source_sha256:
        raise DataError(
            f"{data_dir}: source_sha256={recipe.source_sha256[:16]}…, the text of {corpus.source.label} "
            f"is now {corpus.source.sha256[:16]}…; choose another --dir or remove this one"
        )
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging_path(data_dir.resolve())
    try:
        staging.mkdir()
        manifest = _write_files(staging, recipe, corpus)
        put_in_place(staging, data_dir.resolve(), manifest)
    except OSError as error:
        error.filename = error.filename or str(data_dir)  # a full disk is reported by write(), which knows no name
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _publish(staging: Path, data_dir: Path, manifest: Manifest) -> None:
    """Rename the finished directory to its place, so that no reader ever sees a part of it."""
    staging.rename(data_dir)
    sync_directory(data_dir.parent)


def _restore(staging: Path, data_dir: Path, manifest: Manifest) -> None:
    """Replace the files of a damaged directory by the same bytes; what else lies there is left alone."""
    damaged = load_manifest(data_dir)
    if manifest.content_id != damaged.content_id:
        raise DataError(
            f"{data_dir}: content_id={damaged.content_id[:16]}…, the same recipe now gives "
            f"{manifest.content_id[:16]}…; choose another --dir or restore the damaged files"
        )
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = data_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)


def _write_files(directory: Path, recipe: Recipe, corpus: Corpus) -> Manifest:
    documents = [document for document in corpus.documents if document.strip()]
    texts = dict(zip(SPLITS, split_tail(documents, recipe.val_fraction), strict=True))
    tokenizer = CharTokenizer.from_texts(documents) if recipe.tokenizer == "char" else ByteTokenizer()
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {
        split: write_split(
            directory,
            split,
            encode_documents(tokenizer, texts[split]),
            dtype,
            text_bytes=sum(len(text.encode()) for text in texts[split]),
            max_shard_tokens=recipe.max_shard_tokens,
        )
        for split in SPLITS
    }
    for split, record in splits.items():
        if record.tokens < MIN_SPLIT_TOKENS:
            raise DataError(
                f"{corpus.source.label}: val_fraction={recipe.val_fraction}, leaves {record.tokens} tokens "
                f"for {split}; use another fraction or more text"
            )
    write_tokenizer(directory / "tokenizer", tokenizer)
    manifest = Manifest(
        tool_version=_tool_version(),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        content_id=content_id(dtype, tokenizer.id, splits),
        recipe_id=recipe.id,
        recipe=asdict(recipe),
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=TokenizerRecord(kind=tokenizer.kind, name=tokenizer.name, id=tokenizer.id),
        source=corpus.source,
        split=SplitRule(mode=recipe.split, val_fraction=recipe.val_fraction),
        splits=splits,
        counters={
            "documents_in": len(corpus.documents),
            "documents_blank": len(corpus.documents) - len(documents),
        },
    )
    write_manifest(directory, manifest)
    return manifest


def split_tail(documents: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cut the last part of the text off for validation, inside a document if need be.

    Source: nanoGPT data/shakespeare_char/prepare.py, which keeps int(n * 0.9) characters for training.
    """
    n_train = int(sum(map(len, documents)) * (1 - val_fraction))
    train, val = [], []
    for document in documents:
        train.append(document[:n_train])
        val.append(document[n_train:])
        n_train = max(n_train - len(document), 0)
    return [text for text in train if text], [text for text in val if text]


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[Ids]:
    """Yield the ids of each document; no id is put between documents, their ends stand in the .idx files."""
    for document in documents:
        yield tokenizer.encode(document)


def _staging_path(data_dir: Path) -> Path:
    """Return this process's staging directory, after removing those of dead processes on this machine."""
    stem = f".{data_dir.name}.partial-{socket.gethostname()}-"
    for leftover in list(data_dir.parent.iterdir()):
        pid = leftover.name.removeprefix(stem)
        if pid != leftover.name and pid.isdecimal() and not _is_other_process(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    return data_dir.parent / f"{stem}{os.getpid()}"


def _is_other_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # a killed process may have had our number


def verify(data_dir: Path) -> list[str]:
    """Read everything in a data directory and list what is wrong with it; empty means sound.

    Raises: DataError when there is no manifest to check against.
    """
    manifest = load_manifest(data_dir)
    return [*_iter_tokenizer_faults(data_dir, manifest), *iter_faults(data_dir, manifest)]


def _iter_cheap_faults(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    yield from _iter_tokenizer_faults(data_dir, manifest)
    yield from iter_size_faults(data_dir, manifest)


def _iter_tokenizer_faults(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(data_dir / "tokenizer")
    except DataError as error:
        yield str(error)
        return
    if (tokenizer.id, tokenizer.vocab_size) != (manifest.tokenizer.id, manifest.vocab_size):
        yield f"{data_dir / 'tokenizer'}: not the tokenizer of the manifest ({manifest.tokenizer.id[:16]}…)"


def _tool_version() -> str | None:
    try:
        return version("scaling-harness")
    except PackageNotFoundError:
        return None
