"""One unit of work: its documents, routed to a split, encoded, written as a part and committed by one rename.

A part is `NNNNNN.train.bin` and `NNNNNN.val.bin` (ids), `NNNNNN.documents` (a row per document) and `NNNNNN.json`, the record
that is written last: what has no record was not done. Nothing in a part depends on which worker wrote it, or when.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_prep.corpus import Source
from data_prep.documents import BadDocument, Fragment, Item, digest_of, iter_pieces, iter_span
from data_prep.hub import iter_hub
from data_prep.shards import SPLITS, DataError, DType, sync_directory, sync_file
from data_prep.stop import StopWish, fault_point
from data_prep.tokenizer import Ids, Tokenizer, load_tokenizer
from data_prep.units import Unit

BATCH_BYTES = 4 << 20  # of text, between two looks at whether to stop
CHECK_CHARS = 1 << 16  # of each batch, encoded by tiktoken too when another encoder is at work
MAX_REPORTED = 5

# One document, or the part of it that lies in this unit and split.
ROW = np.dtype([("digest", "<u8", 2), ("n_ids", "<u8"), ("text_bytes", "<u8"), ("is_val", "u1"), ("ends", "u1"), ("part", "u1")])

Report = Callable[[int, int], None]  # bytes of text and ids since the last call


@dataclass(frozen=True)
class SplitPlan:
    """Which text validates: a hash of the document, the tail of the characters, or what the files are."""

    mode: str
    val_fraction: float | None = None
    boundary: int = 0  # of tail: the first character that validates
    offsets: tuple[int, ...] = ()  # of tail: characters before each unit

    @cached_property
    def threshold(self) -> int:
        return int((self.val_fraction or 0.0) * 2**64)


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; equal for all of them."""

    source: Source
    units: tuple[Unit, ...]
    work: Path
    recipe_id: str
    split: SplitPlan
    dtype: DType = "uint16"
    eot: int | None = None
    backend: str = "tiktoken"
    skip_bad: bool = False
    batch_bytes: int = BATCH_BYTES


@dataclass
class Counts:
    """What a unit found; the record of its part."""

    documents_in: int = 0
    documents_blank: int = 0
    documents_bad: int = 0
    documents_repaired: int = 0
    forced_cuts: int = 0
    ids: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    rows: int = 0
    bad: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)


def iter_unit(source: Source, unit: Unit) -> Iterator[tuple[str, Item]]:
    """Yield the side ("train", "val" or "") and the documents of a unit."""
    for span in unit:
        if source.hub is not None:
            yield from (("", item) for item in iter_hub(source.hub, span, source.text_key))
        else:
            file = source.files[span.file]
            yield from ((file.side, item) for item in iter_span(file, span, source.text_key))


def iter_usable(job: Job, number: int, counts: Counts) -> Iterator[tuple[str, Fragment]]:
    """Yield the fragments that will be encoded, with the split or "" where the caller decides, and count the others.

    Raises: DataError at a bad document, unless they are to be skipped.
    """
    is_new = True
    for side, item in iter_unit(job.source, job.units[number]):
        if isinstance(item, BadDocument):
            counts.documents_in += 1
            if not job.skip_bad:
                raise DataError(f"{item.reason}; or pass --on-bad skip" if ";" in item.reason else f"{item.reason}; mend it")
            counts.documents_bad += 1
            if len(counts.bad) < MAX_REPORTED:
                counts.bad.append(item.reason)
            continue
        counts.documents_in += is_new and not _goes_on(job, item, number)
        counts.forced_cuts += item.n_forced
        is_new = item.ends
        if item.digest is None or not item.text:
            if not item.text.strip():
                counts.documents_blank += item.ends
                continue
            item = _with_digest(item, counts)
        yield side, item


def _goes_on(job: Job, item: Fragment, number: int) -> bool:
    """Tell whether this fragment continues a document that an earlier unit began and counted."""
    return item.is_part and job.units[number][0].start > 0


def _with_digest(item: Fragment, counts: Counts) -> Fragment:
    """Name a whole document by its text; lone surrogates, which UTF-8 cannot hold, become U+FFFD and are counted."""
    text = item.text
    try:
        data = text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        data = text.encode()
        counts.documents_repaired += 1
    return item._replace(text=text, digest=digest_of(data))


def route(split: SplitPlan, side: str, item: Fragment, place: int) -> Iterator[tuple[str, str, bool]]:
    """Yield (split, text, whether a document ends) of one fragment; the tail's boundary may cut it in two.

    `place` is the number of characters before it.
    """
    if side or split.mode == "hash":
        is_val = side == "val" or (not side and int.from_bytes((item.digest or b"")[:8], "big") < split.threshold)
        yield "val" if is_val else "train", item.text, item.ends
        return
    n_train = min(max(split.boundary - place, 0), len(item.text))
    if n_train:
        # Where the boundary falls right behind a piece of a longer document, the document ends there too.
        yield "train", item.text[:n_train], item.ends or place + n_train == split.boundary
    if n_train < len(item.text) or not item.text:
        yield "val", item.text[n_train:], item.ends


def scan_unit(job: Job, number: int, report: Report, wish: StopWish) -> dict[str, Any]:
    """Return the characters that a unit holds, and how many: the alphabet and the tail's place follow from all of them."""
    alphabet: set[str] = set()
    n_chars = 0
    for _, item in iter_usable(job, number, Counts()):
        wish.check()
        alphabet.update(item.text)
        n_chars += len(item.text)
        report(len(item.text), 0)
    return {"chars": "".join(sorted(alphabet)), "n_chars": n_chars}


def scan_path(work: Path, number: int) -> Path:
    return work / "scan" / f"{number:06d}.json"


def write_scan(job: Job, number: int, report: Report, wish: StopWish) -> None:
    """Scan a unit and keep what was found."""
    write_json(scan_path(job.work, number), scan_unit(job, number, report, wish))


def record_path(work: Path, number: int) -> Path:
    return work / "parts" / f"{number:06d}.json"


def part_path(work: Path, number: int, kind: str) -> Path:
    return work / "parts" / f"{number:06d}.{kind}"


def load_record(work: Path, number: int) -> dict[str, Any] | None:
    """Return the record of a part that is there in full, else None."""
    try:
        record: dict[str, Any] = json.loads(record_path(work, number).read_bytes())
        sizes = {kind: part_path(work, number, kind).stat().st_size for kind in record["bytes"]}
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return record if sizes == record["bytes"] else None


class Mapper:
    """Maps units to parts in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = load_tokenizer(job.work / "tokenizer", job.backend)
        self.exact = load_tokenizer(job.work / "tokenizer") if job.backend != "tiktoken" else None

    def map_unit(self, number: int, report: Report, wish: StopWish) -> None:
        """Write the part of one unit and commit it.

        Raises: DataError on bad input; StoppedError when asked to stop, after the batch at work.
        """
        note(self.job.work, f"begin {number}")
        with Part(self.job, number, self.tokenizer, self.exact) as part:
            place = self.job.split.offsets[number] if self.job.split.offsets else 0
            for side, item in iter_usable(self.job, number, part.counts):
                for split, text, ends in route(self.job.split, side, item, place):
                    part.add(split, item, text, ends)
                place += len(item.text)
                if part.held_bytes >= self.job.batch_bytes:
                    report(*part.flush())
                    fault_point("map")
                    wish.check()
            report(*part.flush())
            fault_point("commit")
            part.commit()
        note(self.job.work, f"commit {number}")


class Part:
    """The files of one unit, under temporary names until they are committed."""

    def __init__(self, job: Job, number: int, tokenizer: Tokenizer, exact: Tokenizer | None) -> None:
        self.job, self.number, self.tokenizer, self.exact = job, number, tokenizer, exact
        self.counts = Counts()
        self.held_bytes = 0
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._digests = {kind: hashlib.sha256() for kind in ("train.bin", "val.bin", "documents")}
        self._held: dict[str, list[Ids]] = {split: [] for split in SPLITS}
        self._rows: list[tuple[Any, ...]] = []
        self._open_row: dict[str, tuple[int, int]] = {}  # ids and bytes of a document that comes in pieces
        self._item: Fragment | None = None
        self._document_splits: set[str] = set()  # more than one where the tail's boundary cuts a document
        self._unchecked = exact is not None

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for kind in self._files:
            self._temporary(kind).unlink(missing_ok=True)

    def add(self, split: str, item: Fragment, text: str, ends: bool) -> None:
        """Encode one piece of a document."""
        if item is not self._item:
            if self._item is None or self._item.ends:
                self._document_splits.clear()
            self._item = item
        self._document_splits.add(split)
        n_ids, n_bytes = self._open_row.pop(split, (0, 0))
        text_bytes = 0
        for piece, is_forced in iter_pieces(text):
            self.counts.forced_cuts += is_forced
            ids = self._encoded(piece)
            self._held[split].append(ids)
            n_ids += len(ids)
            text_bytes += len(piece) if piece.isascii() else len(piece.encode())
        if ends and self.job.eot is not None:
            self._held[split].append(np.array([self.job.eot], dtype=self.job.dtype))
            n_ids += 1
        self.held_bytes += text_bytes
        self._open_row[split] = (n_ids, n_bytes + text_bytes)
        if ends:
            self._close_row(split, item, ends=True)

    def _encoded(self, text: str) -> Ids:
        ids = self.tokenizer.encode(text)
        if len(ids) and int(ids.max()) >= self.tokenizer.vocab_size:
            raise DataError(
                f"{self.tokenizer.name} tokenizer: token id {int(ids.max()):,} >= vocab_size={self.tokenizer.vocab_size:,}; "
                "the tokenizer's file is damaged"
            )
        if self._unchecked and text.strip():
            self._check_encoder(text[:CHECK_CHARS])
        return ids.astype(self.job.dtype, copy=False)

    def _check_encoder(self, text: str) -> None:
        """Compare a fast encoder with tiktoken, once a batch."""
        self._unchecked = False
        assert self.exact is not None
        if not np.array_equal(self.tokenizer.encode(text), self.exact.encode(text)):
            raise DataError(
                f"unit {self.number}: backend={self.job.backend}, its ids differ from tiktoken's; use --backend tiktoken"
            )

    def _close_row(self, split: str, item: Fragment, ends: bool) -> None:
        n_ids, text_bytes = self._open_row.pop(split)
        digest = tuple(np.frombuffer(item.digest or bytes(16), dtype="<u8").tolist())
        is_part = item.is_part or len(self._document_splits) > 1
        self._rows.append((digest, n_ids, text_bytes, split == "val", ends, is_part))

    def flush(self) -> tuple[int, int]:
        """Write what is held; return the bytes of text and the ids in it."""
        n_ids = 0
        for split in SPLITS:
            if held := self._held[split]:
                ids = np.concatenate(held)
                n_ids += len(ids)
                self.counts.ids[split] += len(ids)
                held.clear()
                self._write(f"{split}.bin", np.ascontiguousarray(ids, dtype=np.dtype(self.job.dtype).newbyteorder("<")))
        self._write_rows()
        held_bytes, self.held_bytes = self.held_bytes, 0
        self._unchecked = self.exact is not None
        return held_bytes, n_ids

    def _write_rows(self) -> None:
        if self._rows:
            self.counts.rows += len(self._rows)
            self._write("documents", np.array(self._rows, dtype=ROW))
            self._rows.clear()

    def _write(self, kind: str, array: npt.NDArray[Any]) -> None:
        if kind not in self._files:
            self._files[kind] = self._stack.enter_context(self._temporary(kind).open("wb"))
        data = array.tobytes()
        self._files[kind].write(data)
        self._digests[kind].update(data)

    def commit(self) -> None:
        """Give the files their names, the record last."""
        for split in list(self._open_row):  # the document goes on in the next unit
            assert self._item is not None
            self._close_row(split, self._item, ends=False)
        self._write_rows()
        sizes = {}
        for kind, file in self._files.items():
            sync_file(file)
            sizes[kind] = file.tell()
        self._stack.close()
        for kind in ("train.bin", "val.bin", "documents"):
            if kind in self._files:
                self._temporary(kind).rename(part_path(self.job.work, self.number, kind))
            self.counts.sha256[kind] = self._digests[kind].hexdigest()
        self._files.clear()
        record = self.counts.__dict__ | {"bytes": sizes, "recipe_id": self.job.recipe_id}
        write_json(record_path(self.job.work, self.number), record)

    def _temporary(self, kind: str) -> Path:
        return self.job.work / "parts" / f".{self.number:06d}.{os.getpid()}.{kind}"


def write_json(path: Path, value: object) -> None:
    """Write a file that is there in full or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(json.dumps(value, ensure_ascii=True).encode("ascii") + b"\n")
        sync_file(file)
    temporary.rename(path)
    sync_directory(path.parent)


def note(work: Path, line: str) -> None:
    """Append a line to the journal of the work: what was begun and what was committed, over all attempts."""
    with (work / "journal").open("a") as file:
        file.write(f"{line}\n")
