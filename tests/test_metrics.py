"""Rows are written whole, by one writer, with nothing invented for what was not measured."""

import json
import math
from pathlib import Path

import pytest

from harness.checkpoint import TrainState
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


def test_a_window_averages_its_steps_and_begins_anew(tiny_dir: Path, tmp_path: Path) -> None:
    run = load_plan(tiny_dir).runs[0]
    window = StepWindow(run, None)
    with MetricsWriter(tmp_path) as metrics:
        for steps in (2, 1):
            for _ in range(steps):
                window.add(seconds=0.5, data_s=0.1)
            window.write(metrics, TrainState(step=steps + 1, train_loss=2.0), lr=0.1, grad_norm=1.0)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step_s"], first["data_s"], first["tokens_per_s"]) == (0.5, 0.1, 2 * 128 / 1.0)
    assert (first["sample_start"], first["sample_end"]) == (8, 24)
    assert (second["sample_start"], second["sample_end"], second["tokens_per_s"]) == (8, 16, 256.0)


def test_bits_per_byte() -> None:
    assert convert_to_bpb(math.log(2), val_tokens=100, val_bytes=100) == pytest.approx(1.0)
    assert convert_to_bpb(math.log(2), val_tokens=100, val_bytes=400) == pytest.approx(0.25)
