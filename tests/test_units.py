"""Units: together they are the source, each document in one, and they follow from the source alone."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import Source, local_files
from data_prep.documents import SourceFile
from data_prep.shards import SourceRecord
from data_prep.units import MAX_UNIT_BYTES, MIN_UNIT_BYTES, plan_units

RECORD = SourceRecord(kind="files", label="made up", sha256="0")


def made_up(sizes: list[int], compression: str = "") -> Source:
    files = tuple(SourceFile(f"/none/{place}.jsonl", "jsonl", compression, size, 0, "0") for place, size in enumerate(sizes))
    return Source(RECORD, files)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 3000))
def test_every_byte_is_in_one_unit_in_order(sizes, unit_bytes):
    source = made_up(sizes)
    spans = [span for unit in plan_units(source, unit_bytes) for span in unit]
    covered = [(span.file, span.start, source.files[span.file].size if span.stop is None else span.stop) for span in spans]
    place = 0
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            file, start, stop = covered[place]
            assert (file, start) == (number, at)
            assert at < stop <= size
            at, place = stop, place + 1
    assert place == len(covered)


def test_small_files_share_a_unit_and_compressed_ones_are_whole():
    assert len(plan_units(made_up([100] * 50), 1000)) == 5
    (unit,) = plan_units(made_up([10**9], "xz"), 1000)
    assert unit[0].stop is None


def test_the_size_of_units_follows_the_source():
    for total in (10**6, 10**9, 10**11, 10**13):
        units = plan_units(made_up([total]))
        size = -(-total // len(units))
        assert size <= MAX_UNIT_BYTES
        assert size > MIN_UNIT_BYTES / 2 or len(units) == 1


def test_units_do_not_depend_on_where_the_files_are(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in "abc":
            Path(tmp_path / folder / f"{name}.jsonl").write_text('{"text": "x"}\n' * 99)
    assert plan_units(local_files([tmp_path / "one"]), 500) == plan_units(local_files([tmp_path / "two"]), 500)
