"""The work, cut into units: a pure function of the source, so that workers and restarts cannot change the output."""

from itertools import pairwise
from pathlib import Path

from data_prep.corpus import Source
from data_prep.documents import SourceFile, Span, open_parquet
from data_prep.hub import count_shards

MIN_UNIT_BYTES = 4 << 20
MAX_UNIT_BYTES = 256 << 20
N_UNITS = 1024  # aimed at, between those bounds
MAX_HUB_UNITS = 4096  # a unit is at least a row group
EXPANSION = 3  # bytes of text per byte of compressed text and of parquet, roughly

Unit = tuple[Span, ...]


def plan_units(source: Source, unit_bytes: int | None = None) -> tuple[Unit, ...]:
    """Cut a source into units of about equal work, in the order of the documents."""
    if source.hub is not None:
        n_shards = count_shards(source.hub)
        step = -(-n_shards // MAX_HUB_UNITS)
        return tuple((Span(0, start, min(start + step, n_shards)),) for start in range(0, n_shards, step))
    total = sum(estimate_text_bytes(file) for file in source.files)
    size = unit_bytes or min(max(total // N_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    open_spans: list[Span] = []
    room = size
    for number, file in enumerate(source.files):
        for span, span_bytes in _cut_file(number, file, size):
            if open_spans and span_bytes > room:
                units.append(tuple(open_spans))
                open_spans, room = [], size
            open_spans.append(span)
            room -= span_bytes
    return (*units, tuple(open_spans)) if open_spans else tuple(units)


def estimate_text_bytes(file: SourceFile) -> int:
    is_packed = file.compression or file.format == "parquet"
    return file.size * EXPANSION if is_packed else file.size


def _cut_file(number: int, file: SourceFile, size: int) -> list[tuple[Span, int]]:
    """Return the spans of one file, and about how many bytes of text each holds."""
    if file.format == "parquet":
        return _cut_parquet(number, file, size)
    if file.compression or file.size <= size:
        return [(Span(number), estimate_text_bytes(file))]
    places = [*range(0, file.size, size), file.size]
    return [(Span(number, start, stop), stop - start) for start, stop in pairwise(places)]


def _cut_parquet(number: int, file: SourceFile, size: int) -> list[tuple[Span, int]]:
    with open_parquet(file.path) as opened:
        groups = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
    spans, start, held = [], 0, 0
    for group, group_bytes in enumerate(groups):
        if held and held + group_bytes > size:
            spans.append((Span(number, start, group), held))
            start, held = group, 0
        held += group_bytes
    return [*spans, (Span(number, start, len(groups)), held)] if groups else []


def describe(source: Source, unit: Unit) -> str:
    """Name a unit for people."""
    if source.hub is not None:
        return f"{source.hub.path} shard {unit[0].start}"
    first, last = (Path(source.files[span.file].path).name for span in (unit[0], unit[-1]))
    part = "" if unit[0].stop is None else f" from {unit[0].start:,}"
    return f"{first}{part}" if first == last else f"{first}{part} to {last}"
