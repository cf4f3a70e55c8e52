"""Shards: what is written is what is read, and nothing damaged is read at all."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards import (
    DataError,
    Manifest,
    SourceRecord,
    SplitRecord,
    SplitRule,
    TokenizerRecord,
    TokenShards,
    canonical_json,
    content_id,
    iter_faults,
    load_manifest,
    write_manifest,
    write_split,
)


def write_data(
    directory: Path, train: list[np.ndarray], val: list[np.ndarray], dtype="uint16", max_shard_tokens=10, vocab_size=100
) -> Manifest:
    splits = {
        split: write_split(directory, split, documents, dtype, text_bytes=1, max_shard_tokens=max_shard_tokens)
        for split, documents in (("train", train), ("val", val))
    }
    manifest = Manifest(
        tool_version=None,
        created_utc="2026-01-01T00:00:00+00:00",
        content_id=content_id(dtype, "t0", splits),
        recipe_id="r0",
        recipe={},
        dtype=dtype,
        vocab_size=vocab_size,
        tokenizer=TokenizerRecord(kind="byte", name="byte", id="t0"),
        source=SourceRecord(kind="text", label="test", sha256="s0"),
        split=SplitRule(mode="tail", val_fraction=0.1),
        splits=splits,
        counters={},
    )
    write_manifest(directory, manifest)
    return manifest


def documents_of(*lengths: int) -> list[np.ndarray]:
    """Documents of consecutive numbers, so that every id says where it belongs."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@pytest.fixture
def data_dir(tmp_path):
    write_data(tmp_path, documents_of(4, 5, 3, 25, 6), documents_of(7))
    return tmp_path


def test_files_are_plain_little_endian_ids_and_document_ends(data_dir):
    """Read back without our reader, as FORMAT.md tells a stranger."""
    shards = sorted((data_dir / "train").glob("*.bin"))
    # Of at most 10: 4 and 5 fit together, 3 begins the next, 25 begins one more and runs on, 6 does not fit behind it.
    assert [path.stat().st_size // 2 for path in shards] == [9, 3, 10, 10, 5, 6]
    assert np.frombuffer(b"".join(path.read_bytes() for path in shards), "<u2").tolist() == list(range(43))
    ends = [np.fromfile(path.with_suffix(".idx"), "<u8").tolist() for path in shards]
    assert ends == [[4, 9], [3], [], [], [5], [6]]


@settings(deadline=None, max_examples=25)  # each shard costs two syncs of the disk
@given(
    lengths=st.lists(st.integers(0, 12), max_size=8),
    max_shard_tokens=st.integers(1, 15),
)
def test_any_documents_survive_any_sharding(tmp_path_factory, lengths, max_shard_tokens):
    directory = tmp_path_factory.mktemp("data")
    record = write_split(directory, "train", documents_of(*lengths), text_bytes=0, max_shard_tokens=max_shard_tokens)
    stream, ends = [], []
    for shard in record.shards:
        ids = np.fromfile(directory / shard.file, "<u2").tolist()
        assert 0 < len(ids) == shard.tokens <= max_shard_tokens
        assert shard.max_token_id == max(ids)
        ends += [len(stream) + int(end) for end in np.fromfile(directory / shard.idx_file, "<u8")]
        stream += ids
    assert stream == list(range(sum(lengths)))
    assert ends == [int(end) for end, length in zip(np.cumsum(lengths), lengths, strict=True) if length]
    assert (record.tokens, record.documents) == (len(stream), len(ends))


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    length=st.integers(1, 20),
    data=st.data(),
)
def test_windows_equal_slices_of_the_concatenated_stream(cuts, length, data):
    """Straddling any number of shards, empty ones among them."""
    stream = np.arange(1000, 1000 + sum(cuts), dtype=np.uint16)
    shards = TokenShards(np.split(stream, np.cumsum(cuts)[:-1]))
    assert shards.n_tokens == len(stream)
    last = len(stream) - length
    starts = data.draw(st.lists(st.integers(0, last), max_size=8)) if last >= 0 else []
    expected = np.array([stream[start : start + length] for start in starts], dtype=np.int64).reshape(-1, length)
    found = shards.gather(np.array(starts, dtype=np.int64), length)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)
    out = np.full((len(starts), length), -1)
    assert shards.gather(np.array(starts, dtype=np.int64), length, out=out) is out
    assert np.array_equal(out, expected)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert np.array_equal(shards.read(start, stop), stream[start:stop])


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("start", [-1, 26, 2**40])
def test_reading_outside_the_split_is_an_error(n_shards, start):
    shards = TokenShards(np.split(np.arange(30, dtype=np.uint16), n_shards))
    with pytest.raises(IndexError, match="30"):
        shards.gather(np.array([3, start]), 5)
    with pytest.raises(IndexError, match="30"):
        shards.read(start, start + 5)


def test_open_reads_both_splits_of_a_directory(data_dir):
    manifest = load_manifest(data_dir)
    train = TokenShards.open(data_dir, "train", manifest)
    assert (train.n_tokens, train.dtype) == (43, np.uint16)
    assert train.gather(np.array([0, 7, 38]), 5).tolist() == [list(range(i, i + 5)) for i in (0, 7, 38)]
    assert TokenShards.open(data_dir, "val").read(0, 7).tolist() == list(range(7))
    with pytest.raises(DataError, match=r"split='test'.*; use train or val"):
        TokenShards.open(data_dir, "test")


def test_mapped_ids_cannot_be_changed(data_dir):
    with pytest.raises(ValueError, match="read-only"):
        TokenShards.open(data_dir, "val").read(0, 3)[0] = 1


def test_largest_uint16_id_is_kept_and_the_next_refused(tmp_path):
    record = write_split(tmp_path, "train", [np.array([0, 65_535])], text_bytes=0)
    assert record.shards[0].max_token_id == 65_535
    assert np.fromfile(tmp_path / "train/00000.bin", "<u2").tolist() == [0, 65_535]
    for ids in ([0, 65_536], [-1, 3]):
        with pytest.raises(DataError, match=r"val/00000.bin: token id (65,536|-1) does not fit in uint16 .*; use"):
            write_split(tmp_path / str(ids[0]), "val", [np.array(ids)], text_bytes=0)


def test_uint32_ids_round_trip(tmp_path):
    write_data(tmp_path, [np.array([65_536, 7, 2**32 - 1])], [np.array([1])], dtype="uint32", vocab_size=2**32)
    shards = TokenShards.open(tmp_path, "train")
    assert shards.dtype == np.uint32
    assert shards.gather(np.array([0]), 3).tolist() == [[65_536, 7, 2**32 - 1]]


def test_a_split_without_documents_opens_empty(tmp_path):
    write_data(tmp_path, [np.arange(3)], [np.arange(0)])
    assert TokenShards.open(tmp_path, "val").n_tokens == 0
    assert load_manifest(tmp_path).splits["val"].shards == ()


def test_existing_shards_are_never_written_over(data_dir):
    before = (data_dir / "train/00000.bin").read_bytes()
    with pytest.raises(FileExistsError):
        write_split(data_dir, "train", documents_of(3), text_bytes=0)
    assert (data_dir / "train/00000.bin").read_bytes() == before


def test_content_id_follows_the_published_rule(data_dir):
    lines = ["scaling-harness-data", "uint16", "t0"]
    for split in ("train", "val"):
        lines.append(split)
        for path in sorted((data_dir / split).glob("*.bin")):
            hashes = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, path.with_suffix(".idx")))
            lines.append(" ".join(hashes))
    assert load_manifest(data_dir).content_id == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_content_id_sees_tokens_order_splits_documents_tokenizer_and_dtype(tmp_path):
    a, b = np.array([1, 2, 3]), np.array([4, 5])
    variants = {
        "base": ([a, b], [a]),
        "token": ([np.array([1, 2, 9]), b], [a]),
        "order": ([b, a], [a]),
        "boundary": ([np.concatenate([a, b])], [a]),
        "split": ([a], [b, a]),
    }
    ids = {name: write_data(tmp_path / name, *parts).content_id for name, parts in variants.items()}
    splits = load_manifest(tmp_path / "base").splits
    ids |= {"dtype": content_id("uint32", "t0", splits), "tokenizer": content_id("uint16", "t1", splits)}
    assert len(set(ids.values())) == len(ids)
    again = write_data(tmp_path / "elsewhere", *variants["base"])
    assert again.content_id == ids["base"]


def test_canonical_json_is_pinned():
    """Every id is a hash of this rendering."""
    assert canonical_json({"b": 0.1, "a": ["é", 1], "later": None}) == b'{"a":["\\u00e9",1],"b":0.1}'


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train/00002.bin: manifest says 10 tokens but the file holds 8 and 1 bytes; run python -m"),
        (Path.unlink, r"train/00002.bin: manifest says 10 tokens but the file is missing; run python -m"),
        (lambda path: path.write_bytes(b"\0" * 24), r"train/00002.bin: manifest says 10 tokens .* holds 12; run"),
    ],
)
def test_open_refuses_a_shard_of_the_wrong_size(data_dir, damage, message):
    damage(data_dir / "train/00002.bin")
    with pytest.raises(DataError, match=message):
        TokenShards.open(data_dir, "train")
    assert TokenShards.open(data_dir, "val").n_tokens == 7


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00003.bin", "train/00000.idx", "val/00000.bin"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_every_damage_is_named_and_nothing_else(data_dir, name, damage):
    damage(data_dir / name)
    faults = list(iter_faults(data_dir, load_manifest(data_dir)))
    assert faults
    assert all(fault.startswith(f"{data_dir / name}:") for fault in faults)


def test_sound_data_has_no_faults(data_dir):
    assert list(iter_faults(data_dir, load_manifest(data_dir))) == []


def test_an_id_outside_the_vocabulary_is_a_fault_although_the_hash_holds(tmp_path):
    manifest = write_data(tmp_path, [np.array([3, 100])], [np.array([99])], vocab_size=100)
    assert list(iter_faults(tmp_path, manifest)) == [f"{tmp_path / 'train/00000.bin'}: token id 100 is not below vocab_size=100"]


@pytest.mark.parametrize(
    ("ends", "message"),
    [([5, 2], "do not increase"), ([2, 6], "ends at 6, the shard holds 5"), ([2, 4], "ends at 4, the shard holds 5")],
)
def test_wrong_document_ends_are_a_fault_although_the_hash_holds(tmp_path, ends, message):
    manifest = write_data(tmp_path, documents_of(2, 3), documents_of(2))
    idx = np.array(ends, "<u8").tobytes()
    (tmp_path / "train/00000.idx").write_bytes(idx)
    shard = manifest.splits["train"].shards[0].model_copy(update={"idx_sha256": hashlib.sha256(idx).hexdigest()})
    split = manifest.splits["train"].model_copy(update={"shards": (shard,)})
    manifest = manifest.model_copy(update={"splits": {**manifest.splits, "train": split}})
    faults = list(iter_faults(tmp_path, manifest))
    assert len(faults) >= 1
    assert any(message in fault for fault in faults)
    assert all("train/00000.idx" in fault for fault in faults)


def test_a_directory_without_manifest_says_what_to_run(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"^{directory}: no manifest.json, .*; run python -m data_prep prepare"):
            load_manifest(directory)


def edit(**changes):
    return lambda raw: raw | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(format="scale-data"), "format='scale-data' version 1, this program reads"),
        (edit(format_version=2), "format='scaling-harness-data' version 2, this program reads"),
        (edit(dtype="int8"), "dtype, Input should be 'uint16' or 'uint32'"),
        (edit(vocab_size="many"), "vocab_size, Input should be a valid integer"),
        (edit(content_id="0" * 64), "content_id=000000000000…, the shards it lists give"),
        (lambda raw: raw | {"splits": {"train": raw["splits"]["train"]}}, r"splits=\['train'\], not train and val"),
        (lambda raw: raw["splits"]["val"].update(tokens=8) or raw, "splits.val, .*tokens=8 is not the sum"),
        (lambda raw: [raw], "not a manifest"),
        (lambda raw: {}, "not a manifest .*format"),
    ],
)
def test_a_damaged_manifest_is_one_clear_line(data_dir, change, message):
    path = data_dir / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=f"^{path}: .*{message}") as caught:
        load_manifest(data_dir)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_a_torn_manifest_is_one_clear_line(data_dir):
    truncate(data_dir / "manifest.json")
    with pytest.raises(DataError, match=r"manifest.json: not a manifest .*; restore it, or remove"):
        load_manifest(data_dir)


def test_fields_of_a_later_version_are_passed_over(data_dir):
    path = data_dir / "manifest.json"
    raw = json.loads(path.read_text())
    raw["decontamination"] = {"ngram": 13}
    raw["splits"]["train"]["max_document_tokens"] = 25
    path.write_text(json.dumps(raw))
    assert load_manifest(data_dir).splits["train"].tokens == 43


def test_manifest_is_immutable_and_totals_are_checked(data_dir):
    manifest = load_manifest(data_dir)
    with pytest.raises(ValueError, match="frozen"):
        manifest.dtype = "uint32"
    with pytest.raises(ValueError, match="tokens=5 is not the sum"):
        SplitRecord(tokens=5, documents=0, text_bytes=0, shards=())
    assert manifest.max_token_id == 42
