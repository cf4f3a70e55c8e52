"""One unit to one part: routed, encoded, checked, committed whole."""

import json

import numpy as np
import pytest
import tokenizers

from data_prep.mapping import load_record, part_path, record_path
from data_prep.prepare import prepare, verify
from data_prep.shards import DataError, TokenShards
from data_prep.stages import plan_job
from data_prep.stop import StoppedError, StopWish
from data_prep.tokenizer import ByteTokenizer, load_tokenizer
from data_prep.workplace import committed_units


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a line {number} of words"}) + "\n" for number in range(300)))
    return path


CHOICES = {"tokenizer": "byte", "val_fraction": 0.3, "workers": 1, "unit_bytes": 3000}


def test_an_id_outside_the_vocabulary_stops_the_batch_it_is_in(tmp_path, lines, monkeypatch):
    """A wrong id must neither wrap around nor reach a shard."""
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: np.full(len(text), 65_536 + 7, dtype=np.uint32))
    with pytest.raises(DataError, match=r"byte tokenizer: token id 65,543 >= vocab_size=256; the tokenizer's file is damaged"):
        prepare("files", tmp_path / "data", input=lines, **CHOICES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_ids_over_65535_are_written_as_uint32(tmp_path):
    words = {"[UNK]": 0, "low": 1, "high": 70_000}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "sparse.json"))
    (tmp_path / "a.txt").write_text("low high high low " * 50)
    manifest = prepare(
        "files", tmp_path / "data", input=tmp_path / "a.txt", tokenizer=str(tmp_path / "sparse.json"), split="tail",
        val_fraction=0.5,
    ).manifest  # fmt: skip
    assert (manifest.dtype, manifest.vocab_size, manifest.max_token_id) == ("uint32", 70_001, 70_000)
    assert manifest.recipe["tokenizer"] == "json"
    assert np.fromfile(tmp_path / "data/train/00000.bin", "<u4")[:4].tolist() == [1, 70_000, 70_000, 1]
    assert TokenShards.open(tmp_path / "data", "val").dtype == np.uint32
    assert load_tokenizer(tmp_path / "data/tokenizer").encode("high").tolist() == [70_000]
    assert verify(tmp_path / "data") == []


@pytest.fixture
def job(tmp_path, lines):
    from data_prep.prepare import find_source
    from data_prep.recipe import Request, recipe_of

    work = tmp_path / ".data.work"
    for folder in ("parts", "scan"):
        (work / folder).mkdir(parents=True)
    request = Request("files", tmp_path / "data", input=lines, **CHOICES)
    source = find_source(request, work)
    return plan_job(request, work, source, recipe_of(request, source))


def test_what_has_no_whole_record_was_not_done(job):
    from data_prep.mapping import Mapper

    mapper = Mapper(job)
    for number in (0, 1, 2, 3):
        mapper.map_unit(number, lambda n_bytes, n_ids: None, StopWish())
    part_path(job.work, 1, "train.bin").write_bytes(b"short")
    record_path(job.work, 2).write_text("{torn")
    part_path(job.work, 5, "train.bin").write_bytes(b"never committed")
    assert [load_record(job.work, number) is not None for number in range(4)] == [True, False, False, True]
    assert committed_units(job.work, job.units, job.recipe_id) == {0, 3}
    left = {path.name.split(".")[0] for path in (job.work / "parts").iterdir()}
    assert left == {"000000", "000003"}, "what was not committed is cleared"
    assert committed_units(job.work, job.units, "another recipe") == set()


def test_a_wish_to_stop_leaves_nothing_of_the_unit_at_work(job):
    from dataclasses import replace

    from data_prep.mapping import Mapper

    wish = StopWish()
    wish.asked = True
    with pytest.raises(StoppedError):
        Mapper(replace(job, batch_bytes=100)).map_unit(0, lambda n_bytes, n_ids: None, wish)
    assert list((job.work / "parts").iterdir()) == []
