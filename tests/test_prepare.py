"""Preparing a data directory: parity with nanoGPT, reuse, refusal, repair, interruption, and the command line."""

import errno
import hashlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import __main__ as command_line
from data_prep import prepare as prepare_module
from data_prep import shards as shards_module
from data_prep.corpus import CORPORA_VARIABLE
from data_prep.documents import Fragment
from data_prep.mapping import SplitPlan, route
from data_prep.prepare import MIN_SPLIT_TOKENS, prepare, verify
from data_prep.recipe import Recipe
from data_prep.sampler import WindowSampler
from data_prep.shards import DataError, TokenShards, load_manifest
from data_prep.tokenizer import load_tokenizer

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 20

# nanoGPT's data/shakespeare_char/prepare.py: train.bin and val.bin
NANOGPT_SHA256 = {
    "train": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "val": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.fixture
def no_corpora(tmp_path, monkeypatch):
    monkeypatch.setenv(CORPORA_VARIABLE, str(tmp_path))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "york.txt"
    path.write_text(TEXT)
    return path


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def damage_with_equal_size(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


# What is written


def test_shakespeare_is_byte_equal_to_nanogpts(tmp_path, corpora):
    manifest = prepare("shakespeare-char", tmp_path / "data", corpora=corpora).manifest
    for split, tokens in (("train", 1_003_854), ("val", 111_540)):
        assert hashlib.sha256((tmp_path / "data" / split / "00000.bin").read_bytes()).hexdigest() == NANOGPT_SHA256[split]
        assert manifest.splits[split].tokens == manifest.splits[split].text_bytes == tokens
    assert (manifest.vocab_size, manifest.dtype, manifest.max_token_id) == (65, "uint16", 64)
    assert manifest.content_id == "44d613a0e4042f134d88a6c5826e44ac6a16333baa612dc9500eb338bb1210db"
    assert verify(tmp_path / "data") == []


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_text_comes_back_from_the_shards(tmp_path, tokenizer):
    story = "Ein Übermut – naïve 🙂\n" * 30
    (tmp_path / "story.txt").write_text(story, encoding="utf-8")
    manifest = prepare("text", tmp_path / "data", input=tmp_path / "story.txt", tokenizer=tokenizer).manifest
    reader = load_tokenizer(tmp_path / "data/tokenizer")
    parts = {}
    for split in ("train", "val"):
        shards = TokenShards.open(tmp_path / "data", split)
        parts[split] = reader.decode(shards.read(0, shards.n_tokens))
        assert manifest.splits[split].text_bytes == len(parts[split].encode())
    assert parts["train"] + parts["val"] == story
    assert len(parts["train"]) == int(0.9 * len(story))
    assert manifest.tokenizer.id == reader.id
    assert verify(tmp_path / "data") == []


def split_tail(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    plan = SplitPlan("tail", val_fraction, boundary=int(sum(map(len, documents)) * (1 - val_fraction)))
    parts, place = {"train": [], "val": []}, 0
    for document in documents:
        for split, text, ends in route(plan, "", Fragment(document), place):
            assert ends
            parts[split].append(text)
        place += len(document)
    return parts["train"], parts["val"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), max_size=6), st.floats(0.01, 0.99))
def test_tail_split_cuts_once_and_loses_nothing(documents, val_fraction):
    train, val = split_tail(documents, val_fraction)
    assert "".join(train) + "".join(val) == "".join(documents)
    assert sum(map(len, train)) == int(sum(map(len, documents)) * (1 - val_fraction))
    assert len(train) + len(val) - len(documents) in (0, 1)  # at most one document is in both


def test_the_tail_is_nanogpts_for_every_length():
    assert all(len("".join(split_tail(["x" * n], 0.1)[0])) == int(n * 0.9) for n in range(1, 3000))


def test_blank_documents_are_counted_and_left_out(tmp_path, monkeypatch):
    for name, body in (("a", "a = 1\n" * 50), ("b", ""), ("c", "\n \n"), ("d", "d = 1\n" * 50)):
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv(CORPORA_VARIABLE, str(tmp_path))
    manifest = prepare("demo", tmp_path / "data").manifest
    assert (manifest.counters["documents_in"], manifest.counters["documents_blank"]) == (4, 2)
    assert [manifest.splits[split].documents for split in ("train", "val")] == [2, 1]


@pytest.mark.parametrize(("body", "fraction"), [("ab", 0.5), ("abcdefghij", 0.1), ("abcdefghij", 0.95)])
def test_a_split_too_short_to_predict_anything_is_refused(tmp_path, body, fraction):
    (tmp_path / "short.txt").write_text(body)
    with pytest.raises(DataError, match=r"short.txt: val_fraction=.*, leaves [01] tokens for (train|val); use"):
        prepare("text", tmp_path / "data", input=tmp_path / "short.txt", val_fraction=fraction)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    assert MIN_SPLIT_TOKENS == 2


def test_shakespeare_by_gpt2s_encoding_is_byte_equal_to_nanogpts(tmp_path, corpora):
    manifest = prepare("shakespeare-gpt2", tmp_path / "data", corpora=corpora).manifest
    expected = {
        "train": (301_966, "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"),
        "val": (36_059, "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"),
    }
    for split, (tokens, sha256) in expected.items():
        assert manifest.splits[split].tokens == tokens
        assert hashlib.sha256((tmp_path / "data" / split / "00000.bin").read_bytes()).hexdigest() == sha256
    assert manifest.tokenizer.eot is None
    assert verify(tmp_path / "data") == []


def test_gigatoken_gives_the_same_directory_and_is_recorded(tmp_path, corpora):
    texts = corpora / "gutenberg_tiny"
    choices = {"input": texts / "train.jsonl", "val": [texts / "val.jsonl"], "workers": 1}
    exact = prepare("files", tmp_path / "exact", **choices).manifest
    fast = prepare("files", tmp_path / "fast", backend="gigatoken", **choices).manifest
    assert fast.content_id == exact.content_id
    assert (exact.splits["train"].tokens, exact.splits["val"].tokens) == (282_449, 26_648)
    assert (fast.tokenizer.library or "").startswith("gigatoken ")
    assert (exact.tokenizer.library or "").startswith("tiktoken ")


def test_an_encoder_that_differs_from_tiktoken_is_found(tmp_path, text, monkeypatch):
    from data_prep.bpe import BytePairTokenizer

    real = BytePairTokenizer.encode
    monkeypatch.setattr(BytePairTokenizer, "encode", lambda self, text: real(self, text)[self.backend == "gigatoken" :])
    with pytest.raises(DataError, match=r"backend=gigatoken, its ids differ from tiktoken's; use --backend tiktoken"):
        prepare("text", tmp_path / "data", input=text, tokenizer="gpt2", backend="gigatoken")


# The recipe and the identities


def test_content_id_depends_on_the_text_only(tmp_path, text):
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere/other-name.txt"
    other.write_text(TEXT)
    one = prepare("text", tmp_path / "one", input=text).manifest
    two = prepare("text", tmp_path / "deep/er/two", input=other).manifest
    assert (one.content_id, one.recipe_id) == (two.content_id, two.recipe_id)
    byte = prepare("text", tmp_path / "byte", input=text, tokenizer="byte").manifest
    fifth = prepare("text", tmp_path / "fifth", input=text, val_fraction=0.2).manifest
    assert len({manifest.content_id for manifest in (one, byte, fifth)}) == 3
    assert len({manifest.recipe_id for manifest in (one, byte, fifth)}) == 3


def test_recipe_id_is_pinned():
    """A key that a later version adds must be None by default, or every directory would be refused."""
    canonical = b'{"max_shard_tokens":100000000,"source_sha256":"s","split":"tail","tokenizer":"char","val_fraction":0.1}'
    assert Recipe("s").id == hashlib.sha256(canonical).hexdigest()


# Doing it again


def test_a_complete_directory_of_the_same_recipe_is_reused(tmp_path, text):
    first = prepare("text", tmp_path / "data", input=text)
    before = tree(tmp_path / "data")
    again = prepare("text", tmp_path / "data", input=text, tokenizer="char", val_fraction=0.1)
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert tree(tmp_path / "data") == before


def test_shakespeare_that_is_there_needs_no_text(tmp_path, corpora, monkeypatch):
    prepare("shakespeare-char", tmp_path / "data", corpora=corpora)
    monkeypatch.setenv(CORPORA_VARIABLE, str(tmp_path))
    for preset in ("shakespeare-char", "demo"):
        assert prepare(preset, tmp_path / "data").reused


def test_another_recipe_is_refused_and_nothing_changes(tmp_path, text):
    prepare("text", tmp_path / "data", input=text)
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer=char instead of byte, val_fraction=0.1 instead of 0.2.*; choose"):
        prepare("text", tmp_path / "data", input=text, tokenizer="byte", val_fraction=0.2)
    for preset in ("demo", "shakespeare-char"):
        with pytest.raises(DataError, match=r"holds york.txt by another recipe \(source_sha256=.* instead of 86c4e6aa"):
            prepare(preset, tmp_path / "data")
    text.write_text(TEXT + "!")
    with pytest.raises(DataError, match=r"source_sha256="):
        prepare("text", tmp_path / "data", input=text)
    text.write_text(TEXT)
    assert tree(tmp_path) == before


def test_a_directory_of_somebody_elses_files_is_refused(tmp_path, text):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"home: not empty and no data directory .*; choose another --dir"):
        prepare("text", tmp_path / "home", input=text)
    with pytest.raises(DataError, match=r"thesis.tex: not empty and no data directory"):
        prepare("text", tmp_path / "home/thesis.tex", input=text)
    assert tree(tmp_path / "home") == {"thesis.tex": b"years of work"}


def test_an_empty_directory_and_a_link_to_one_are_filled(tmp_path, text):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not prepare("text", tmp_path / "link", input=text).reused
    assert verify(tmp_path / "real") == []
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["train/00000.bin", "val/00000.idx", "tokenizer/spec.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3])])
def test_a_missing_or_truncated_file_is_written_again(tmp_path, text, name, damage):
    prepare("text", tmp_path / "data", input=text)
    (tmp_path / "data/NOTES").write_text("mine")
    before = tree(tmp_path / "data")
    damage(tmp_path / "data" / name)
    again = prepare("text", tmp_path / "data", input=text)
    assert not again.reused
    assert name in again.notes[0]
    assert again.notes[0].endswith("; written again")
    after = tree(tmp_path / "data")
    assert {file for file in before if after[file] != before[file]} <= {"manifest.json"}
    assert after.keys() == before.keys()


def test_damaged_data_without_its_text_is_one_clear_line(tmp_path, corpora, monkeypatch):
    prepare("demo", tmp_path / "data", corpora=corpora)
    monkeypatch.setenv(CORPORA_VARIABLE, str(tmp_path))
    (tmp_path / "data/val/00000.bin").unlink()
    with pytest.raises(DataError, match=r"val/00000.bin: manifest says .* cannot be written again, since Tiny Shakesp"):
        prepare("demo", tmp_path / "data")


# Bad text


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = [b'{"text": "line %d of good text"}' % number for number in range(30)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "broken', r"lines.jsonl:31: not JSON \(.*; mend the line; or pass --on-bad skip"),
        (b'{"body": "x"}', r"lines.jsonl:31: text_key=text, no such column \(there: body\); give --text-key"),
        (b'{"text": "caf\xe9"}', r"lines.jsonl:31: byte 13 of the line is 0xe9, not UTF-8; mend the line; or pass"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [None, 200])
def test_a_bad_line_stops_or_is_skipped_and_counted(tmp_path, line, message, unit_bytes):
    path = write_lines(tmp_path / "lines.jsonl", [*GOOD, line])
    choices = {"input": path, "tokenizer": "byte", "val_fraction": 0.3, "unit_bytes": unit_bytes, "workers": 1}
    with pytest.raises(DataError, match=message) as caught:
        prepare("files", tmp_path / "data", **choices)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"lines.jsonl: documents_bad=1 of 31, more than max_bad_fraction=0.001, such as .*:31"):
        prepare("files", tmp_path / "data", on_bad="skip", **choices)
    manifest = prepare("files", tmp_path / "data", on_bad="skip", max_bad_fraction=0.1, **choices).manifest
    assert (manifest.counters["documents_in"], manifest.counters["documents_bad"]) == (31, 1)
    alone = prepare("files", tmp_path / "alone", **choices | {"input": write_lines(tmp_path / "good.jsonl", GOOD)}).manifest
    assert manifest.content_id == alone.content_id, "what is good is all there"


@pytest.mark.parametrize("data", [b"caf\xe9 au lait", "hi".encode("utf-16")])
def test_a_text_that_is_not_utf8_stops_or_is_skipped(tmp_path, data):
    (tmp_path / "a.txt").write_text("some good words\n")
    (tmp_path / "b.txt").write_bytes(data)
    (tmp_path / "c.txt").write_text("some more words\n")
    with pytest.raises(DataError, match=r"b.txt: byte [03] is 0x(e9|ff), not UTF-8; convert it first"):
        prepare("files", tmp_path / "data", input=tmp_path, tokenizer="byte", split="tail")
    assert not list(tmp_path.glob(".data*"))
    choices = {"input": tmp_path, "tokenizer": "byte", "split": "tail", "val_fraction": 0.3}
    manifest = prepare("files", tmp_path / "data", on_bad="skip", max_bad_fraction=0.5, **choices).manifest
    assert (manifest.counters["documents_bad"], sum(split.tokens for split in manifest.splits.values())) == (1, 32)


def test_blank_nul_bom_and_surrogates(tmp_path):
    """Whitespace is left out, NUL stays, a mark at the start of a file goes, a lone surrogate becomes U+FFFD."""
    lines = [b'{"text": ""}', b'{"text": " \\n\\t"}', b'{"text": "nul \\u0000."}', b'{"text": "lone \\ud800."}', b"", b"  "]
    path = write_lines(tmp_path / "lines.jsonl", [b"\xef\xbb\xbf" + GOOD[0], *lines, *GOOD[1:]])
    for tokenizer in ("char", "byte", "gpt2"):
        made = prepare("files", tmp_path / tokenizer, input=path, tokenizer=tokenizer, split="tail", val_fraction=0.1)
        counters = made.manifest.counters
        assert (counters["documents_in"], counters["documents_blank"], counters["documents_repaired"]) == (34, 2, 1)
        shards = TokenShards.open(tmp_path / tokenizer, "train")
        text = load_tokenizer(tmp_path / tokenizer / "tokenizer").decode(shards.read(0, shards.n_tokens))
        assert text.replace("<|endoftext|>", "").startswith("line 0 of good textnul \0.lone \ufffd.line 1 of")


def test_an_end_of_text_in_a_text_is_text(tmp_path):
    texts = [b'{"text": "a <|endoftext|> b %d"}' % number for number in range(30)]
    path = write_lines(tmp_path / "lines.jsonl", texts)
    manifest = prepare("files", tmp_path / "data", input=path, val_fraction=0.3).manifest
    for split in ("train", "val"):
        shards = TokenShards.open(tmp_path / "data", split)
        n_ends = int((shards.read(0, shards.n_tokens) == manifest.tokenizer.eot).sum())
        assert n_ends == manifest.splits[split].documents > 0


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_a_megabyte_of_one_character_and_a_document_longer_than_a_shard(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 1_000_000)
    (tmp_path / "b.txt").write_text("some words to end with\n" * 50_000)
    choices = {"tokenizer": tokenizer, "split": "tail", "val_fraction": 0.1, "max_shard_tokens": 50_000}
    manifest = prepare("files", tmp_path / "data", input=tmp_path, **choices).manifest
    assert len(manifest.splits["train"].shards) > 3
    assert verify(tmp_path / "data") == []
    reader = load_tokenizer(tmp_path / "data/tokenizer")
    shards = TokenShards.open(tmp_path / "data", "train")
    assert reader.decode(shards.read(0, shards.n_tokens)).startswith("a" * 1_000_000)


def test_a_character_outside_the_alphabet_cannot_be_by_itself(tmp_path, text):
    """The alphabet is the whole text's; another text with a prepared alphabet is refused by the tokenizer."""
    prepare("text", tmp_path / "data", input=text)
    with pytest.raises(
        DataError, match=r"char tokenizer: text holds .*'€' \(U\+20AC\), not among its 26 characters; prepare with"
    ):
        load_tokenizer(tmp_path / "data/tokenizer").encode("5 €")


@pytest.mark.slow
def test_a_document_of_100_mb_is_read_in_pieces_and_fits_into_memory(tmp_path):
    with (tmp_path / "long.txt").open("w") as file:
        for number in range(1_500_000):
            file.write(f"line number {number} of a very long document, which has no end in sight\n")
    script = (
        "import sys\nfrom pathlib import Path\nfrom data_prep.prepare import prepare, verify\n"
        "made = prepare('text', Path(sys.argv[2]), input=Path(sys.argv[1]), tokenizer='gpt2', workers=1)\n"
        "assert verify(Path(sys.argv[2])) == []\n"
        # not getrusage: a child's ru_maxrss begins at what its parent, here pytest with all it has loaded, held when it forked
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "print(made.manifest.splits['train'].documents, int(peak) // 1024)"
    )
    assert (tmp_path / "long.txt").stat().st_size > 100_000_000
    command = [sys.executable, "-c", script, tmp_path / "long.txt", tmp_path / "data"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    documents, peak_mib = map(int, done.stdout.split())
    assert documents == 1
    assert peak_mib < 250


# Going on after an interruption


def interrupted(data_dir: Path, path: Path, monkeypatch, **choices) -> None:
    """Prepare up to some committed units."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "pack", full)
        with pytest.raises(OSError, match="No space left"):
            prepare("files", data_dir, input=path, tokenizer="byte", val_fraction=0.3, unit_bytes=200, workers=1, **choices)
    assert list((data_dir.parent / f".{data_dir.name}.work/parts").glob("*.json"))


def test_another_recipe_than_the_interrupted_one_shows_the_differing_keys(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "lines.jsonl", GOOD)
    interrupted(tmp_path / "data", path, monkeypatch)
    match = (
        r".data.work: holds an interrupted preparation by another recipe \(tokenizer=byte instead of char, val_fraction=0.3 inst"
    )
    with pytest.raises(DataError, match=match):
        prepare("files", tmp_path / "data", input=path, tokenizer="char", val_fraction=0.4)
    made = prepare("files", tmp_path / "data", input=path, tokenizer="byte", val_fraction=0.3, unit_bytes=200)
    assert verify(made.data_dir) == []
    assert not list(tmp_path.glob(".data*"))


@pytest.mark.parametrize("change", ["content", "more"])
def test_a_text_that_changed_since_the_interruption_is_refused(tmp_path, monkeypatch, change):
    path = write_lines(tmp_path / "lines.jsonl", GOOD)
    interrupted(tmp_path / "data", path, monkeypatch)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"good", b"evil") if change == "content" else data + GOOD[0] + b"\n")
    with pytest.raises(DataError, match=r"by another recipe \(source_sha256=.* instead of .*; run it with the same text"):
        prepare("files", tmp_path / "data", input=path, tokenizer="byte", val_fraction=0.3)
    path.write_bytes(data)
    assert not prepare("files", tmp_path / "data", input=path, tokenizer="byte", val_fraction=0.3).reused


def test_a_text_that_was_only_touched_or_moved_is_gone_on_with(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "lines.jsonl", GOOD)
    interrupted(tmp_path / "data", path, monkeypatch)
    moved = path.rename(tmp_path / "moved.jsonl")
    os.utime(moved, ns=(0, 0))
    assert not prepare("files", tmp_path / "data", input=moved, tokenizer="byte", val_fraction=0.3).reused


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, which only root can make."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_keeps_what_was_done_and_can_be_gone_on_from(run, tmp_path, small_disk, workers):
    lines = [b'{"text": "number %d %s"}' % (number, b"x" * 200) for number in range(3000)]
    path = write_lines(tmp_path / "lines.jsonl", lines)
    choices = {"input": path, "tokenizer": "byte", "val_fraction": 0.3, "unit_bytes": 30_000}
    with pytest.raises(OSError, match="No space left on device"):
        prepare("files", small_disk / "data", workers=workers, **choices)
    code, _, err = run(
        "prepare", "files", "--dir", small_disk / "data", "--input", path, "--tokenizer", "byte", "--val-fraction", 0.3
    )
    assert code == 1
    assert "No space left on device; free some space and run it again" in err
    assert err.count("\n") == 1
    assert not (small_disk / "data").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    n_kept = len(list((small_disk / ".data.work/parts").glob("*.json")))
    assert n_kept > 0
    prepare("files", small_disk / "data", workers=workers, **choices)
    assert verify(small_disk / "data") == []


def test_a_mount_point_is_refused_before_the_work(text, small_disk):
    with pytest.raises(DataError, match=r"disk: a mount point, which cannot be put in place by a rename; choose a --dir inside"):
        prepare("text", small_disk, input=text)


def test_an_output_that_cannot_be_written_is_one_line(run, tmp_path, text, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, err = run("prepare", "text", "--dir", small_disk / "data", "--input", text)
    assert code == 2
    assert "Read-only file system; check the path and its permissions" in err
    assert err.count("\n") == 1


# Verifying


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00000.idx", "val/00000.bin"])
def test_verify_names_a_file_changed_at_equal_size(tmp_path, text, name):
    prepare("text", tmp_path / "data", input=text)
    damage_with_equal_size(tmp_path / "data" / name)
    assert any(f"{name}: manifest says sha256=" in fault for fault in verify(tmp_path / "data"))
    assert all(name in fault for fault in verify(tmp_path / "data"))


def test_verify_names_another_tokenizer(tmp_path, text):
    prepare("text", tmp_path / "data", input=text)
    (tmp_path / "data/tokenizer/spec.json").write_text('{"kind": "byte"}')
    (fault,) = verify(tmp_path / "data")
    assert "tokenizer: not the tokenizer of the manifest" in fault


# The demo


def test_demo_falls_back_to_pythons_own_sources_and_says_so(tmp_path, no_corpora):
    first = prepare("demo", tmp_path / "data")
    manifest = first.manifest
    assert manifest.source.is_fallback
    assert manifest.source.label in first.notes[0]
    assert "no network in tests" in first.notes[0]
    assert "\n" not in first.notes[0]
    assert (manifest.tokenizer.kind, manifest.vocab_size) == ("byte", 256)
    assert manifest.max_token_id < 128
    assert manifest.splits["train"].documents > 50
    assert verify(tmp_path / "data") == []


def test_demo_keeps_the_fallback_that_is_there_and_says_so(tmp_path, no_corpora):
    first = prepare("demo", tmp_path / "data")
    again = prepare("demo", tmp_path / "data")
    assert again.reused
    assert again.manifest == first.manifest
    assert "holds the fallback text; remove the directory" in again.notes[0]
    with pytest.raises(DataError, match=r"by another recipe .*tokenizer=byte instead of char"):
        prepare("shakespeare-char", tmp_path / "data")


def test_demo_prefers_shakespeare(tmp_path, corpora):
    prepared = prepare("demo", tmp_path / "data", corpora=corpora)
    assert prepared.manifest.source.kind == "tiny-shakespeare"
    assert not prepared.manifest.source.is_fallback
    assert prepared.notes == ()


def test_demo_given_a_wrong_input_does_not_fall_back(tmp_path, text):
    with pytest.raises(DataError, match=r"not Tiny Shakespeare .*use preset text"):
        prepare("demo", tmp_path / "data", input=text)
    assert not (tmp_path / "data").exists()


# The command line


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `python -m data_prep ...` in this process: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def test_prepare_inspect_verify_show(run, tmp_path, text):
    code, out, _ = run("prepare", "text", "--dir", tmp_path / "data", "--input", text)
    assert code == 0
    assert "york.txt, 1,404 train + 156 val tokens, char tokenizer with 26 ids, content id " in out
    code, out, _ = run("prepare", "text", "--dir", tmp_path / "data", "--input", text)
    assert code == 0
    assert "there already: york.txt" in out
    code, out, _ = run("inspect", tmp_path / "data")
    assert code == 0
    for fact in ("york.txt", "1,404", "156", "uint16", "Now is the winter", load_manifest(tmp_path / "data").recipe_id):
        assert fact in out
    code, out, _ = run("verify", "--deep", tmp_path / "data")
    assert code == 0
    assert "sound, 2 shards, every hash and id is right" in out


def test_show_prints_exactly_what_a_sample_holds(run, tmp_path, text):
    prepare("text", tmp_path / "data", input=text)
    sampler = WindowSampler(1404, 32, 5)
    for sample in (0, 3, sampler.n_windows + 2):
        start = int(sampler.starts(np.array([sample]))[0])
        code, out, err = run("show", tmp_path / "data", "--sample", sample, "--seq-len", 32, "--seed", 5)
        assert code == 0
        assert out == TEXT[start : start + 33] + "\n"
        assert f"ids {start:,}..{start + 32:,}" in err


def test_verify_lists_the_damage_and_fails(run, tmp_path, text):
    prepare("text", tmp_path / "data", input=text)
    for name in ("train/00000.bin", "val/00000.bin"):
        damage_with_equal_size(tmp_path / "data" / name)
    code, out, _ = run("verify", tmp_path / "data")
    assert (code, "sizes are right; --deep checks" in out) == (0, True)
    code, _, err = run("verify", "--deep", tmp_path / "data")
    assert code == 1
    assert "train/00000.bin" in err
    assert "val/00000.bin" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "text"], "error: prepare: preset=text, no text given; add --input FILE"),
        (["prepare", "text", "--input", "absent.txt"], "error: absent.txt: no such file; check the path"),
        (["prepare", "text", "--input", "."], "error: .: a directory, not a text file; give one file"),
        (["prepare", "files", "--input", __file__], "not a kind of file that is known here"),
        (["prepare", "files", "--input", "a.txt", "--tokenizer", "bpe"], "tokenizer=bpe, vocab_size=None; a bpe to be trained"),
        (["prepare", "files", "--input", "a.txt", "--tokenizer", "bpe", "--vocab-size", "99"], "vocab_size=99, fewer than the"),
        (
            ["prepare", "files", "--input", "a.txt", "--tokenizer", "word"],
            "tokenizer='word', not known; use char, byte, gpt2, bpe",
        ),
        (["prepare", "files", "--input", "a.txt", "--num-nodes", "2"], "num_nodes=2, but which one is this; add --node-index"),
        (
            ["prepare", "files", "--input", "a.txt", "--num-nodes", "2", "--node-index", "2"],
            "node_index=2 of num_nodes=2, not one",
        ),
        (["prepare", "files", "--input", "a.txt", "--split", "files"], "split=files goes with --val FILE of preset files"),
        (["prepare", "text", "--input", __file__, "--backend", "gigatoken"], "backend=gigatoken, encodes gpt2 and bpe only"),
        (["plan", "files", "--input", "absent.txt"], "error: absent.txt: no such file; check the path"),
        (["export", "--out", "x"], "no manifest.json, so this is not a complete data directory; run python -m data_prep prepare"),
        (["prepare", "demo", "--tokenizer", "byte"], "error: prepare: preset=demo, fixes tokenizer and split; leave"),
        (["prepare", "text", "--input", __file__, "--val-fraction", "1.5"], "val_fraction=1.5, not between 0 and 1; "),
        (["inspect"], "no manifest.json, so this is not a complete data directory; run python -m data_prep prepare"),
        (["verify"], "no manifest.json, so this is not a complete data directory; run python -m data_prep prepare"),
        (["show", "--sample", "0"], "no manifest.json, so this is not a complete data directory; run python -m"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, arguments, message):
    where = ["--dir", tmp_path / "data"] if arguments[0] in ("prepare", "plan") else [tmp_path / "data"]
    code, out, err = run(*arguments, *where)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_window_longer_than_the_split_is_one_line_and_status_2(run, tmp_path, text):
    prepare("text", tmp_path / "data", input=text)
    code, _, err = run("show", tmp_path / "data", "--split", "val", "--sample", 0, "--seq-len", 100)
    assert code == 2
    assert err.startswith("error: window sampler: n_tokens=156, a split shorter than 2 x seq_len = 200")


@pytest.mark.parametrize(
    ("number", "status", "advice"),
    [(errno.ENOSPC, 1, "free some space"), (errno.EDQUOT, 1, "free some space"), (errno.EROFS, 2, "check the path")],
)
def test_a_disk_that_cannot_be_written_is_one_line_and_leaves_nothing(run, tmp_path, text, monkeypatch, number, status, advice):
    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards_module.os, "fsync", failing)
    code, out, err = run("prepare", "text", "--dir", tmp_path / "data", "--input", text)
    assert (code, out) == (status, "")
    assert err.startswith(f"error: {tmp_path / 'data'}: {os.strerror(number)}; {advice}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["york.txt"]


def test_help_loads_nothing_heavy():
    """It answers at once because numpy is imported inside the commands."""
    script = (
        "import sys, runpy\n"
        "sys.argv = ['data_prep', 'prepare', '--help']\n"
        "try:\n    runpy.run_module('data_prep', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "sys.exit(', '.join({'numpy', 'torch'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "shakespeare-char" in ended.stdout
