"""Parts to shards: find duplicates over all units, then copy what is kept in the order of the units.

Memory does not grow with the corpus: digests are compared in buckets on disk, ids are copied a few megabytes at a time.
"""

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.mapping import ROW, Job, load_record, part_path
from data_prep.shards import SPLITS, Ids, SplitRecord, SplitWriter
from data_prep.stop import StopWish, fault_point

CHUNK_IDS = 1 << 21
BUCKET_ROWS = 1 << 20  # about 100 MB while a bucket is sorted
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])

Rows = npt.NDArray[Any]
Kept = npt.NDArray[np.bool_]


class DamagedPartError(RuntimeError):
    """A part is not what its record says; it must be mapped again."""


def pack(
    job: Job, out: Path, max_shard_tokens: int, drop_copies: bool, progress: Callable[[int], None], wish: StopWish
) -> tuple[dict[str, SplitRecord], int]:
    """Write the shards of both splits; return their records and the number of duplicates left out.

    Raises: DamagedPartError; StoppedError when asked to stop.
    """
    records = [_record(job, number) for number in range(len(job.units))]
    starts = np.concatenate(([0], np.cumsum([record["rows"] for record in records]))).astype(np.int64)
    dropped = find_copies(job, starts) if drop_copies else None
    lengths = find_long_documents(job)
    n_copies, text_bytes = 0, dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(out, split, job.dtype, max_shard_tokens)) for split in SPLITS}
        copiers = {split: _Copier(job, split, writer, lengths) for split, writer in writers.items()}
        for number, record in enumerate(records):
            wish.check()
            for split in SPLITS:
                _check_hash(job, number, record, f"{split}.bin")
            rows = load_rows(job, number)
            kept = np.ones(len(rows), dtype=bool)
            if dropped is not None:
                kept = dropped[starts[number] : starts[number + 1]] == 0
                n_copies += int((~kept).sum())
            for split in SPLITS:
                inside = rows["is_val"] == (split == "val")
                text_bytes[split] += int(rows["text_bytes"][inside & kept].sum())
                copiers[split].copy_unit(number, rows[inside], kept[inside])
            progress(sum(record["ids"].values()))
            fault_point("pack")
        return {split: writer.close(text_bytes[split]) for split, writer in writers.items()}, n_copies


def _record(job: Job, number: int) -> dict[str, Any]:
    """Return the record of a part whose files are the ones that were committed."""
    record = load_record(job.work, number)
    if record is None:
        raise DamagedPartError(
            f"{part_path(job.work, number, 'json')}: part missing or cut short; run it again to map the unit anew"
        )
    _check_hash(job, number, record, "documents")
    return record


def _check_hash(job: Job, number: int, record: dict[str, Any], kind: str) -> None:
    """Raises: DamagedPartError when a file of a part is not what was committed; the unit then counts as not done."""
    if kind in record["bytes"]:
        path = part_path(job.work, number, kind)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != record["sha256"][kind]:
            part_path(job.work, number, "json").unlink()
            raise DamagedPartError(f"{path}: sha256={found[:16]}…, not what was committed; run it again to map the unit anew")


def load_rows(job: Job, number: int) -> Rows:
    """Return the documents of a unit."""
    path = part_path(job.work, number, "documents")
    return np.fromfile(path, dtype=ROW) if path.exists() else np.empty(0, dtype=ROW)


def find_long_documents(job: Job) -> dict[tuple[int, str], int]:
    """Return the whole length of each document that goes on in later units, by the unit and split where it begins."""
    lengths: dict[tuple[int, str], int] = {}
    begun: dict[str, tuple[int, str]] = {}
    for number in range(len(job.units)):
        rows = load_rows(job, number)
        for split in SPLITS:
            inside = rows[rows["is_val"] == (split == "val")]
            if split in begun and len(inside):
                lengths[begun[split]] += int(inside[0]["n_ids"])
                if inside[0]["ends"]:
                    del begun[split]
            if len(inside) and not inside[-1]["ends"] and split not in begun:
                begun[split] = (number, split)
                lengths[begun[split]] = int(inside[-1]["n_ids"])
    return lengths


class _Copier:
    """Copies the ids of one split from the parts to the shards."""

    def __init__(self, job: Job, split: str, writer: SplitWriter, lengths: dict[tuple[int, str], int]) -> None:
        self.job, self.split, self.writer, self.lengths = job, split, writer, lengths
        self.dtype = np.dtype(job.dtype).newbyteorder("<")
        self.is_inside = False  # a document, whose rest is in a later unit

    def copy_unit(self, number: int, rows: Rows, kept: Kept) -> None:
        """Copy what is kept of one unit."""
        n_ids = rows["n_ids"].astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(n_ids)))
        if not len(rows):
            return
        path = part_path(self.job.work, number, f"{self.split}.bin")
        with path.open("rb") if path.exists() else io.BytesIO() as file:
            for begin, stop in _iter_runs(kept):
                file.seek(int(offsets[begin]) * self.dtype.itemsize)
                self._copy_run(file, n_ids[begin:stop], rows["ends"][begin:stop], number)

    def _copy_run(self, file: IO[bytes], n_ids: npt.NDArray[np.int64], ends: Rows, number: int) -> None:
        if self.is_inside:
            self._stream(file, int(n_ids[0]), bool(ends[0]))
            n_ids, ends = n_ids[1:], ends[1:]
        if not len(n_ids):
            return
        n_whole = len(n_ids) if ends[-1] else len(n_ids) - 1
        self._copy_whole(file, n_ids[:n_whole])
        if n_whole < len(n_ids):
            self.writer.begin_document(self.lengths[number, self.split])
            self._stream(file, int(n_ids[-1]), ends=False)

    def _copy_whole(self, file: IO[bytes], n_ids: npt.NDArray[np.int64]) -> None:
        """Copy whole documents, as many at once as fit into the shard and a chunk."""
        ends = np.cumsum(n_ids[n_ids > 0])
        while len(ends):
            n_fit = min(self.writer.count_fitting(ends), int(np.searchsorted(ends, CHUNK_IDS, side="right")))
            if n_fit:
                self.writer.write(self._read(file, int(ends[n_fit - 1])), ends[:n_fit])
            else:
                self.writer.begin_document(int(ends[0]))
                self._stream(file, int(ends[0]), ends=True)
                n_fit = 1
            ends = ends[n_fit:] - ends[n_fit - 1]

    def _stream(self, file: IO[bytes], n_ids: int, ends: bool) -> None:
        """Copy a document, or the part of it that is here, a chunk at a time."""
        while n_ids:
            count = min(n_ids, CHUNK_IDS)
            self.writer.write(self._read(file, count))
            n_ids -= count
        if ends:
            self.writer.end_document()
        self.is_inside = not ends

    def _read(self, file: IO[bytes], count: int) -> Ids:
        return np.frombuffer(file.read(count * self.dtype.itemsize), self.dtype)


def _iter_runs(kept: Kept) -> Iterator[tuple[int, int]]:
    """Yield the begin and stop of each run of kept rows."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


# Exact duplicates


def find_copies(job: Job, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Mark each row whose text came before; rows are counted over all units, `starts` says where each unit's begin.

    Note: the marks lie in a file, and digests are sorted a bucket at a time, so memory does not grow with the corpus.
    """
    n_rows = int(starts[-1])
    if not n_rows:
        return np.empty(0, dtype=np.uint8)
    marks = np.memmap(job.work / "copies", dtype=np.uint8, mode="w+", shape=n_rows)
    n_buckets = -(-n_rows // BUCKET_ROWS)
    if n_buckets == 1:
        _mark_copies(np.concatenate([_keys(job, number, int(start)) for number, start in enumerate(starts[:-1])]), marks)
        return marks
    folder = job.work / "buckets"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, start in enumerate(starts[:-1].tolist()):
        keys = _keys(job, number, start)
        bucket_of = (keys["high"] >> np.uint64(32)) * np.uint64(n_buckets) >> np.uint64(32)
        for bucket in np.unique(bucket_of).tolist():
            with (folder / str(bucket)).open("ab") as file:
                file.write(keys[bucket_of == bucket].tobytes())
    for path in folder.iterdir():
        _mark_copies(np.fromfile(path, dtype=KEY), marks)
    shutil.rmtree(folder)
    return marks


def _keys(job: Job, number: int, start: int) -> Rows:
    """Return the digests of a unit's whole documents, with their places over all units."""
    rows = load_rows(job, number)
    places = np.flatnonzero(rows["part"] == 0)
    keys = np.empty(len(places), dtype=KEY)
    keys["high"], keys["low"] = rows["digest"][places].T
    keys["place"] = places + start
    return keys


def _mark_copies(keys: Rows, marks: npt.NDArray[np.uint8]) -> None:
    order = np.lexsort((keys["place"], keys["low"], keys["high"]))
    keys = keys[order]
    same = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    marks[keys["place"][1:][same]] = 1
