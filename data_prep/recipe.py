"""What a user asks for, what a preset says, and the recipe that follows: everything that decides the bytes."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.corpus import TINY_SHAKESPEARE_SHA256, Source
from data_prep.documents import HubData
from data_prep.shards import MAX_SHARD_TOKENS, DataError, canonical_json

TOKENIZERS = ("char", "byte", "gpt2", "bpe")
SPLIT_MODES = ("hash", "tail", "files")
ON_BAD = ("error", "skip")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a data directory, and nothing else: no paths, times, versions, workers.

    Note: a key that was not there from the beginning is None where it is not used, so that no id changes.
    """

    source_sha256: str
    tokenizer: str = "char"
    split: str = "tail"
    val_fraction: float | None = 0.1
    max_shard_tokens: int = MAX_SHARD_TOKENS
    vocab_size: int | None = None  # of a tokenizer to be trained
    tokenizer_sha256: str | None = None  # of a tokenizer.json
    eot: str | None = None
    dedup: str | None = None
    text_key: str | None = None

    @property
    def id(self) -> str:
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()


@dataclass(frozen=True)
class Preset:
    """What a preset fixes or assumes; `is_fixed` ones take no other tokenizer or split."""

    tokenizer: str = "gpt2"
    split: str = "hash"
    val_fraction: float = 0.01
    is_fixed: bool = False
    eot: str | None = "append"
    dedup: str | None = "exact"
    hub: HubData | None = None


PRESETS = {
    "demo": Preset("char", "tail", 0.1, is_fixed=True, eot=None, dedup=None),
    "shakespeare-char": Preset("char", "tail", 0.1, is_fixed=True, eot=None, dedup=None),  # nanoGPT data/shakespeare_char
    "shakespeare-gpt2": Preset("gpt2", "tail", 0.1, is_fixed=True, eot=None, dedup=None),  # nanoGPT data/shakespeare
    "text": Preset("char", "tail", 0.1, dedup=None),
    "files": Preset(),
    # 0.0005 is nanoGPT's share of OpenWebText; its documents are drawn otherwise, so the val split is another one.
    "openwebtext": Preset(val_fraction=0.0005, hub=HubData("Skylion007/openwebtext")),
    "fineweb-edu-10bt": Preset(val_fraction=0.0005, hub=HubData("HuggingFaceFW/fineweb-edu", "sample-10BT")),
}


@dataclass(frozen=True)
class Request:
    """One call of `prepare` or `plan`; None means: as the preset says."""

    preset: str
    data_dir: Path
    input: Path | Sequence[Path] | None = None
    val: Sequence[Path] = ()
    corpora: Path | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    bpe_file: Path | None = None
    split: str | None = None
    val_fraction: float | None = None
    dedup: bool | None = None
    text_key: str = "text"
    revision: str | None = None
    on_bad: str = "error"
    max_bad_fraction: float = 0.001
    backend: str = "tiktoken"
    workers: int | None = None
    node_index: int | None = None
    num_nodes: int = 1
    max_shard_tokens: int = MAX_SHARD_TOKENS
    unit_bytes: int | None = field(default=None, repr=False)  # for tests: small units
    hub: HubData | None = field(default=None, repr=False)  # for tests: a data set of files

    @property
    def inputs(self) -> tuple[Path, ...]:
        if self.input is None:
            return ()
        return (self.input,) if isinstance(self.input, Path) else tuple(self.input)

    @property
    def n_workers(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def is_one_of_several(self) -> bool:
        return self.node_index is not None


def check_request(request: Request) -> None:
    """Refuse what cannot be meant, before anything is read.

    Raises: DataError.
    """
    if request.preset not in PRESETS:
        raise DataError(f"prepare: preset={request.preset!r}, there is none of that name; use {', '.join(PRESETS)}")
    preset = PRESETS[request.preset]
    if request.preset in ("text", "files") and not request.inputs and request.hub is None:
        raise DataError(f"prepare: preset={request.preset}, no text given; add --input FILE")
    if request.preset != "files" and len(request.inputs) > 1:
        raise DataError(f"prepare: preset={request.preset}, takes one file; use preset files for several")
    if preset.is_fixed and (request.tokenizer or request.val_fraction or request.split or request.val):
        raise DataError(
            f"prepare: preset={request.preset}, fixes tokenizer and split; leave out --tokenizer and --val-fraction, "
            "or use preset text --input FILE"
        )
    _check_numbers(request)
    _check_tokenizer(request, request.tokenizer or preset.tokenizer)
    if request.split not in (None, *SPLIT_MODES):
        raise DataError(f"prepare: split={request.split!r}, not known; use {', '.join(SPLIT_MODES)}")
    if (request.split == "files") != bool(request.val) and (request.split or request.preset != "files"):
        raise DataError("prepare: split=files goes with --val FILE of preset files; give both or neither")
    if request.val and request.val_fraction:
        raise DataError("prepare: --val-fraction beside --val; the files decide the split, leave it out")


def _check_numbers(request: Request) -> None:
    if request.val_fraction is not None and not 0 < request.val_fraction < 1:
        raise DataError(f"prepare: val_fraction={request.val_fraction}, not between 0 and 1; 0.1 is usual")
    if request.workers is not None and request.workers < 1:
        raise DataError(f"prepare: workers={request.workers}, not positive; leave it out for one per core")
    if not 0 <= request.max_bad_fraction <= 1:
        raise DataError(f"prepare: max_bad_fraction={request.max_bad_fraction}, not between 0 and 1; 0.001 is usual")
    if request.num_nodes < 1 or not 0 <= (request.node_index or 0) < request.num_nodes:
        raise DataError(
            f"prepare: node_index={request.node_index} of num_nodes={request.num_nodes}, not one of 0..num_nodes-1; "
            "give both, as in --node-index 0 --num-nodes 4"
        )
    if request.num_nodes > 1 and request.node_index is None:
        raise DataError(f"prepare: num_nodes={request.num_nodes}, but which one is this; add --node-index")


def _check_tokenizer(request: Request, tokenizer: str) -> None:
    from data_prep.bpe import BACKENDS, MIN_VOCAB_SIZE

    if tokenizer not in TOKENIZERS and not tokenizer.endswith(".json"):
        raise DataError(f"prepare: tokenizer={tokenizer!r}, not known; use {', '.join(TOKENIZERS)} or a tokenizer.json")
    if (tokenizer == "bpe") != (request.vocab_size is not None):
        raise DataError(
            f"prepare: tokenizer={tokenizer}, vocab_size={request.vocab_size}; a bpe to be trained needs --vocab-size, "
            "and nothing else takes one"
        )
    if request.vocab_size is not None and request.vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"prepare: vocab_size={request.vocab_size}, fewer than the 256 bytes and an end of text; "
            f"use {MIN_VOCAB_SIZE} or more, or the byte tokenizer"
        )
    if request.backend not in BACKENDS:
        raise DataError(f"prepare: backend={request.backend!r}, not known; use {' or '.join(BACKENDS)}")
    if request.backend != "tiktoken" and tokenizer not in ("gpt2", "bpe"):
        raise DataError(f"prepare: backend={request.backend}, encodes gpt2 and bpe only; leave it out for {tokenizer}")
    if request.on_bad not in ON_BAD:
        raise DataError(f"prepare: on_bad={request.on_bad!r}, not known; use {' or '.join(ON_BAD)}")


SHAKESPEARE_CHAR = Recipe(TINY_SHAKESPEARE_SHA256)


def shakespeare_recipe(preset: str) -> Recipe:
    """Return the recipe of a preset of Tiny Shakespeare; it needs no text."""
    return replace(SHAKESPEARE_CHAR, tokenizer=PRESETS[preset].tokenizer)


def recipe_of(request: Request, source: Source) -> Recipe:
    """Return the recipe that a request asks for on a source."""
    preset = PRESETS[request.preset]
    tokenizer, sha256 = request.tokenizer or preset.tokenizer, None
    if tokenizer not in TOKENIZERS:
        from data_prep.bpe import json_tokenizer

        tokenizer, sha256 = "json", hashlib.sha256(json_tokenizer(Path(tokenizer)).json).hexdigest()
    split = "files" if request.val else request.split or preset.split
    dedup = preset.dedup if request.dedup is None else "exact" if request.dedup else None
    has_columns = source.hub is not None or any(file.format != "txt" for file in source.files)
    return Recipe(
        source_sha256=source.record.sha256,
        tokenizer=tokenizer,
        split=split,
        val_fraction=None if split == "files" else request.val_fraction or preset.val_fraction,
        max_shard_tokens=request.max_shard_tokens,
        vocab_size=request.vocab_size,
        tokenizer_sha256=sha256,
        eot=None if tokenizer in ("char", "byte") else preset.eot,
        dedup=dedup,
        text_key=request.text_key if has_columns else None,
    )


def differing_keys(wanted: Recipe, there: dict[str, Any]) -> str:
    """List "key=there instead of wanted" for each key of two recipes that differs; empty when none does."""
    asked = asdict(wanted)
    keys = [key for key in sorted({*asked, *there}) if asked.get(key) != there.get(key)]
    return ", ".join(f"{key}={_short(there.get(key))} instead of {_short(asked.get(key))}" for key in keys)


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 16 else text
