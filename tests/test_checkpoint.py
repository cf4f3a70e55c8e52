"""Checkpoints are whole or do not count; a spoilt one is named and an older one used."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint import (
    KEEP_LAST,
    TrainState,
    find_newest,
    list_checkpoints,
    load_checkpoint,
    publish_checkpoint,
    write_checkpoint,
)
from harness.runs import find_cell_dir, load_plan, write_json

CPU = torch.device("cpu")


def engine_state(value: float = 1.0) -> dict[str, object]:
    return {"model": {"w": torch.full((64,), value)}, "optimizer": {"state": {}}}


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    state = TrainState(step=3, receipt="ab" * 16, train_s=1.5, val_loss=2.0, val_loss_best=1.9)
    path = write_checkpoint(tmp_path, state, engine_state(), "run")
    restored, engine = load_checkpoint(path, CPU)
    assert restored == state
    assert torch.equal(engine["model"]["w"], torch.ones(64))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("state.pt", truncate),
        ("state.pt", flip_a_bit),
        ("state.pt", Path.unlink),
        ("state.pt", lambda path: path.write_bytes(b"")),
        ("manifest.json", truncate),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_spoilt_checkpoint_is_named_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], object]
) -> None:
    for step in (5, 9):
        write_checkpoint(tmp_path, TrainState(step=step), engine_state(step), "run")
    spoil(tmp_path / "9" / name)
    assert find_newest(tmp_path, 100) == tmp_path / "5"
    assert "9 is not usable" in capsys.readouterr().out
    write_checkpoint(tmp_path, TrainState(step=9), engine_state(9), "run")
    assert find_newest(tmp_path, 100) == tmp_path / "9", "saving again mends it"
    assert find_newest(tmp_path, 8) == tmp_path / "5"
    assert find_newest(tmp_path, 4) is None


def test_a_failed_write_leaves_the_last_checkpoint_and_no_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, TrainState(step=5), engine_state(), "run")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.checkpoint.torch.save", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, TrainState(step=9), engine_state(), "run")
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_pruning_keeps_the_newest_and_what_a_branch_needs(tiny_dir: Path) -> None:
    run = load_plan(tiny_dir).runs[0]
    run_dir = tiny_dir / run.run_id
    first, second = run.cells
    for step in range(1, second.branch_step + 1):
        publish_checkpoint(run_dir, run, None, TrainState(step=step), engine_state())
    kept = list_checkpoints(run_dir / "checkpoints")
    assert kept == sorted({first.branch_step, *range(second.branch_step - KEEP_LAST + 1, second.branch_step + 1)})
    write_json(find_cell_dir(run_dir, first) / "summary.json", {})
    publish_checkpoint(run_dir, run, None, TrainState(step=second.branch_step), engine_state())
    assert first.branch_step not in list_checkpoints(run_dir / "checkpoints")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("open('/tmp/never', 'w')",))

    state = {**engine_state(), "optimizer": Malice()}
    path = write_checkpoint(tmp_path, TrainState(step=1), state, "run")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        load_checkpoint(path, CPU)
