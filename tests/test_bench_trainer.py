"""Both trainers are real processes, timed by their own record; a small fake stands for nanoGPT's train.py."""

from pathlib import Path

import numpy as np
import pytest

from harness import bench_trainer
from harness.bench import SHAPES, Shape
from harness.bench_trainer import ITERATION, N_WARM, Setting, compare_trainers, copy_nanogpt, read_speed, render_trainers
from harness.config import ConfigError

SMALL = Shape(1, 2, 16, 8, 4, 9, 2)
# What the comparison needs of train.py: its options, its data, and the form of its log.
FAKE = """
import sys, pickle, os, numpy as np
options = dict(a[2:].split("=") for a in sys.argv[2:])
assert pickle.load(open("data/bench/meta.pkl", "rb"))["vocab_size"] == 9 and os.environ["OMP_NUM_THREADS"] == "1"
assert np.fromfile("data/bench/train.bin", dtype=np.uint16).max() == 8 and options["device"] == "cpu"
for i in range(int(options["max_iters"]) + 1):
    print(f"iter {i}: loss 2.0000, time {900.0 if i < 5 else 4.0:.2f}ms, mfu -100.00%")
"""


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "config").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "large").write_text("not to be copied")
    (folder / "train.py").write_text(FAKE)
    return folder


@pytest.mark.parametrize("n_at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_both_are_run_and_timed_by_their_own_record(nanogpt: Path, data_dir: Path, n_at_once: int) -> None:
    ours, theirs = compare_trainers(Setting(SMALL, 5, 1, n_at_once), nanogpt, data_dir, n_blocks=2)
    assert theirs == pytest.approx([n_at_once * 32 / 0.004] * 2), "warm steps do not count; processes add up"
    assert len(ours) == 2
    assert all(speed > 0 for speed in ours)


def test_nanogpt_gets_our_tokens(nanogpt: Path, data_dir: Path, tmp_path: Path) -> None:
    copy_nanogpt(nanogpt, tmp_path / "copy", data_dir)
    from data_prep.shards import TokenShards, load_manifest

    shards = TokenShards.open(data_dir, "train", load_manifest(data_dir))
    copied = np.fromfile(tmp_path / "copy/data/bench/train.bin", dtype=np.uint16)
    assert np.array_equal(copied, shards.read(0, shards.n_tokens))
    assert not (tmp_path / "copy/data/large").exists()


def test_a_log_is_read_as_nanogpt_writes_it() -> None:
    log = "number of parameters: 0.80M\nstep 0: train loss 4.2, val loss 4.1\niter 0: loss 4.2149, time 910.31ms, mfu -100.00%\n"
    assert ITERATION.findall(log) == [("0", "910.31")]
    with pytest.raises(ConfigError, match="took 1 steps and no more; it said: oops"):
        read_speed(SMALL, [0.9], "oops")
    assert read_speed(SMALL, [9.0] * N_WARM + [0.5, 0.25, 0.5], "") == 64


def test_a_comparison_says_median_and_quartiles() -> None:
    row = render_trainers("toy", Setting(SMALL, 5, 1, 2), [20.0, 30.0, 40.0], [10.0] * 3)
    assert "| 2 x 1 | 10 | 30 | 3.00 (2.00 to 4.00) | 3 |" in row


def test_a_folder_without_train_py_is_refused(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no train\.py; give a checkout of nanoGPT"):
        compare_trainers(Setting(SMALL, 5, 1, 1), tmp_path, data_dir, n_blocks=2)


def test_every_shape_has_its_block() -> None:
    assert set(bench_trainer.BLOCK_STEPS) == set(SHAPES)
