"""A finished cell or a checkpoint writes text; anything else is refused in words."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, plan_into

from data_prep.shards import DataError
from harness.attempt import claim_attempt
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.engine import ENGINE_STATE, open_engine
from harness.runs import find_cell_dir, load_run
from harness.sample import find_trained, iter_pieces, load_trained, sample_text
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
    assert find_trained(run_dir)[1] == find_cell_dir(run_dir, long)
    assert find_trained(find_cell_dir(run_dir, short))[1] == find_cell_dir(run_dir, short)


def test_what_cannot_write_is_refused(run_dir: Path, tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no finished cell and no checkpoint there"):
        sample_text(next(path for path in tiny_dir.iterdir() if path.is_dir()), "a", 5, Draw(), 0)
    with pytest.raises(ConfigError, match="no finished cell and no checkpoint there"):
        sample_text(run_dir / "attempts/1", "a", 5, Draw(), 0)
    with pytest.raises(ConfigError, match="there is no such run"):
        sample_text(run_dir.parent / "nowhere", "a", 5, Draw(), 0)
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
    _, model = load_trained(run_dir)
    export_model(model, tmp_path / "exported")
    tuned = plan_into(tmp_path / "runs", data_dir, model={"preset": "nanogpt", "init_from": str(tmp_path / "exported")})
    engine = open_engine(load_run(tuned), Ranks(0, 1, torch.device("cpu")))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(engine.model.eval()(ids)[0], model(ids)[0])
    with (tmp_path / "exported/model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match="has changed since the plan"):
        open_engine(load_run(tuned), Ranks(0, 1, torch.device("cpu")))


@pytest.fixture
def stopped_dir(data_dir: Path, tmp_path: Path) -> Path:
    """A run that was asked to stop before its first step was over: a checkpoint, and no finished cell."""
    run_dir = plan_into(tmp_path, data_dir)
    attempt_dir = claim_attempt(run_dir)
    (attempt_dir / "stop_requested").touch()
    assert run_attempt(run_dir, attempt_dir, None) == 0
    return run_dir


def test_a_checkpoint_of_an_unfinished_run_writes(stopped_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = stopped_dir / "checkpoints/1"
    assert checkpoint.is_dir()
    named = sample_text(checkpoint, "ab", 10, Draw(), 0)
    assert capsys.readouterr().err == ""
    assert sample_text(stopped_dir, "ab", 10, Draw(), 0) == named
    assert "not finished; from its checkpoint at step 1" in capsys.readouterr().err


def test_a_checkpoint_gives_the_weights_that_the_run_goes_on_from(stopped_dir: Path) -> None:
    saved = torch.load(stopped_dir / "checkpoints/1" / ENGINE_STATE, weights_only=True)["model"]
    for source in (stopped_dir, stopped_dir / "checkpoints/1"):
        found = load_trained(source)[1].state_dict()
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_spoilt_checkpoint_is_refused_by_name(stopped_dir: Path) -> None:
    checkpoint = stopped_dir / "checkpoints/1"
    next(path for path in checkpoint.iterdir() if path.name != "manifest.json").write_bytes(b"spoilt")
    with pytest.raises(ConfigError, match="is not a whole checkpoint"):
        sample_text(checkpoint, "ab", 10, Draw(), 0)


def test_ctrl_c_ends_the_writing_with_what_is_there(run_dir: Path) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 6:
            raise KeyboardInterrupt

    (text,) = sample_text(run_dir, "ab", 30, Draw(), 0, show=interrupt)
    assert "".join(pieces) == text == sample_text(run_dir, "ab", 5, Draw(), 0)[0]


def test_ctrl_c_at_the_command_line_is_no_failure(run_dir: Path) -> None:
    command = [sys.executable, "-m", "harness", "sample", str(run_dir), "--prompt", "ab", "--tokens", "100000000"]

    def hear_interrupts() -> None:  # a shell that runs the tests in the background has them ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=hear_interrupts, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.read(40).startswith("ab"), "text is shown while it is written"
        os.kill(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert rest.endswith("\n")


def test_a_character_of_several_tokens_is_shown_once_it_is_whole() -> None:
    def decode(ids: object) -> str:
        return bytes(ids.tolist()).decode("utf-8", "replace")  # type: ignore[attr-defined]

    def show(text: bytes) -> list[str]:
        tokens: Iterator[torch.Tensor] = (torch.tensor([[byte]]) for byte in text)
        return list(iter_pieces(tokens, [torch.tensor([list(b"a")])], decode))

    assert show("é€x".encode()) == ["a", "é", "€", "x"]
    assert show("é".encode()[:1]) == ["a", "\ufffd"], "what the end cuts is shown as it is"
    assert list(itertools.accumulate(show(b"\xe2x"))) == ["a", "a\ufffdx"]
