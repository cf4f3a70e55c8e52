"""The GPU study runs on a CPU at a small size, saves every row, and does nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch/gpu_study.sh"


def run_study(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_the_small_study_saves_its_rows_and_goes_on(tmp_path: Path, corpora: Path) -> None:
    first = run_study("--small", "--out", str(tmp_path), "baseline", "gpt2_124m", "chunked_loss")
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.get("engine") or row["loss"] for row in rows] == ["torch", "torch", "in chunks", "all logits"]
    assert "Self CPU" in first.stdout, "where the time goes"
    assert "shown by the video: 1.48" in first.stdout
    (tmp_path / "done/chunked_loss").unlink()
    second = run_study("--small", "--out", str(tmp_path), "baseline", "gpt2_124m", "chunked_loss", "sharing", "deepspeed")
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("there already") == 3
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()][4:]
    assert [row.get("engine") or row["loss"] for row in rows[:2]] == ["in chunks", "all logits"], "what was missing"
    assert [row["engine"] for row in rows[-3:]] == ["torch", "zero1", "zero3"]
    assert {row["n_cells"] for row in rows[2:]} == {1, 2}


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    found = run_study("--small", "--out", str(tmp_path), "gpt3")
    assert found.returncode == 2
    assert "gpt3, is no stage; use baseline gpt2_124m" in found.stderr
