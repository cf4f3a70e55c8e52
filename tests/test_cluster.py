"""Cluster files and what this machine offers."""

import os
from pathlib import Path

import pytest

from harness.config import ConfigError
from launch.cluster import Cluster, list_gpus, list_slots, load_cluster


def test_local_is_shipped() -> None:
    assert load_cluster("local").scheduler == "local"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('scheduler = "pbs"', "scheduler='pbs', is refused"),
        ('scheduler = "local"\nslot = 2', "unknown key slot; did you mean slots?"),
        ('scheduler = "local"\nslots = 0', "slots=0, no run could start"),
        ('scheduler = "local"\nthreads_per_slot = 0', "threads_per_slot=0, is refused"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(str(tmp_path / "mine.toml"))
    assert expected in str(caught.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"--cluster=nowhere, there is no nowhere\.toml; use one of .*local"):
        load_cluster("nowhere")


def test_slots_follow_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    n_cpus = len(os.sched_getaffinity(0))
    assert list_slots(Cluster(scheduler="local")) == [None] * n_cpus
    assert list_slots(Cluster(scheduler="local", threads_per_slot=10_000)) == [None]
    alone = load_cluster("alone")
    assert (list_slots(alone), alone.n_threads) == ([None], None), "one run with every core"
    assert list_slots(Cluster(scheduler="local", slots=3)) == [None] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert list_gpus() == ["2", "5"]
    assert list_slots(Cluster(scheduler="local")) == ["2", "5"]
    assert list_slots(Cluster(scheduler="local", slots=3)) == ["2", "5", "2"]
