"""From source to job: what a tokenizer is trained on, and what is planned once."""

import json
from dataclasses import replace

import pytest

from data_prep import stages as stages_module
from data_prep.documents import digest_of
from data_prep.mapping import SplitPlan
from data_prep.prepare import find_source, prepare
from data_prep.recipe import Request, recipe_of
from data_prep.stages import iter_training_text, plan_job
from data_prep.workplace import load_plan


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {number} of words"}) + "\n" for number in range(1000)))
    work = tmp_path / ".data.work"
    for folder in ("parts", "scan"):
        (work / folder).mkdir(parents=True)
    request = Request("files", tmp_path / "data", input=path, tokenizer="byte", val_fraction=0.3, unit_bytes=3000, workers=1)
    source = find_source(request, work)
    return plan_job(request, work, source, recipe_of(request, source))


def test_a_tokenizer_is_trained_on_what_trains_only(job):
    texts = list(iter_training_text(job))
    assert 600 < len(texts) < 800
    assert all(int.from_bytes(digest_of(text.encode())[:8], "big") >= int(0.3 * 2**64) for text in texts)
    tail = replace(job, split=SplitPlan("tail", 0.5, boundary=10**9, offsets=tuple(range(0, 10**9, 10**8))[: len(job.units)]))
    assert len(list(iter_training_text(replace(tail, split=replace(tail.split, boundary=0))))) == 0


def test_training_text_is_bounded_and_comes_from_all_over(job):
    texts = list(iter_training_text(job, 4000))
    numbers = [int(text.split()[1]) for text in texts]
    assert 3000 < sum(map(len, texts)) < 6000
    assert numbers[0] < 100
    assert numbers[-1] > 850


def test_a_trained_bpe_does_not_depend_on_workers_and_is_trained_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"chapter {number}: it was the best of times"}) + "\n" for number in range(500)))
    choices = {"input": path, "tokenizer": "bpe", "vocab_size": 270, "val_fraction": 0.3, "unit_bytes": 4000}
    made = [prepare("files", tmp_path / str(n), workers=n, **choices).manifest for n in (1, 2)]
    assert made[0].content_id == made[1].content_id
    assert (made[0].vocab_size, made[0].tokenizer.name, made[0].tokenizer.eot) == (270, "bpe-270", 269)


def test_the_plan_is_written_once_and_found_again(job, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("planned again")

    plan = load_plan(job.work)
    assert plan is not None
    monkeypatch.setattr(stages_module, "plan_units", never)
    request = Request("files", tmp_path / "data", input=tmp_path / "a.jsonl", tokenizer="byte", val_fraction=0.3)
    source = find_source(request, job.work)
    assert plan_job(request, job.work, source, recipe_of(request, source)).units == job.units
