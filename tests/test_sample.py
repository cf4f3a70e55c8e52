"""A finished cell writes text; anything else is refused in words."""

from pathlib import Path

import pytest
import torch
from conftest import plan_into

from data_prep.shards import DataError
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.engine import open_engine
from harness.runs import find_cell_dir, load_run
from harness.sample import find_cell, load_cell_model, sample_text
from harness.train import run_attempt
from model.generate import Draw
from model.huggingface import export_model


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = plan_into(tmp_path_factory.mktemp("runs"), data_dir)
    run_attempt(run_dir, None, None)
    return run_dir


def test_a_seed_writes_the_same_text(run_dir: Path) -> None:
    texts = [sample_text(run_dir, "ab", 30, Draw(), seed)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("ab") and len(text) == 32 for text in texts)


def test_a_run_stands_for_its_longest_finished_cell(run_dir: Path) -> None:
    short, long = load_run(run_dir).cells
    assert find_cell(run_dir)[1] == find_cell_dir(run_dir, long)
    assert find_cell(find_cell_dir(run_dir, short))[1] == find_cell_dir(run_dir, short)


def test_what_cannot_write_is_refused(run_dir: Path, tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no finished cell there"):
        sample_text(next(path for path in tiny_dir.iterdir() if path.is_dir()), "a", 5, Draw(), 0)
    with pytest.raises(ConfigError, match="is empty"):
        sample_text(run_dir, "", 5, Draw(), 0)
    with pytest.raises(DataError, match="Z"):
        sample_text(run_dir, "Z", 5, Draw(), 0)


def test_what_is_shown_piece_by_piece_is_the_text(run_dir: Path) -> None:
    pieces: list[str] = []
    (text,) = sample_text(run_dir, "ab", 30, Draw(), 0, show=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) == 31


def test_several_samples_differ_and_the_likeliest_do_not(run_dir: Path) -> None:
    texts = sample_text(run_dir, "ab", 30, Draw(), 0, n_samples=3)
    assert len(set(texts)) == 3
    assert len(set(sample_text(run_dir, "ab", 30, Draw(temperature=0.0), 0, n_samples=3))) == 1


def test_an_exported_cell_starts_another_run(run_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Fine-tuning begins at the loss where the first run ended, and a file that changed since the plan is refused."""
    _, model = load_cell_model(run_dir)
    export_model(model, tmp_path / "exported")
    tuned = plan_into(tmp_path / "runs", data_dir, model={"preset": "nanogpt", "init_from": str(tmp_path / "exported")})
    engine = open_engine(load_run(tuned), Ranks(0, 1, torch.device("cpu")))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(engine.model.eval()(ids)[0], model(ids)[0])
    with (tmp_path / "exported/model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match="has changed since the plan"):
        open_engine(load_run(tuned), Ranks(0, 1, torch.device("cpu")))
