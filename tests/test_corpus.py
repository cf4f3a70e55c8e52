"""Where text comes from: the order of places, the checks, and the fallback. No test opens the network."""

import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data_prep import corpus as corpus_module
from data_prep.corpus import (
    CORPORA_VARIABLE,
    TINY_SHAKESPEARE_BYTES,
    TINY_SHAKESPEARE_SHA256,
    TINY_SHAKESPEARE_URL,
    NoTinyShakespeareError,
    Source,
    find_tiny_shakespeare,
    local_files,
    python_sources,
    text_file,
)
from data_prep.documents import Fragment, iter_span
from data_prep.shards import DataError
from data_prep.units import plan_units

STAND_IN = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


def documents_of(source: Source) -> tuple[str, ...]:
    items = [item for unit in plan_units(source) for span in unit for item in iter_span(source.files[span.file], span, "text")]
    documents, pieces = [], []
    for item in items:
        assert isinstance(item, Fragment)
        pieces.append(item.text)
        if item.ends:
            documents.append("".join(pieces))
            pieces.clear()
    assert not pieces
    return tuple(documents)


@pytest.fixture
def stand_in(monkeypatch):
    """Let a short text pass for Tiny Shakespeare, so that the order of places can be tested without it."""
    monkeypatch.setattr(corpus_module, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(STAND_IN.encode()).hexdigest())


class Web:
    """A web that answers with bytes or fails, and remembers what it was asked."""

    def __init__(self, answer: bytes | io.BytesIO | Exception):
        self.answer, self.asked = answer, []

    def urlopen(self, url, timeout):
        self.asked.append((url, timeout))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if isinstance(self.answer, io.BytesIO) else io.BytesIO(self.answer)


@pytest.fixture
def web(monkeypatch):
    monkeypatch.delenv(CORPORA_VARIABLE, raising=False)
    web = Web(urllib.error.URLError("no network in tests"))
    monkeypatch.setattr(urllib.request, "urlopen", web.urlopen)
    return web


def corpora_with(directory: Path, text: str) -> Path:
    (directory / "tinyshakespeare").mkdir(parents=True)
    (directory / "tinyshakespeare" / "input.txt").write_text(text)
    return directory


def test_input_comes_first(tmp_path, web, stand_in):
    (tmp_path / "mine.txt").write_text(STAND_IN)
    source = find_tiny_shakespeare(tmp_path, tmp_path / "mine.txt", corpora_with(tmp_path, "not it"))
    assert documents_of(source) == (STAND_IN,)
    assert (source.record.kind, source.record.is_fallback) == ("tiny-shakespeare", False)
    assert web.asked == []


def test_corpora_directory_comes_before_the_environment_and_the_web(tmp_path, web, stand_in, monkeypatch):
    given = corpora_with(tmp_path / "given", STAND_IN)
    monkeypatch.setenv(CORPORA_VARIABLE, str(corpora_with(tmp_path / "environment", "not it")))
    assert documents_of(find_tiny_shakespeare(tmp_path, corpora=given)) == (STAND_IN,)
    monkeypatch.setenv(CORPORA_VARIABLE, str(given))
    assert documents_of(find_tiny_shakespeare(tmp_path)) == (STAND_IN,)
    assert web.asked == []


def test_download_comes_last_with_a_timeout(tmp_path, web, stand_in):
    web.answer = STAND_IN.encode()
    source = find_tiny_shakespeare(tmp_path / "download", corpora=tmp_path)
    assert documents_of(source) == (STAND_IN,)
    assert Path(source.files[0].path).parent == tmp_path / "download"
    assert web.asked == [(TINY_SHAKESPEARE_URL, 10.0)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError(TINY_SHAKESPEARE_URL, 404, "Not Found", http.client.HTTPMessage(), None), "Not Found"),
        (http.client.IncompleteRead(b""), "IncompleteRead"),
        (b"<html>Please log in</html>", "not Tiny Shakespeare"),
    ],
)
def test_when_all_places_fail_one_line_says_where_it_looked(tmp_path, web, answer, reason):
    web.answer = answer
    with pytest.raises(NoTinyShakespeareError) as caught:
        find_tiny_shakespeare(tmp_path / "download", corpora=tmp_path)
    assert not (tmp_path / "download").exists()
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tmp_path}/tinyshakespeare/input.txt is not there" in message
    assert reason in message
    assert "; give --input FILE" in message


def test_no_more_is_read_from_the_web_than_the_text_is_long(web, tmp_path):
    class Endless(io.BytesIO):
        def read(self, size=-1):
            assert 0 < size <= TINY_SHAKESPEARE_BYTES + 1
            return b"x" * size

    web.answer = Endless()
    with pytest.raises(NoTinyShakespeareError, match="not Tiny Shakespeare"):
        find_tiny_shakespeare(tmp_path)


@pytest.mark.parametrize("place", ["input", "corpora"])
def test_another_text_in_its_place_is_an_error_with_both_hashes(tmp_path, web, place):
    corpora = corpora_with(tmp_path, "To be")
    path = corpora / "tinyshakespeare/input.txt"
    with pytest.raises(DataError) as caught:
        find_tiny_shakespeare(tmp_path, **{place: path if place == "input" else corpora})
    assert not isinstance(caught.value, NoTinyShakespeareError)  # it must not fall through to the fallback
    message = str(caught.value)
    assert message.startswith(f"{path}: sha256={hashlib.sha256(b'To be').hexdigest()}")
    assert TINY_SHAKESPEARE_SHA256 in message
    assert "; for a text of your own use preset text" in message
    assert web.asked == []


def test_the_real_text_is_accepted(corpora, web):
    (text,) = documents_of(find_tiny_shakespeare(corpora, corpora=corpora))
    assert len(text) == TINY_SHAKESPEARE_BYTES
    assert len(set(text)) == 65


def test_python_sources_are_this_pythons_ascii_modules_in_order():
    source = python_sources()
    documents = documents_of(source)
    names = [path.name for path in sorted(Path(os.__file__).parent.glob("*.py")) if path.read_bytes().isascii()]
    assert len(documents) == len(names) > 50
    assert documents[names.index("os.py")] == Path(os.__file__).read_bytes().decode()
    assert all(document.isascii() for document in documents)
    assert source.record.is_fallback
    assert "standard library sources (fallback)" in source.record.label
    assert source == python_sources()


def test_python_sources_hash_sees_names_bytes_and_leaves_out_the_rest(tmp_path):
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "umlaut.py").write_text("ä = 1\n", encoding="utf-8")
    (tmp_path / "package.py").mkdir()
    (tmp_path / "notes.txt").write_text("no")
    source = python_sources(tmp_path)
    assert documents_of(source) == ("a = 1\n", "b = 1\n")
    lines = "".join(f"{hashlib.sha256(f'{name} = 1{chr(10)}'.encode()).hexdigest()}  {name}.py\n" for name in "ab")
    assert source.record.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert python_sources(tmp_path).record.sha256 != source.record.sha256


def test_a_python_without_sources_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"no ASCII \*.py files.*; give --input FILE"):
        python_sources(tmp_path)


def test_text_is_kept_as_it_is_except_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffa\r\nb\0\ufeffc".encode())
    source = text_file(path)
    assert documents_of(source) == ("a\r\nb\0\ufeffc",)
    assert source.record.label == "book.txt"
    assert source.record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("data", [b"", b" \n\t ", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_one_clear_line(tmp_path, data):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{path}: {len(data)} bytes, no text in it; give"):
        text_file(path)


def test_a_path_that_is_no_file_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/absent: no such file; check the path$"):
        text_file(tmp_path / "absent")
    with pytest.raises(DataError, match=f"^{tmp_path}: a directory, not a text file; give one file$"):
        text_file(tmp_path)


# Files of several kinds


def test_kinds_follow_from_names_and_a_folder_is_its_files_in_order(tmp_path):
    names = ["a.jsonl", "b.txt.xz", "c.parquet", "d.jsonl.zst", "e.txt.gz", "f.md"]
    for name in reversed(names):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "picture.png").write_bytes(b"no")
    files = local_files([tmp_path]).files
    assert [Path(file.path).name for file in files] == names
    assert [file.format for file in files] == ["jsonl", "txt", "parquet", "jsonl", "txt", "txt"]
    assert [file.compression for file in files] == ["", "xz", "", "zst", "gz", ""]


@pytest.mark.parametrize("name", ["book.pdf", "book", "book.parquet.gz", "book.zst"])
def test_a_file_of_no_known_kind_is_one_clear_line(tmp_path, name):
    (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=rf"^{tmp_path / name}: not a kind of file that is known here \(.txt, .*; rename"):
        local_files([tmp_path / name])


def test_a_folder_without_text_and_files_without_bytes_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path}: no text in this directory"):
        local_files([tmp_path])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty.txt: 0 bytes, no text in it; give"):
        local_files([tmp_path / "empty.txt"])


def test_the_sources_hash_sees_content_order_and_side_and_no_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("aa")
        (tmp_path / folder / "b.txt").write_text("bb")
    a, b = tmp_path / "one/a.txt", tmp_path / "one/b.txt"
    hashes = [local_files(*given).record.sha256 for given in (([a, b],), ([b, a],), ([a], [b]), ([b], [a]), ([a],))]
    assert len(set(hashes)) == 5
    assert local_files([tmp_path / "two"]).record.sha256 == hashes[0]


def test_a_text_file_that_comes_again_is_left_out(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("same" if name != "b.txt" else "other")
    assert [Path(file.path).name for file in local_files([tmp_path]).files] == ["a.txt", "b.txt"]


def test_known_files_are_hashed_again_only_when_they_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first")
    known = [file._replace(sha256="believed") for file in local_files([path]).files]
    assert local_files([path], known=known).files[0].sha256 == "believed"
    path.write_text("after")  # of equal length
    os.utime(path, ns=(0, known[0].mtime_ns + 1))
    assert local_files([path], known=known).files[0].sha256 == hashlib.sha256(b"after").hexdigest()
