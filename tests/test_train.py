"""The trainer: what it records, where it resumes, and that two ranks train as one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_into, read_summaries

from harness.attempt import StopWish
from harness.config import ConfigError
from harness.engine import TorchEngine
from harness.runs import (
    find_cell_dir,
    iter_metrics,
    list_attempts,
    load_run,
    read_json,
    run_state,
)
from harness.train import run_attempt

DETERMINISTIC = ("val_loss", "val_loss_best", "train_loss", "receipt", "weights_sha256", "tokens", "steps", "flops")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def deterministic(run_dir: Path) -> list[list[Any]]:
    return [[summary[key] for key in DETERMINISTIC] for summary in read_summaries(run_dir)]


def stop_at_look(monkeypatch: pytest.MonkeyPatch, n_looks: int) -> None:
    """Have the n-th look of an attempt find a wish to stop; the trainer looks once a step."""

    def look(self: StopWish) -> bool:
        self.looks = getattr(self, "looks", 0) + 1  # type: ignore[attr-defined]
        if self.looks == n_looks:
            self.reason = "the test"
        return self.reason is not None

    monkeypatch.setattr(StopWish, "look", look)


def test_a_run_writes_its_rows(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir)
    assert run_attempt(run_dir, None, None) == 0
    run = load_run(run_dir)
    assert run_state(run_dir, run).state == "done"
    for cell, summary in zip(run.cells, read_summaries(run_dir), strict=True):
        assert (summary["tokens"], summary["steps"], summary["flops"]) == (cell.tokens, cell.n_steps, cell.flops)
        assert summary["val_loss_best"] <= summary["val_loss"] < math.log(9)
        assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / math.log(2))  # ASCII: a token is a byte
        assert (find_cell_dir(run_dir, cell) / "model.safetensors").exists()
        assert not (find_cell_dir(run_dir, cell) / "checkpoints").exists()
    rows = [row for row in iter_metrics(run_dir) if row["kind"] == "train"]
    assert [row["step"] for row in rows if row["cell_id"] is None] == list(range(1, 13))
    for cell in run.cells:
        own = [row["step"] for row in rows if row["cell_id"] == cell.cell_id]
        assert own == list(range(cell.branch_step + 1, cell.n_steps + 1))
    assert len({row["receipt"] for row in rows}) == len(rows) - 2, "a chain; both cooldowns read on where the trunk did"
    assert all(row["sample_end"] == row["step"] * 8 == row["sample_start"] + 8 for row in rows)
    assert run_attempt(run_dir, None, None) == 0, "a finished run has nothing to do"
    assert len(list_attempts(run_dir)) == 2


def test_budgets_share_their_first_samples(data_dir: Path, tmp_path: Path) -> None:
    """The longer cell equals one that was planned alone: sharing a trunk changes no number."""
    both, alone = plan_into(tmp_path / "both", data_dir), None
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 16]}
    alone = plan_into(tmp_path / "alone", data_dir, grid=grid)
    assert both.name == alone.name
    for run_dir in (both, alone):
        run_attempt(run_dir, None, None)
    assert deterministic(both)[-1] == deterministic(alone)[0]


def test_an_extended_run_trains_only_what_is_new(data_dir: Path, tmp_path: Path) -> None:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 16]}
    run_dir = plan_into(tmp_path / "runs", data_dir, grid=grid)
    run_attempt(run_dir, None, None)
    longer = {**grid, "tokens": [128 * 8, 128 * 16, 128 * 24]}
    assert plan_into(tmp_path / "runs", data_dir, grid=longer) == run_dir
    assert run_state(run_dir, load_run(run_dir)).state == "planned"
    run_attempt(run_dir, None, None)
    second = [json.loads(line) for line in (run_dir / "attempts/2/metrics.jsonl").read_text().splitlines()]
    trunk = [row["step"] for row in second if row["kind"] == "train" and row["cell_id"] is None]
    assert trunk == [1, 2, 3, 4, 5, 6, *range(13, 19)], "to the new branch points, not over the old stretch"
    whole = plan_into(tmp_path / "whole", data_dir, grid=longer)
    run_attempt(whole, None, None)
    assert deterministic(run_dir) == deterministic(whole)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop_after", [1, 5, 6, 7, 8, 9, 12, 15])
def test_resume_is_bit_equal(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, dropout: float
) -> None:
    """Stopped on the trunk, at a branch point, in either cooldown: the same weights, losses and receipts."""
    model = {"preset": "nanogpt", "dropout": dropout}
    calm, broken = (
        plan_into(tmp_path / "calm", data_dir, model=model),
        plan_into(tmp_path / "broken", data_dir, model=model),
    )
    run_attempt(calm, None, None)
    with monkeypatch.context() as patch:
        stop_at_look(patch, stop_after)
        assert run_attempt(broken, None, None) == 0
    assert run_state(broken, load_run(broken)).state == "preempted"
    run_attempt(broken, None, None)
    assert deterministic(broken) == deterministic(calm)
    losses = [[(row["step"], row["cell_id"], row.get("train_loss")) for row in iter_metrics(d)] for d in (calm, broken)]
    assert losses[0] == losses[1]


def test_a_kill_between_row_and_outcome_costs_nothing(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir)
    run_attempt(run_dir, None, None)
    before = deterministic(run_dir)
    first = load_run(run_dir).cells[1]
    (find_cell_dir(run_dir, first) / "summary.json").unlink()
    (run_dir / "attempts/1/outcome.json").unlink()
    attempt = read_json(run_dir / "attempts/1/attempt.json")
    (run_dir / "attempts/1/attempt.json").write_text(json.dumps({**attempt, "pid": 2**22 + 1}))
    run_attempt(run_dir, None, None)
    assert deterministic(run_dir) == before


def test_accumulation_changes_the_gradient_only_by_rounding(data_dir: Path, tmp_path: Path) -> None:
    whole, parts = (
        plan_into(tmp_path / "a", data_dir),
        plan_into(tmp_path / "b", data_dir, engine={"device": "cpu", "micro_batch_size": 2}),
    )
    assert whole.name == parts.name
    for run_dir in (whole, parts):
        run_attempt(run_dir, None, None)
    one, other = ({(r["cell_id"], r["step"]): r for r in iter_metrics(d) if r["kind"] == "train"} for d in (whole, parts))
    for key, row in one.items():
        assert other[key]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)
        assert other[key]["receipt"] == row["receipt"]


def test_bf16_autocast_is_another_numerics_close_by(data_dir: Path, tmp_path: Path) -> None:
    fp32, bf16 = plan_into(tmp_path, data_dir), plan_into(tmp_path, data_dir, precision="bf16_autocast")
    for run_dir in (fp32, bf16):
        run_attempt(run_dir, None, None)
    one, other = read_summaries(fp32)[-1], read_summaries(bf16)[-1]
    assert one["metric_id"] != other["metric_id"]
    assert 0 < abs(one["val_loss"] - other["val_loss"]) < 0.02


def test_divergence_is_recorded_not_hidden(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = plan_into(tmp_path, data_dir, engine={"device": "cpu", "max_skipped_steps": 0})
    clip = TorchEngine.clip

    def spoil(self: TorchEngine) -> torch.Tensor:
        spoil.calls += 1
        return clip(self) * (math.nan if spoil.calls == 10 else 1.0)

    spoil.calls = 0
    monkeypatch.setattr(TorchEngine, "clip", spoil)
    assert run_attempt(run_dir, None, None) == 1
    outcome = read_json(run_dir / "attempts/1/outcome.json")
    assert (outcome["state"], outcome["step"]) == ("diverged", 7), "the cell of 8 steps was done, the trunk was at 7"
    assert "no sound update" in outcome["reason"]


def test_changed_data_is_refused(data_dir: Path, tmp_path: Path) -> None:
    run_dir = plan_into(tmp_path, data_dir)
    record = read_json(run_dir / "run.json")
    other = tmp_path / "other"
    (tmp_path / "other.txt").write_text("abcdefgh " * 1000)
    from data_prep.prepare import prepare

    prepare("text", other, input=tmp_path / "other.txt")
    record["how"]["data_dir"] = str(other)
    (run_dir / "run.json").write_text(json.dumps(record))
    assert run_attempt(run_dir, None, None) == 2
    assert "the plan was made for" in read_json(run_dir / "attempts/1/outcome.json")["reason"]
    with pytest.raises(ConfigError, match="there is no such run"):
        run_attempt(tmp_path / "nowhere", None, None)
