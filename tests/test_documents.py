"""Reading documents: every kind and compression gives the same text, cut anywhere; what is bad is named."""

import gzip
import json
import lzma
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import documents as documents_module
from data_prep.corpus import local_files
from data_prep.documents import BadDocument, Fragment, iter_decoded, iter_pieces, iter_span
from data_prep.shards import DataError
from data_prep.units import plan_units

TEXTS = ["Now is the winter\nof our discontent", "naïve 🙂", "a\0b", "\r\n x \r\n", "<|endoftext|>", " ", "ends with\n"]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),  # two frames
}


def read(paths: list[Path], unit_bytes: int | None = None) -> list[str | BadDocument]:
    """Return whole documents, joined over pieces and units."""
    source = local_files(paths)
    found: list[str | BadDocument] = []
    pieces: list[str] = []
    for unit in plan_units(source, unit_bytes):
        for span in unit:
            for item in iter_span(source.files[span.file], span, "text"):
                if isinstance(item, BadDocument):
                    found.append(item)
                    continue
                pieces.append(item.text)
                if item.ends:
                    found.append("".join(pieces))
                    pieces.clear()
    assert not pieces, "a document without an end"
    return found


def write_jsonl(path: Path, texts: list[str], compression: str = "") -> Path:
    data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS[compression](data))
    return path


@pytest.mark.parametrize("compression", COMPRESS)
def test_jsonl_comes_back(tmp_path, compression):
    assert read([write_jsonl(tmp_path / f"a.jsonl{compression}", TEXTS, compression)]) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_is_one_document(tmp_path, compression):
    text = "".join(TEXTS)
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](text.encode()))
    assert read([tmp_path / f"a.txt{compression}"]) == [text]


@pytest.mark.parametrize("group_rows", [1, 3, 100])
def test_parquet_comes_back_by_row_groups(tmp_path, group_rows):
    pq.write_table(pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), tmp_path / "a.parquet", row_group_size=group_rows)
    assert read([tmp_path / "a.parquet"], unit_bytes=1) == TEXTS
    source = local_files([tmp_path / "a.parquet"])
    assert len(plan_units(source, 1)) == -(-len(TEXTS) // group_rows)


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=12), unit_bytes=st.integers(1, 200))
def test_lines_survive_any_cut_into_units(tmp_path_factory, texts, unit_bytes):
    path = write_jsonl(tmp_path_factory.mktemp("cut") / "a.jsonl", texts)
    assert read([path], unit_bytes) == texts


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="ab \n\r🙂é\0", min_size=1, max_size=200), unit_bytes=st.integers(1, 60), piece=st.integers(1, 40))
def test_text_survives_any_cut_into_units_and_pieces(tmp_path_factory, text, unit_bytes, piece):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARS", piece)
        patch.setattr(documents_module, "CHUNK_BYTES", 16)
        found = read([path], unit_bytes)
    assert found == ([text] if text.strip() else [""] * len(found))


@settings(deadline=None)
@given(text=st.text(alphabet="ab \n🙂", max_size=300), n_chars=st.integers(1, 50))
def test_pieces_are_the_text_and_end_where_no_word_goes_across(text, n_chars):
    pieces = list(iter_pieces(text, n_chars))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(len(piece) <= n_chars for piece, _ in pieces)
    for (before, is_forced), (after, _) in pairwise(pieces):
        assert is_forced or (before[-1].isascii() and not before[-1].isspace() and after[0] in " \n")


def test_streamed_pieces_equal_the_pieces_of_the_whole(tmp_path, monkeypatch):
    text = "some words é\n\nand  more of them. " * 3000
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(documents_module, "PIECE_CHARS", 5000)
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 777)
    file = local_files([tmp_path / "a.txt"]).files[0]
    streamed = [item.text for item in iter_span(file, documents_module.Span(0), "text")]
    assert streamed == [piece for piece, _ in iter_pieces(text, 5000)]
    assert len(streamed) > 10


@settings(deadline=None)
@given(text=st.text(), size=st.integers(1, 9))
def test_decoding_in_chunks_is_decoding(text, size):
    data = text.encode()
    chunks = (data[place : place + size] for place in range(0, len(data), size))
    assert "".join(iter_decoded(chunks, "x")) == text.removeprefix("\ufeff")


# Bad input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "byte 3 is 0xe9, not UTF-8; convert it first"),
        (b"ok\xed\xa0\x80", "byte 2 is 0xed, not UTF-8; convert"),
        ("hi".encode("utf-16"), "byte 0 is 0xff, not UTF-8; convert"),
        (b"cut \xf0\x9f\x99", "byte 4 is 0xf0, not UTF-8; convert"),
    ],
)
def test_text_that_is_not_utf8_is_bad_and_says_where(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    (bad,) = read([tmp_path / "a.txt"])
    assert bad.reason.startswith(f"{tmp_path}/a.txt: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON ("),
        (b"plain words", "not JSON (Expecting value"),
        (b'"a string"', "a JSON str, not an object"),
        (b'{"body": "x", "id": 3}', "text_key=text, no such column (there: body, id); give --text-key"),
        (b'{"text": null}', "text is NoneType, not a string"),
        (b'{"text": "caf\xe9"}', "byte 13 of the line is 0xe9, not UTF-8"),
        (b'{"text": "raw \0 byte"}', "not JSON (Invalid control character"),
        (b"[" * 100_000, "not JSON ("),
    ],
)
@pytest.mark.parametrize("unit_bytes", [None, 40])
def test_a_bad_line_says_its_number_and_the_others_are_read(tmp_path, line, message, unit_bytes):
    good = [b'{"text": "%d"}' % number for number in range(10)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:7], line, *good[7:]]) + b"\n")
    found = read([tmp_path / "a.jsonl"], unit_bytes)
    assert [text for text in found if isinstance(text, str)] == [str(number) for number in range(10)]
    (bad,) = (item for item in found if isinstance(item, BadDocument))
    assert bad.reason.startswith(f"{tmp_path}/a.jsonl:8: {message}")
    assert "\n" not in bad.reason


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    assert read([tmp_path / "a.jsonl"]) == ["a", "b"]


@pytest.mark.parametrize("unit_bytes", [None, 1000])
def test_a_line_longer_than_memory_allows_is_bad_and_the_rest_is_read(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 5000)
    write_jsonl(tmp_path / "a.jsonl", ["a", "x" * 20_000, "b"])
    first, bad, last = read([tmp_path / "a.jsonl"], unit_bytes)
    assert (first, last) == ("a", "b")
    assert bad.reason.startswith(f"{tmp_path}/a.jsonl:2: a line of 20,022 bytes, more than 5,000; a .txt file")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_compression_is_one_clear_line_and_never_a_short_text(tmp_path, compression, kind, damage):
    path = write_jsonl(
        tmp_path / f"a.{kind}{compression}", [f"{number} words {number * 7919 % 1000}" for number in range(3000)], compression
    )
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-20:]
    else:
        data[len(data) // 2] ^= 0xFF
        data[len(data) // 2 + 1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^{path}: {compression[1:]} data damaged or cut short \(.*; restore the file$"):
        read([path])


def test_a_missing_column_of_parquet_and_a_torn_file_are_one_clear_line(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: text_key=text, no such column \(there: body\); give --text-key"):
        read([tmp_path / "a.parquet"])
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet: not a parquet file, or cut short"):
        read([tmp_path / "a.parquet"])


def test_a_null_in_parquet_is_bad_and_says_its_row(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet", row_group_size=1)
    first, bad, last = read([tmp_path / "a.parquet"], unit_bytes=1)
    assert (first, last) == ("a", "b")
    assert bad.reason.startswith(f"{tmp_path}/a.parquet: row 2: text is NoneType, not a string")


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    file = local_files([path]).files[0]
    items = iter_span(file, documents_module.Span(0), "text")
    assert isinstance(next(items), Fragment)
    path.write_text(path.read_text() + '{"text": "c"}\n')
    with pytest.raises(DataError, match=r"a.jsonl: size=.*, changed while it was read"):
        list(items)
    path.unlink()
    with pytest.raises(DataError, match=r"a.jsonl: was there when this was planned, now No such file"):
        list(iter_span(file, documents_module.Span(0), "text"))
