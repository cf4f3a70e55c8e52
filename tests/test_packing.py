"""Parts to shards: duplicates, long documents, splits; the bytes follow from the documents alone."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import packing as packing_module
from data_prep.documents import digest_of
from data_prep.packing import DamagedPartError
from data_prep.prepare import prepare, verify
from data_prep.shards import DataError, TokenShards, load_manifest, write_split
from data_prep.workplace import work_path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_in(data_dir: Path, split: str) -> list[str]:
    """Read the documents back by the published layout: ids, and where documents end."""
    documents, rest = [], b""
    for path in sorted((data_dir / split).glob("*.bin")):
        ids = np.fromfile(path, "<u2")
        begin = 0
        for end in np.fromfile(path.with_suffix(".idx"), "<u8").astype(int).tolist():
            documents.append((rest + ids[begin:end].astype(np.uint8).tobytes()).decode())
            rest, begin = b"", end
        rest += ids[begin:].astype(np.uint8).tobytes()
    assert not rest
    return documents


def side_of(text: str, fraction: float) -> str:
    """FORMAT.md: the first 8 bytes of the text's SHA-256, as a fraction of 2^64."""
    return "val" if int.from_bytes(digest_of(text.encode())[:8], "big") < int(fraction * 2**64) else "train"


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=40),
    st.integers(20, 400),
    st.integers(5, 40),
)
def test_every_document_once_on_its_side_in_order(tmp_path_factory, texts, unit_bytes, max_shard_tokens):
    folder = tmp_path_factory.mktemp("pack")
    anchors = [next(text for text in map(str, range(10, 99)) if side_of(text, 0.3) == side) for side in ("train", "val")]
    texts = [*anchors, *texts, "a long one " * 9]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    once = list(dict.fromkeys(texts))
    expected = {side: [text for text in once if side_of(text, 0.3) == side] for side in ("train", "val")}
    prepare(
        "files", folder / "data", input=write_jsonl(folder / "a.jsonl", texts), tokenizer="byte", val_fraction=0.3,
        unit_bytes=unit_bytes, max_shard_tokens=max_shard_tokens, workers=1,
    )  # fmt: skip
    assert {side: documents_in(folder / "data", side) for side in expected} == expected
    assert verify(folder / "data") == []
    for side, documents in expected.items():  # cut into shards by the rule that writes any split
        ids = [np.frombuffer(text.encode(), np.uint8) for text in documents]
        record = write_split(folder / "direct", side, ids, text_bytes=0, max_shard_tokens=max_shard_tokens)
        assert record.shards == load_manifest(folder / "data").splits[side].shards


@pytest.mark.parametrize("bucket_rows", [packing_module.BUCKET_ROWS, 7])
def test_copies_are_left_out_across_units_and_counted(tmp_path, monkeypatch, bucket_rows):
    monkeypatch.setattr(packing_module, "BUCKET_ROWS", bucket_rows)
    draw = random.Random(0)
    texts = [f"text {draw.randint(0, 60)}" for _ in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    choices = {"input": path, "tokenizer": "byte", "val_fraction": 0.3, "unit_bytes": 500, "workers": 1}
    manifest = prepare("files", tmp_path / "data", **choices).manifest
    found = [documents_in(tmp_path / "data", side) for side in ("train", "val")]
    assert sorted(found[0] + found[1]) == sorted(set(texts))
    assert found[0] == [text for text in dict.fromkeys(texts) if side_of(text, 0.3) == "train"]
    assert manifest.counters["documents_duplicate"] == 300 - len(set(texts))
    assert manifest.splits["val"].text_bytes == sum(map(len, found[1]))
    whole = prepare("files", tmp_path / "whole", dedup=False, **choices).manifest
    assert whole.splits["train"].documents + whole.splits["val"].documents == 300


def test_files_that_validate_keep_their_documents_out_of_training(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ["a a", "shared", "b b", "a a"])
    val = write_jsonl(tmp_path / "val.jsonl", ["shared", "v v"])
    manifest = prepare("files", tmp_path / "data", input=train, val=[val], tokenizer="byte").manifest
    assert documents_in(tmp_path / "data", "train") == ["a a", "b b"]
    assert documents_in(tmp_path / "data", "val") == ["shared", "v v"]
    assert (manifest.split.mode, manifest.split.val_fraction) == ("files", None)


@pytest.mark.parametrize("unit_bytes", [None, 700])
@pytest.mark.parametrize("split", ["tail", "hash"])
def test_a_long_text_in_many_units_is_one_document(tmp_path, unit_bytes, split):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"{name} has some words to say.\n" * 150)
    (tmp_path / "z.txt").write_text("a has some words to say.\n" * 150)  # a copy
    files = sorted(tmp_path.glob("*.txt"))
    manifest = prepare(
        "files", tmp_path / "data", input=files, tokenizer="byte", split=split, val_fraction=0.3, unit_bytes=unit_bytes,
        workers=1, max_shard_tokens=9000,
    ).manifest  # fmt: skip
    texts = [path.read_text() for path in files[:-1]]
    if split == "hash":
        for side in ("train", "val"):
            assert documents_in(tmp_path / "data", side) == [text for text in texts if side_of(text, 0.3) == side]
    else:
        streams = [TokenShards.open(tmp_path / "data", side) for side in ("train", "val")]
        joined = b"".join(stream.read(0, stream.n_tokens).astype(np.uint8).tobytes() for stream in streams)
        assert joined.decode() == "".join(texts)
        assert streams[0].n_tokens == int(len(joined) * 0.7)
    assert manifest.counters["documents_in"] == 8
    assert verify(tmp_path / "data") == []


def test_an_end_of_text_stands_behind_each_document(tmp_path):
    texts = [f"document number {number}" for number in range(40)]
    manifest = prepare("files", tmp_path / "data", input=write_jsonl(tmp_path / "a.jsonl", texts), val_fraction=0.3).manifest
    assert manifest.tokenizer.eot == 50_256
    for side in ("train", "val"):
        shards = TokenShards.open(tmp_path / "data", side)
        ids = shards.read(0, shards.n_tokens)
        ends = np.fromfile(tmp_path / f"data/{side}/00000.idx", "<u8").astype(int)
        assert np.flatnonzero(ids == 50_256).tolist() == (ends - 1).tolist()
        assert len(ends) == sum(side_of(text, 0.3) == side for text in texts)


@pytest.mark.parametrize("kind", ["train.bin", "documents"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_part_is_never_packed(tmp_path, monkeypatch, kind, damage):
    """It is seen when it is packed, told, and mapped again by the next attempt."""
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {number}" for number in range(200)])
    choices = {"input": path, "tokenizer": "byte", "val_fraction": 0.3, "unit_bytes": 500, "workers": 1}
    expected = prepare("files", tmp_path / "expected", **choices).manifest.content_id

    real = packing_module._record

    def harm(job, number):
        victim = work_path(tmp_path / "data") / f"parts/000003.{kind}"
        if number == 0 and damage == "remove":
            victim.unlink()
        elif number == 0:
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 1
            victim.write_bytes(data if damage == "flip" else data[:-1])
        return real(job, number)

    monkeypatch.setattr(packing_module, "_record", harm)
    with pytest.raises(DamagedPartError, match=r"000003.*run it again to map the unit anew"):
        prepare("files", tmp_path / "data", **choices)
    monkeypatch.setattr(packing_module, "_record", real)
    assert prepare("files", tmp_path / "data", **choices).manifest.content_id == expected


def test_a_split_without_text_is_refused_and_says_what_to_do(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one book", "another book"])
    with pytest.raises(
        DataError, match=r"val_fraction=1e-06, leaves 0 tokens for val; a hash draws whole documents: use --split"
    ):
        prepare("files", tmp_path / "data", input=path, tokenizer="byte", val_fraction=1e-6)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]
