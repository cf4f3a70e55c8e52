"""A finished cell writes text; anything else is refused in words."""

from pathlib import Path

import pytest
from conftest import plan_into

from data_prep.shards import DataError
from harness.config import ConfigError
from harness.runs import find_cell_dir, load_run
from harness.sample import find_cell, sample_text
from harness.train import run_attempt


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = plan_into(tmp_path_factory.mktemp("runs"), data_dir)
    run_attempt(run_dir, None, None)
    return run_dir


def test_a_seed_writes_the_same_text(run_dir: Path) -> None:
    texts = [sample_text(run_dir, "ab", 30, 1.0, None, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("ab") and len(text) == 32 for text in texts)


def test_a_run_stands_for_its_longest_finished_cell(run_dir: Path) -> None:
    short, long = load_run(run_dir).cells
    assert find_cell(run_dir)[1] == find_cell_dir(run_dir, long)
    assert find_cell(find_cell_dir(run_dir, short))[1] == find_cell_dir(run_dir, short)


def test_what_cannot_write_is_refused(run_dir: Path, tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no finished cell there"):
        sample_text(next(path for path in tiny_dir.iterdir() if path.is_dir()), "a", 5, 1.0, None, 0)
    with pytest.raises(ConfigError, match="is empty"):
        sample_text(run_dir, "", 5, 1.0, None, 0)
    with pytest.raises(DataError, match="Z"):
        sample_text(run_dir, "Z", 5, 1.0, None, 0)
