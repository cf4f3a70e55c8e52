"""The bench compares what does the same work; no time is tested."""

import json

import pytest

from data_prep.measure import prepare_as_nanogpt, run_bench


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the contender's libraries, not ours
def test_the_bench_runs_and_its_contenders_agree(tmp_path):
    texts = [f"It was the best of times; chapter {number}. " * 40 for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told: list[str] = []
    run_bench([tmp_path / "a.jsonl"], 2, 1, told.append)
    page = "\n".join(told)
    assert "all token streams are identical" in page
    assert page.count(" x nanogpt") == 3
    assert page.count("receipt") == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_idiom_writes_every_document_and_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello world"}\n{"text": "hello"}\n')
    result = prepare_as_nanogpt(tmp_path / "a.jsonl", tmp_path / "out", 1)
    assert result["tokens"] == 5
    assert (tmp_path / "out/train.bin").read_bytes() == b"".join(
        i.to_bytes(2, "little") for i in (31373, 995, 50256, 31373, 50256)
    )
