"""Tokens on disk: write the shards of a split, map them, gather windows, and find what is damaged.

FORMAT.md is the specification. A split is one logical stream of ids; shards only cut it into files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

FORMAT = "scaling-harness-data"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
CHECKED_IDS = 1 << 22  # read at once when ids are checked
MAX_SHARD_TOKENS = 100_000_000  # 200 MB of uint16: large enough for streaming disks, small enough to copy again

DType = Literal["uint16", "uint32"]
Ids = npt.NDArray[np.integer[Any]]


class DataError(ValueError):
    """Bad input of any kind; the text is one line, "where: key=value, what is wrong; what to do"."""


class _Record(BaseModel):
    """A part of the manifest: immutable; fields that a later version adds are kept and passed over."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ShardRecord(_Record):
    """One pair of files."""

    file: str
    tokens: int
    documents: int
    max_token_id: int
    sha256: str
    idx_sha256: str

    @property
    def idx_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx"


class SplitRecord(_Record):
    """One split: totals and shards, in the order of the stream."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardRecord, ...]

    @model_validator(mode="after")
    def _totals_are_sums(self) -> Self:
        for key in ("tokens", "documents"):
            if getattr(self, key) != sum(getattr(shard, key) for shard in self.shards):
                raise ValueError(f"{key}={getattr(self, key)} is not the sum over the shards")
        return self


class TokenizerRecord(_Record):
    """Which tokenizer; the tokenizer itself lies in tokenizer/."""

    kind: str
    name: str
    id: str
    eot: int | None = None
    library: str | None = None  # the encoder at work and its version, for people


class SourceRecord(_Record):
    """Where the text came from, in words for the report and in a hash for the recipe."""

    kind: str
    label: str
    sha256: str
    url: str | None = None
    is_fallback: bool = False
    revision: str | None = None  # of a data set of the hub


class SplitRule(_Record):
    """How the validation split was cut from the text."""

    mode: str
    val_fraction: float | None = None


class Manifest(_Record):
    """What a prepared directory holds; its presence means that the directory is complete."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    tool_version: str | None
    created_utc: str
    content_id: str
    recipe_id: str
    recipe: Mapping[str, Any]
    dtype: DType
    byte_order: Literal["little"] = "little"
    vocab_size: int
    tokenizer: TokenizerRecord
    source: SourceRecord
    split: SplitRule
    splits: Mapping[str, SplitRecord]
    counters: Mapping[str, int]

    @property
    def max_token_id(self) -> int:
        """The largest id that occurs in the splits."""
        return max(shard.max_token_id for record in self.splits.values() for shard in record.shards)


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Render JSON the one way that is hashed: sorted keys, no spaces, ASCII, keys that are null left out."""
    present = {key: item for key, item in value.items() if item is not None}
    return json.dumps(present, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def content_id(dtype: str, tokenizer_id: str, splits: Mapping[str, SplitRecord]) -> str:
    """Return the identity of the tokens, their order and their document boundaries; FORMAT.md, "Content id"."""
    lines = [FORMAT, dtype, tokenizer_id]
    for split in SPLITS:
        lines += [split, *(f"{shard.sha256} {shard.idx_sha256}" for shard in splits[split].shards)]
    return hashlib.sha256("\n".join(lines).encode("ascii")).hexdigest()


def load_manifest(data_dir: Path) -> Manifest:
    """Read and check the manifest of a prepared directory.

    Raises: DataError when it is missing, unreadable, of another format, or does not agree with itself.
    """
    path = data_dir / "manifest.json"
    try:
        raw = json.loads(path.read_bytes())
        found = (raw["format"], raw["format_version"])
        if found != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"{path}: format={found[0]!r} version {found[1]!r}, this program reads {FORMAT!r} version "
                f"{FORMAT_VERSION}; remove the directory and prepare it again, or use the version that wrote it"
            )
        manifest = Manifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{data_dir}: no manifest.json, so this is not a complete data directory; "
            f"run python -m data_prep prepare PRESET --dir {data_dir}"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "manifest"
        raise DataError(
            f"{path}: {key}, {first['msg']}; restore the file, or remove the directory and prepare it again"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a manifest ({error}); restore it, or remove the directory and prepare it again") from None
    if set(manifest.splits) != set(SPLITS):
        raise DataError(f"{path}: splits={sorted(manifest.splits)}, not train and val; restore the file")
    follows = content_id(manifest.dtype, manifest.tokenizer.id, manifest.splits)
    if manifest.content_id != follows:
        raise DataError(
            f"{path}: content_id={manifest.content_id[:12]}…, the shards it lists give {follows[:12]}…; "
            "the file was edited: restore it, or remove the directory and prepare it again"
        )
    return manifest


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Write manifest.json as the last file: temporary name, sync, rename, sync of the directory."""
    temporary = data_dir / "manifest.json.tmp"
    with temporary.open("wb") as file:
        file.write(manifest.model_dump_json(indent=1).encode() + b"\n")
        sync_file(file)
    temporary.rename(data_dir / "manifest.json")
    sync_directory(data_dir)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_sizes(data_dir: Path, manifest: Manifest, splits: Sequence[str] = SPLITS) -> None:
    """Check that every file of the splits is there and as long as the manifest says; reads no token.

    Raises: DataError naming the first file that is not.
    """
    for fault in iter_size_faults(data_dir, manifest, splits):
        raise DataError(f"{fault}; run python -m data_prep prepare again or restore the shard")


def iter_size_faults(data_dir: Path, manifest: Manifest, splits: Sequence[str] = SPLITS) -> Iterator[str]:
    """Yield one "file: what is wrong" per missing, truncated or overlong file."""
    id_bytes = np.dtype(manifest.dtype).itemsize
    for shard in (shard for split in splits for shard in manifest.splits[split].shards):
        for name, count, unit_bytes, unit in (
            (shard.file, shard.tokens, id_bytes, "tokens"),
            (shard.idx_file, shard.documents, 8, "document ends"),
        ):
            path = data_dir / name
            if not path.is_file():
                yield f"{path}: manifest says {count:,} {unit} but the file is missing"
            elif (size := path.stat().st_size) != count * unit_bytes:
                rest = f" and {size % unit_bytes} bytes" if size % unit_bytes else ""
                yield f"{path}: manifest says {count:,} {unit} but the file holds {size // unit_bytes:,}{rest}"


class TokenShards:
    """The ids of one split as one stream over shards that stay mapped."""

    def __init__(self, shards: Sequence[npt.NDArray[np.unsignedinteger[Any]]], dtype: DType = "uint16") -> None:
        # An empty file cannot be mapped and holds no window: it takes no part.
        self._shards = [shard for shard in shards if len(shard)]
        self._views: dict[tuple[int, int], npt.NDArray[Any]] = {}
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self.dtype = np.dtype(dtype)
        self.n_tokens = int(self._ends[-1]) if self._shards else 0

    @classmethod
    def open(cls, data_dir: Path, split: str, manifest: Manifest | None = None) -> Self:
        """Map the shards of a split.

        Raises: DataError when the directory is not complete or a file is missing or of the wrong size.
        """
        manifest = manifest or load_manifest(data_dir)
        if split not in manifest.splits:
            raise DataError(f"{data_dir}: split={split!r}, there is none of that name; use train or val")
        check_sizes(data_dir, manifest, [split])
        little = np.dtype(manifest.dtype).newbyteorder("<")
        # asarray drops the memmap subclass, whose every slice costs a microsecond, and keeps the map alive.
        shards = [
            np.asarray(np.memmap(data_dir / shard.file, dtype=little, mode="r"))
            for shard in manifest.splits[split].shards
            if shard.tokens
        ]
        return cls(shards, manifest.dtype)

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return the ids from start up to stop, as stored; a read-only view where one shard holds them."""
        self._check_bounds(start, stop)
        pieces = []
        begin = 0
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            if begin < stop and start < end:
                pieces.append(shard[max(start - begin, 0) : stop - begin])
            begin = end
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def gather(
        self, starts: npt.NDArray[np.int64], length: int, out: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Copy one window of ids per start; windows may straddle shards.

        Shapes: starts (n,) -> (n, length), into `out` when it is given.
        """
        if out is None:
            out = np.empty((len(starts), length), dtype=np.int64)
        if not len(starts):
            return out
        self._check_bounds(int(starts.min()), int(starts.max()) + length)
        if len(self._shards) == 1:
            out[:] = self._windows_of(0, length)[starts]
        else:
            self._gather_over_shards(starts, length, out)
        return out

    def _gather_over_shards(self, starts: npt.NDArray[np.int64], length: int, out: npt.NDArray[np.int64]) -> None:
        owners = np.searchsorted(self._ends, starts, side="right")
        inside = starts + length <= self._ends[owners]
        for owner in np.unique(owners[inside]).tolist():
            rows = np.flatnonzero(inside & (owners == owner))
            shard = self._shards[owner]
            out[rows] = self._windows_of(owner, length)[starts[rows] - (self._ends[owner] - len(shard))]
        for row in np.flatnonzero(~inside).tolist():
            start = int(starts[row])
            out[row] = self.read(start, start + length)

    def _windows_of(self, owner: int, length: int) -> npt.NDArray[Any]:
        """Return the view of a shard whose row i is shard[i : i + length]; making it costs more than a small batch."""
        key = (owner, length)
        if key not in self._views:
            self._views[key] = np.lib.stride_tricks.sliding_window_view(self._shards[owner], length)
        return self._views[key]

    def _check_bounds(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"ids {start}..{stop} of a split that holds {self.n_tokens}")


class SplitWriter:
    """Writes the shards of one split, one after the other, hashed as they are written and synced when they are full.

    Note: a document that does not fit into the room left begins the next shard; one that is longer than a shard runs on.
    """

    def __init__(self, data_dir: Path, split: str, dtype: DType = "uint16", max_shard_tokens: int = MAX_SHARD_TOKENS) -> None:
        self.data_dir, self.split, self.dtype, self.max_shard_tokens = data_dir, split, dtype, max_shard_tokens
        self._shards: list[ShardRecord] = []
        self._open: _OpenShard | None = None
        (data_dir / split).mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open:
            self._open.abandon()

    @property
    def room(self) -> int:
        return self.max_shard_tokens - (self._open.tokens if self._open else 0)

    def count_fitting(self, ends: npt.NDArray[np.int64]) -> int:
        """Return how many of the documents that end there, counted from here, fit into the room left."""
        return int(np.searchsorted(ends, self.room, side="right"))

    def begin_document(self, n_ids: int) -> None:
        """Make room for a document of this length, if need be in the next shard."""
        if n_ids > self.room and self._open:
            self._close_shard()

    def write(self, ids: Ids, ends: Sequence[int] | npt.NDArray[np.int64] = ()) -> None:
        """Append ids; `ends` says where documents end in them.

        Raises: DataError when an id does not fit the dtype.
        """
        places = np.asarray(ends, dtype=np.int64)
        begin = 0
        while begin < len(ids):
            if not self.room:
                self._close_shard()
            if self._open is None:
                self._open = _OpenShard(self.data_dir, f"{self.split}/{len(self._shards):05d}", self.dtype)
            stop = min(begin + self.room, len(ids))
            self._open.write(ids[begin:stop])
            self._open.end_documents(places[(begin < places) & (places <= stop)] - stop)
            begin = stop

    def end_document(self) -> None:
        """Say that a document ends where the last id was written."""
        if self._open:
            self._open.end_documents(np.zeros(1, dtype=np.int64))

    def close(self, text_bytes: int) -> SplitRecord:
        """Finish the last shard and return the totals."""
        if self._open:
            self._close_shard()
        sync_directory(self.data_dir / self.split)
        return SplitRecord(
            tokens=sum(shard.tokens for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            text_bytes=text_bytes,
            shards=tuple(self._shards),
        )

    def _close_shard(self) -> None:
        if self._open:
            self._shards.append(self._open.close())
            self._open = None


class _OpenShard:
    """The shard that is being written; nothing of it but its last few megabytes is in memory."""

    def __init__(self, data_dir: Path, name: str, dtype: DType) -> None:
        self.data_dir, self.name, self.dtype = data_dir, name, dtype
        self.tokens, self.documents, self.max_token_id = 0, 0, 0
        self._bin = (data_dir / f"{name}.bin").open("wb")
        self._idx = (data_dir / f"{name}.idx").open("wb")
        self._bin_digest, self._idx_digest = hashlib.sha256(), hashlib.sha256()

    def write(self, ids: Ids) -> None:
        self.max_token_id = max(self.max_token_id, _checked_max(ids, self.dtype, f"{self.data_dir / self.name}.bin"))
        data = np.ascontiguousarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<")).data
        self._bin.write(data)
        self._bin_digest.update(data)
        self.tokens += len(ids)

    def end_documents(self, ends: npt.NDArray[np.int64]) -> None:
        """Note ends of documents, relative to the last id written."""
        idx = (ends + self.tokens).astype("<u8").tobytes()
        self._idx.write(idx)
        self._idx_digest.update(idx)
        self.documents += len(ends)

    def abandon(self) -> None:
        """Close the files as they are, after an error."""
        self._bin.close()
        self._idx.close()

    def close(self) -> ShardRecord:
        for file in (self._bin, self._idx):
            with file:
                sync_file(file)
        return ShardRecord(
            file=f"{self.name}.bin",
            tokens=self.tokens,
            documents=self.documents,
            max_token_id=self.max_token_id,
            sha256=self._bin_digest.hexdigest(),
            idx_sha256=self._idx_digest.hexdigest(),
        )


def write_split(
    data_dir: Path,
    split: str,
    documents: Iterable[Ids],
    dtype: DType = "uint16",
    *,
    text_bytes: int,
    max_shard_tokens: int = MAX_SHARD_TOKENS,
) -> SplitRecord:
    """Write documents as the shards of a split.

    `text_bytes` is the length of the split's text in UTF-8; bits per byte divides by it.

    Raises: DataError when an id does not fit the dtype.
    Note: a document without ids is not written.
    """
    with SplitWriter(data_dir, split, dtype, max_shard_tokens) as writer:
        for ids in documents:
            writer.begin_document(len(ids))
            writer.write(ids, [len(ids)])
        return writer.close(text_bytes)


def _checked_max(ids: Ids, dtype: DType, where: str) -> int:
    """Return the largest id; an id that would wrap around in the file is an error, never a wrong token."""
    low, high, limit = int(ids.min()), int(ids.max()), np.iinfo(dtype).max
    if low < 0 or high > limit:
        wrong = low if low < 0 else high
        raise DataError(f"{where}: token id {wrong:,} does not fit in {dtype} (0..{limit:,}); use a wider dtype")
    return high


def sync_file(file: BinaryIO) -> None:
    """Flush to the disk itself; closing alone survives a crash of the program, not of the machine."""
    file.flush()
    os.fsync(file.fileno())


def iter_faults(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """Read everything and yield one "file: what is wrong" per fault in the shards."""
    size_faults = list(iter_size_faults(data_dir, manifest))
    yield from size_faults
    for split in SPLITS:
        shards = manifest.splits[split].shards
        for shard in shards:
            path, idx_path = data_dir / shard.file, data_dir / shard.idx_file
            # A file of the wrong length was named above; its hash would only say the same again.
            if not any(fault.startswith((f"{path}:", f"{idx_path}:")) for fault in size_faults):
                yield from _iter_shard_faults(path, idx_path, shard, manifest, is_last=shard is shards[-1])


def _iter_shard_faults(path: Path, idx_path: Path, shard: ShardRecord, manifest: Manifest, is_last: bool) -> Iterator[str]:
    for file, expected in ((path, shard.sha256), (idx_path, shard.idx_sha256)):
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != expected:
            yield f"{file}: manifest says sha256={expected[:16]}… but the file has {found[:16]}…"
    largest = _largest_id(path, np.dtype(manifest.dtype).newbyteorder("<"))
    if largest >= manifest.vocab_size:
        yield f"{path}: token id {largest:,} is not below vocab_size={manifest.vocab_size:,}"
    ends = np.fromfile(idx_path, dtype="<u8").astype(np.int64)
    bounds = np.concatenate(([0], ends))
    if (np.diff(bounds) <= 0).any():
        yield f"{idx_path}: document ends do not increase"
    if bounds[-1] > shard.tokens or (is_last and bounds[-1] != shard.tokens):
        yield f"{idx_path}: the last document ends at {bounds[-1]:,}, the shard holds {shard.tokens:,} tokens"


def _largest_id(path: Path, dtype: np.dtype[Any]) -> int:
    """Return the largest id of a shard, read in parts."""
    largest = 0
    with path.open("rb") as file:
        while (ids := np.fromfile(file, dtype, count=CHECKED_IDS)).size:
            largest = max(largest, int(ids.max()))
    return largest
