"""What `plan` says is near what `prepare` then does, and it writes nothing."""

import gzip
import json
import lzma

import pytest

from data_prep.forecast import plan_preparation
from data_prep.prepare import prepare
from data_prep.recipe import Request
from data_prep.shards import DataError

TEXTS = [f"It was the best of times, it was the worst of times; chapter {number}. " * (number % 9 + 1) for number in range(4000)]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
@pytest.mark.parametrize("compress", [None, gzip.compress, lzma.compress])
def test_the_forecast_comes_true_within_a_tenth(tmp_path, tokenizer, compress):
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    suffix = {None: "", gzip.compress: ".gz", lzma.compress: ".xz"}[compress]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(data) if compress else data)
    choices = {"input": path, "tokenizer": tokenizer, "dedup": False}
    forecast = plan_preparation(Request("files", tmp_path / "data", **choices))
    assert list(tmp_path.iterdir()) == [path]
    splits = prepare("files", tmp_path / "data", **choices).manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    assert forecast.tokens == pytest.approx(tokens, rel=0.1)
    files = [*(tmp_path / "data/train").iterdir(), *(tmp_path / "data/val").iterdir()]
    assert forecast.shard_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)


def test_units_and_workers_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 100)
    request = Request("files", tmp_path / "data", input=tmp_path / "a.jsonl", tokenizer="byte", unit_bytes=500, workers=3)
    forecast = plan_preparation(request)
    assert (len(forecast.units), forecast.units[0], forecast.units[1]) == (5, "a.jsonl from 0", "a.jsonl from 500")
    assert forecast.n_workers == 3
    assert forecast.memory_bytes >= 3 * 250 * 2**20


def test_bad_input_is_refused_as_by_prepare(tmp_path):
    with pytest.raises(DataError, match=r"absent.txt: no such file"):
        plan_preparation(Request("files", tmp_path / "data", input=tmp_path / "absent.txt"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"blank.txt: no text in it"):
        plan_preparation(Request("files", tmp_path / "data", input=tmp_path / "blank.txt", tokenizer="byte"))
