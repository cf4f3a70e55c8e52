"""Checkpoints are whole or do not count; a spoilt one is named, set aside, and an older one used."""

import errno
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import fault
from harness.attempt import claim_attempt, list_staging
from harness.checkpoint import (
    KEEP_LAST,
    Origin,
    TrainState,
    check_resumable,
    find_fault,
    find_newest,
    find_on_the_way,
    list_checkpoints,
    list_corrupt,
    load_state,
    prune_checkpoints,
    publish_checkpoint,
    read_manifest,
    staged_result,
)
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.ending import LostLeaseError, write_outcome
from harness.records import hash_record
from harness.runs import find_cell_dir, load_plan, write_json

ALONE = Ranks(0, 1, torch.device("cpu"))
ORIGIN = Origin("run", "data", "torch", None, 1, 1, "code", "2.13.0", None)


class FakeEngine:
    """Writes a value as two ranks of a real engine would, in a folder below."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def write_state(self, folder: Path) -> None:
        (folder / "parts").mkdir()
        torch.save({"w": torch.full((64,), self.value)}, folder / "parts" / "model.pt")
        torch.save({"step": torch.tensor(3)}, folder / "parts" / "optim.pt")


@pytest.fixture
def attempt_dir(tmp_path: Path) -> Path:
    return claim_attempt(tmp_path)


def publish(attempt_dir: Path, step: int, engine: Any = None, origin: Origin = ORIGIN) -> Path:
    folder = attempt_dir.parent.parent / "checkpoints"
    return publish_checkpoint(folder, attempt_dir, ALONE, engine or FakeEngine(step), TrainState(step=step), origin, 2.0)


def test_a_checkpoint_reads_back(attempt_dir: Path) -> None:
    state = TrainState(step=3, receipt="ab" * 16, val_loss=2.0, recent_losses=(3.0, 2.0), loss_spikes=1)
    folder = attempt_dir.parent.parent / "checkpoints"
    path = publish_checkpoint(folder, attempt_dir, ALONE, FakeEngine(7.0), state, ORIGIN, 2.0)  # type: ignore[arg-type]
    assert load_state(path) == state
    assert torch.equal(torch.load(path / "parts/model.pt")["w"], torch.full((64,), 7.0))
    manifest = read_manifest(path)
    assert manifest["files"].keys() == {"parts/model.pt", "parts/optim.pt", "state.json"}
    assert (manifest["step"], manifest["engine"], manifest["world_size"], manifest["attempt"]) == (3, "torch", 1, 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["parts/model.pt", "parts/optim.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", [flip_a_bit, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_spoilt_checkpoint_is_named_and_passed_over(
    attempt_dir: Path, capsys: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], object]
) -> None:
    folder = publish(attempt_dir, 5).parent
    spoil(publish(attempt_dir, 9) / name)
    assert find_newest(folder, 100) == folder / "5"
    assert f"9 is not usable: {'' if name == 'manifest.json' else name.split('/')[0]}" in capsys.readouterr().out
    assert [path.name for path in list_corrupt(folder)] == [".corrupt-9-0"]
    publish(attempt_dir, 9)
    assert find_newest(folder, 100) == folder / "9", "saving again mends it"
    assert find_newest(folder, 8) == folder / "5"
    assert find_newest(folder, 4) is None


def test_a_file_too_many_is_a_fault(attempt_dir: Path) -> None:
    """DeepSpeed reads whatever matches a pattern, so a stray file would be loaded."""
    path = publish(attempt_dir, 5)
    (path / "parts/more.pt").touch()
    assert find_fault(path) == "parts/more.pt is not in its manifest"


def test_spoilt_checkpoints_alone_stop_a_run(tiny_dir: Path) -> None:
    run = load_plan(tiny_dir).runs[0]
    attempt_dir = claim_attempt(tiny_dir / run.run_id)
    cell = run.cells[1]
    assert find_on_the_way(tiny_dir / run.run_id, cell) is None, "nothing was ever saved: from the beginning"
    flip_a_bit(publish(attempt_dir, cell.branch_step) / "parts/model.pt")
    for _ in range(2):  # also when it was set aside before
        with pytest.raises(ConfigError, match="none is valid"):
            find_on_the_way(tiny_dir / run.run_id, cell)
    publish(attempt_dir, 3)
    found = find_on_the_way(tiny_dir / run.run_id, cell)
    assert found is not None
    assert found.name == "3"


@pytest.mark.parametrize("place", ["save_begin", "file_written", "before_manifest", "before_publish"])
def test_a_failed_save_leaves_the_last_checkpoint_and_no_staging(
    attempt_dir: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = publish(attempt_dir, 5).parent

    def refuse(here: str) -> None:
        if here == place:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fault, "injector", refuse)
    with pytest.raises(OSError, match="No space left"):
        publish(attempt_dir, 9)
    assert [p.name for p in folder.iterdir()] == ["5"]


def test_a_stale_attempt_cannot_publish(attempt_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the later attempt comes before the lease is looked at, or between the look and the rename."""
    run_dir = attempt_dir.parent.parent
    publish(attempt_dir, 5)

    def take_over(here: str) -> None:
        if here == "before_publish":
            claim_attempt(run_dir, take_over=True)

    with monkeypatch.context() as patch:
        patch.setattr(fault, "injector", take_over)
        with pytest.raises(LostLeaseError, match="a later attempt"):
            publish(attempt_dir, 9)
    second = run_dir / "attempts" / "2"
    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.check_lease", lambda folder: claim_attempt(run_dir, take_over=True))
        with pytest.raises(FileNotFoundError):
            publish(second, 9, origin=replace(ORIGIN, attempt=2))
        with pytest.raises(FileNotFoundError), staged_result(run_dir / "cells" / "c", second) as staging:
            (staging / "summary.json").touch()
    assert list_checkpoints(run_dir / "checkpoints") == [5]
    assert not (run_dir / "cells/c/summary.json").exists()
    assert list_staging(run_dir) == []
    publish(run_dir / "attempts" / "4", 9, origin=replace(ORIGIN, attempt=4))


def test_pruning_keeps_the_newest_whole_ones_and_what_a_branch_needs(tiny_dir: Path) -> None:
    run = load_plan(tiny_dir).runs[0]
    run_dir = tiny_dir / run.run_id
    attempt_dir, (first, second) = claim_attempt(run_dir), run.cells
    folder = run_dir / "checkpoints"
    for step in range(1, second.branch_step + 1):
        publish(attempt_dir, step)
        prune_checkpoints(run_dir, run, folder)
    newest = range(second.branch_step - KEEP_LAST + 1, second.branch_step + 1)
    assert list_checkpoints(folder) == sorted({first.branch_step, *newest})
    truncate(folder / str(second.branch_step) / "parts/model.pt")
    write_json(find_cell_dir(run_dir, first) / "summary.json", {})
    prune_checkpoints(run_dir, run, folder)
    assert list_checkpoints(folder) == [first.branch_step, second.branch_step - 1, second.branch_step], "two that are whole"


def test_code_in_a_checkpoint_is_found_before_it_is_run(attempt_dir: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("open('never', 'w')",))

    class Planted(FakeEngine):
        def write_state(self, folder: Path) -> None:
            super().write_state(folder)
            torch.save({"optimizer": Malice()}, folder / "planted.pt")

    path = publish(attempt_dir, 1, Planted())
    assert find_fault(path) == "planted.pt names builtins.eval, which no checkpoint needs and which loading would run"
    assert find_newest(path.parent, 9) is None
    assert not (Path.cwd() / "never").exists()


def test_a_file_that_is_no_torch_file_is_a_fault(attempt_dir: Path) -> None:
    class Odd(FakeEngine):
        def write_state(self, folder: Path) -> None:
            (folder / "odd.pt").write_bytes(pickle.dumps(print))

    assert find_fault(publish(attempt_dir, 1, Odd())) is not None


def test_a_manifest_that_was_altered_with_its_files_is_a_fault(attempt_dir: Path) -> None:
    path = publish(attempt_dir, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "step": 2}))
    assert "does not match its own digest" in str(find_fault(path))
    changed = {key: value for key, value in manifest.items() if key != "digest"} | {"step": 2}
    (path / "manifest.json").write_text(json.dumps({**changed, "digest": hash_record(changed)}))
    assert find_fault(path) is None


@pytest.mark.parametrize(
    ("found", "here", "match"),
    [
        ({}, {"engine": "deepspeed", "zero_stage": 1}, "engine=torch, this run has deepspeed"),
        ({"engine": "deepspeed", "zero_stage": 1}, {"engine": "deepspeed", "zero_stage": 2}, "zero_stage=1, this run has 2"),
        (
            {"engine": "deepspeed", "zero_stage": 2, "world_size": 2},
            {"engine": "deepspeed", "zero_stage": 2},
            "world_size=2, ZeRO's parts do not fit 1 ranks; start it on 2, or with --allow-reshape",
        ),
        ({}, {"data_content_id": "other"}, "data_content_id=data"),
    ],
)
def test_what_cannot_be_resumed_is_refused(found: dict[str, Any], here: dict[str, Any], match: str) -> None:
    manifest = vars(replace(ORIGIN, **found))
    with pytest.raises(ConfigError, match=match):
        check_resumable(Path("5"), manifest, replace(ORIGIN, **here), allow_reshape=False)


def test_torch_goes_on_at_any_world_size() -> None:
    assert not check_resumable(Path("5"), vars(replace(ORIGIN, world_size=8)), ORIGIN, allow_reshape=False)


def test_zero_goes_on_at_another_world_size_where_that_is_allowed() -> None:
    zero = replace(ORIGIN, engine="deepspeed", zero_stage=3)
    assert check_resumable(Path("5"), vars(replace(zero, world_size=8)), zero, allow_reshape=True)
    assert not check_resumable(Path("5"), vars(zero), zero, allow_reshape=True)


def test_the_outcome_of_an_older_attempt_does_not_hold_the_lease(attempt_dir: Path) -> None:
    write_outcome(attempt_dir, "failed", "x", None)
    claim_attempt(attempt_dir.parent.parent)
    with pytest.raises(LostLeaseError):
        publish(attempt_dir, 9)
