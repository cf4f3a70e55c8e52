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
    find_tiny_shakespeare,
    iter_documents,
    python_sources,
    text_file,
)
from data_prep.shards import DataError

STAND_IN = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


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
    corpus = find_tiny_shakespeare(tmp_path / "mine.txt", corpora_with(tmp_path, "not it"))
    assert corpus.documents == (STAND_IN,)
    assert (corpus.source.kind, corpus.source.is_fallback) == ("tiny-shakespeare", False)
    assert web.asked == []


def test_corpora_directory_comes_before_the_environment_and_the_web(tmp_path, web, stand_in, monkeypatch):
    given = corpora_with(tmp_path / "given", STAND_IN)
    monkeypatch.setenv(CORPORA_VARIABLE, str(corpora_with(tmp_path / "environment", "not it")))
    assert find_tiny_shakespeare(corpora=given).documents == (STAND_IN,)
    monkeypatch.setenv(CORPORA_VARIABLE, str(given))
    assert find_tiny_shakespeare().documents == (STAND_IN,)
    assert web.asked == []


def test_download_comes_last_with_a_timeout(tmp_path, web, stand_in):
    web.answer = STAND_IN.encode()
    assert find_tiny_shakespeare(corpora=tmp_path).documents == (STAND_IN,)
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
        find_tiny_shakespeare(corpora=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tmp_path}/tinyshakespeare/input.txt is not there" in message
    assert reason in message
    assert "; give --input FILE" in message


def test_no_more_is_read_from_the_web_than_the_text_is_long(web):
    class Endless(io.BytesIO):
        def read(self, size=-1):
            assert 0 < size <= TINY_SHAKESPEARE_BYTES + 1
            return b"x" * size

    web.answer = Endless()
    with pytest.raises(NoTinyShakespeareError, match="not Tiny Shakespeare"):
        find_tiny_shakespeare()


@pytest.mark.parametrize("place", ["input", "corpora"])
def test_another_text_in_its_place_is_an_error_with_both_hashes(tmp_path, web, place):
    corpora = corpora_with(tmp_path, "To be")
    path = corpora / "tinyshakespeare/input.txt"
    with pytest.raises(DataError) as caught:
        find_tiny_shakespeare(**{place: path if place == "input" else corpora})
    assert not isinstance(caught.value, NoTinyShakespeareError)  # it must not fall through to the fallback
    message = str(caught.value)
    assert message.startswith(f"{path}: sha256={hashlib.sha256(b'To be').hexdigest()}")
    assert TINY_SHAKESPEARE_SHA256 in message
    assert "; for a text of your own use preset text" in message
    assert web.asked == []


def test_the_real_text_is_accepted(corpora, web):
    (text,) = find_tiny_shakespeare(corpora=corpora).documents
    assert len(text) == TINY_SHAKESPEARE_BYTES
    assert len(set(text)) == 65


def test_python_sources_are_this_pythons_ascii_modules_in_order():
    corpus = python_sources()
    names = [path.name for path in sorted(Path(os.__file__).parent.glob("*.py")) if path.read_bytes().isascii()]
    assert len(corpus.documents) == len(names) > 50
    assert corpus.documents[names.index("os.py")] == Path(os.__file__).read_bytes().decode()
    assert all(document.isascii() for document in corpus.documents)
    assert corpus.source.is_fallback
    assert "standard library sources (fallback)" in corpus.source.label
    assert corpus == python_sources()


def test_python_sources_hash_sees_names_bytes_and_leaves_out_the_rest(tmp_path):
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "umlaut.py").write_text("ä = 1\n", encoding="utf-8")
    (tmp_path / "package.py").mkdir()
    (tmp_path / "notes.txt").write_text("no")
    corpus = python_sources(tmp_path)
    assert corpus.documents == ("a = 1\n", "b = 1\n")
    lines = "".join(f"{hashlib.sha256(f'{name} = 1{chr(10)}'.encode()).hexdigest()}  {name}.py\n" for name in "ab")
    assert corpus.source.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert python_sources(tmp_path).source.sha256 != corpus.source.sha256


def test_a_python_without_sources_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"no ASCII \*.py files.*; give --input FILE"):
        python_sources(tmp_path)


def test_text_is_kept_as_it_is_except_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffa\r\nb\0\ufeffc".encode())
    corpus = text_file(path)
    assert corpus.documents == ("a\r\nb\0\ufeffc",)
    assert corpus.source.label == "book.txt"
    assert corpus.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, no text in it; give"),
        (b" \n\t ", "4 bytes, no text in it; give"),
        (b"\xef\xbb\xbf", "3 bytes, no text in it; give"),
        (b"caf\xe9", "byte 3 is 0xe9, not UTF-8; convert it first"),
        (b"ok\xed\xa0\x80", "byte 2 is 0xed, not UTF-8; convert"),
        ("hi".encode("utf-16"), "byte 0 is 0xff, not UTF-8; convert"),
    ],
)
def test_a_file_without_usable_text_is_one_clear_line(tmp_path, data, message):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        text_file(path)


def test_a_path_that_is_no_file_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/absent: no such file; check the path$"):
        text_file(tmp_path / "absent")
    with pytest.raises(DataError, match=f"^{tmp_path}: a directory, not a text file; give one file$"):
        text_file(tmp_path)


def test_iter_documents_names_the_file_at_fault():
    documents = iter_documents([("a.txt", b"fine"), ("b.txt", b"\xff")])
    assert next(documents) == "fine"
    with pytest.raises(DataError, match=r"^b.txt: byte 0"):
        next(documents)
