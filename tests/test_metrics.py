"""Rows are written whole, by one writer, with nothing invented for what was not measured."""

import json
import math
from pathlib import Path

import pytest
import torch

from harness import metrics as metrics_module
from harness.checkpoint import TrainState
from harness.devices import Devices
from harness.metrics import MetricsWriter, StepWindow, convert_to_bpb
from harness.runs import load_plan


def test_a_row_is_a_line_and_not_a_number_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("eval", None, step=3, tokens=100, flops=1, val_loss=math.nan, val_bpb=2.0, eval_s=0.1)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1, "durable row by row"
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("eval", "cell", step=4, tokens=200, flops=1, val_loss=1.5, val_bpb=2.0, eval_s=0.1)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["val_loss"] is None
    assert (second["cell_id"], second["val_loss"]) == ("cell", 1.5)
    assert "val_loss not finite" in capsys.readouterr().out


def test_ranks_without_a_folder_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(None) as metrics:
        metrics.write("eval", None, step=3, tokens=100, flops=1, val_loss=1.0, val_bpb=2.0, eval_s=0.1)
    assert capsys.readouterr().out == ""


def test_a_window_averages_its_steps_and_begins_anew(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clock = load_plan(tiny_dir).runs[0], [0.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: clock[0])
    devices = Devices(torch.device("cpu"), 2, run.cells[0].flops_per_token * 512.0, "measured product")
    with MetricsWriter(tmp_path) as metrics:
        window = StepWindow(run, None, devices, metrics)
        for n_steps in (2, 1):
            for _ in range(n_steps):
                clock[0] += 5.0  # between steps: an evaluation, a save
                window.begin_step()
                for phase, seconds in (("compute", 0.1), ("data", 0.1), ("compute", 0.15), ("agree", 0.05)):
                    clock[0] += seconds
                    window.lap(phase)
                clock[0] += 0.1
                assert window.end_step() == pytest.approx(0.5)
            window.write(TrainState(step=n_steps + 1, train_loss=2.0), lr=0.1, grad_norm=1.0)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    for row in (first, second):
        assert [row[f"{phase}_s"] for phase in ("step", "data", "compute", "agree")] == pytest.approx([0.5, 0.1, 0.35, 0.05])
        assert (row["tokens_per_s"], row["mfu"]) == (pytest.approx(256), pytest.approx(0.5))
        assert row["memory_peak_bytes"] > 2**20
    assert (first["sample_start"], first["sample_end"]) == (8, 24)
    assert (second["sample_start"], second["sample_end"]) == (8, 16)


def test_what_is_not_known_is_empty(tiny_dir: Path, tmp_path: Path) -> None:
    """One rank agrees with nobody, and a device without a peak has no MFU."""
    run = load_plan(tiny_dir).runs[0]
    with MetricsWriter(tmp_path) as metrics:
        window = StepWindow(run, None, Devices(torch.device("cpu"), 1, None, None), metrics)
        window.begin_step()
        window.lap("agree")
        window.end_step()
        window.write(TrainState(step=1, train_loss=2.0), lr=0.1, grad_norm=1.0)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["agree_s"], row["mfu"]) == (None, None)
    assert row["data_s"] + row["compute_s"] == pytest.approx(row["step_s"])


def test_bits_per_byte() -> None:
    assert convert_to_bpb(math.log(2), val_tokens=100, val_bytes=100) == pytest.approx(1.0)
    assert convert_to_bpb(math.log(2), val_tokens=100, val_bytes=400) == pytest.approx(0.25)
