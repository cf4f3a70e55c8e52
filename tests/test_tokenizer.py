"""Tokenizers: text to ids and back, and to JSON and back."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import tokenizer as tokenizer_module
from data_prep.shards import DataError
from data_prep.tokenizer import ByteTokenizer, CharTokenizer, dtype_for, load_tokenizer, write_tokenizer

ODD_TEXTS = ["", "\0", "a\0b", "\ufeffx", "\r\n\n\r", "naïve 🙂 \U0010ffff", "x" * 1000, "<|endoftext|>"]


def video_encode(text: str, alphabet_of: str) -> list[int]:
    """The video's code: stoi over sorted(list(set(text)))."""
    stoi = {char: i for i, char in enumerate(sorted(set(alphabet_of)))}
    return [stoi[char] for char in text]


@settings(deadline=None)
@given(st.text(), st.text())
def test_char_tokenizer_equals_the_videos(text, rest):
    tokenizer = CharTokenizer.from_texts([text, rest])
    assert tokenizer.encode(text).tolist() == video_encode(text, text + rest)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text + rest))


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_odd_texts_come_back(text, kind):
    tokenizer = CharTokenizer.from_texts([text]) if kind == "char" else ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.text())
def test_byte_tokenizer_is_utf8(text):
    assert ByteTokenizer().encode(text).tolist() == list(text.encode())


def test_encoding_in_blocks_changes_nothing(monkeypatch):
    text = "".join(ODD_TEXTS) * 3
    tokenizer = CharTokenizer.from_texts([text])
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "BLOCK_CHARACTERS", 7)
    assert np.array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("abé", r"'é' \(U\+00E9\), not among its 3"),
        ("B", r"'B' \(U\+0042\)"),
        ("a\0", r"'\\x00' \(U\+0000\)"),
        ("\U0010ffffa", r"U\+10FFFF"),
        ("\ud800", r"U\+D800"),
        ("0123456789xyz", r"and 3 more"),
    ],
)
def test_an_unseen_character_is_listed(text, named):
    with pytest.raises(DataError, match=rf"char tokenizer: text holds .*{named}.*; prepare with"):
        CharTokenizer.from_texts(["cab"]).encode(text)


@pytest.mark.parametrize("tokenizer", [CharTokenizer(("a", "b")), ByteTokenizer()])
@pytest.mark.parametrize("wrong", [-1, 256, 70_000])
def test_an_id_of_another_tokenizer_is_an_error(tokenizer, wrong):
    with pytest.raises(DataError, match=f"token id {wrong:,}, not in 0.."):
        tokenizer.decode(np.array([0, wrong]))


def test_byte_tokenizer_shows_a_cut_character_as_replaced():
    ids = ByteTokenizer().encode("é")
    assert ByteTokenizer().decode(ids[:1]) == "\ufffd"


def test_byte_tokenizer_takes_a_lone_surrogate():
    assert ByteTokenizer().encode("a\ud800").tolist() == [97, 63]


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_texts(ODD_TEXTS), ByteTokenizer()])
def test_written_tokenizers_come_back_equal(tmp_path, tokenizer):
    write_tokenizer(tmp_path / "tokenizer", tokenizer)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded == tokenizer
    assert loaded.id == tokenizer.id


def test_ids_follow_the_published_rule_and_differ(tmp_path):
    """FORMAT.md: SHA-256 of spec.json as canonical JSON; these hashes are in every content id."""
    tokenizer = CharTokenizer.from_texts(["bä"])
    assert tokenizer.id == hashlib.sha256(b'{"chars":["b","\\u00e4"],"kind":"char"}').hexdigest()
    assert ByteTokenizer().id == hashlib.sha256(b'{"kind":"byte"}').hexdigest()
    assert CharTokenizer(("a", "b")).id != CharTokenizer(("a", "c")).id
    assert (tokenizer.kind, tokenizer.name, tokenizer.vocab_size) == ("char", "char", 2)
    assert (ByteTokenizer().kind, ByteTokenizer().name, ByteTokenizer().vocab_size) == ("byte", "byte", 256)


def test_dtype_holds_the_largest_id():
    assert [dtype_for(n) for n in (1, 65_535, 65_536, 65_537)] == ["uint16", "uint16", "uint16", "uint32"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "wordpiece"}, "kind='wordpiece', not known here; use the version that wrote it"),
        ({"kind": "char"}, "not a tokenizer .*chars"),
        ({"kind": "char", "chars": ["b", "a"]}, "not a tokenizer .*sorted"),
        ({"kind": "char", "chars": ["a", "a"]}, "not a tokenizer .*different"),
        ({"kind": "char", "chars": ["ab"]}, "not a tokenizer"),
        ({"kind": "char", "chars": [1]}, "not a tokenizer"),
        ([], "not a tokenizer"),
    ],
)
def test_a_damaged_spec_is_one_clear_line(tmp_path, spec, message):
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=f"^{tmp_path / 'spec.json'}: {message}"):
        load_tokenizer(tmp_path)


def test_a_missing_spec_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"spec.json: missing; run python -m data_prep prepare again"):
        load_tokenizer(tmp_path)
