"""Cells are timed in turn with their real data; the global batch stays, and what cannot be timed says so."""

import json
import statistics
import traceback
from pathlib import Path

import pytest
import torch
from conftest import tiny_experiment

from harness import bench_cells
from harness.batches import open_data
from harness.bench_cells import (
    Block,
    Row,
    Side,
    Variant,
    bench_cell,
    bench_sharing,
    describe_row,
    list_micro_batches,
    measure_own_work,
    render_rows,
    take_step,
)
from harness.bench_report import Choice, count_left, find_fastest, find_run, report_cell
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.engine import open_engine, seed_step
from harness.plan import plan_experiment
from harness.records import Plan
from harness.runs import iter_metrics
from harness.train import run_attempt

FP32 = Variant("torch", "fp32", False)


@pytest.fixture
def plan(data_dir: Path) -> Plan:
    return plan_experiment(tiny_experiment(data_dir))


def test_a_timed_step_is_the_loops(plan: Plan, tmp_path: Path, data_dir: Path) -> None:
    """The same losses as the trainer records, at any micro-batch."""
    from conftest import plan_into

    torch.set_num_threads(1)
    run_dir = plan_into(tmp_path, data_dir)
    run_attempt(run_dir, None, None)
    expected = [row["train_loss"] for row in iter_metrics(run_dir) if row["kind"] == "train" and row["cell_id"] is None][2:5]
    run, ranks = plan.runs[0], Ranks(0, 1, torch.device("cpu"))
    for micro_batch_size in (8, 2):
        engine = open_engine(run, ranks)
        batches = open_data(run.with_engine(micro_batch_size=micro_batch_size), ranks)[1]
        warm = [1.5e-3, 3e-3]  # the schedule's first two learning rates
        losses = [float(take_step(engine, batches, step, warm[step] if step < 2 else 3e-3)) for step in range(5)]
        assert losses[2:] == pytest.approx(expected, rel=1e-5)


def test_two_variants_take_turns(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_cell(
        plan,
        Choice("l1-h2-d16", "", "fp32,bf16_autocast", "off", "4,8", ""),
        n_blocks=2,
        n_threads=1,
        profiled=True,
        json_file=tmp_path / "rows.jsonl",
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["micro_batch_size"], row["precision"]) for row in rows] == [
        (size, precision) for size in (4, 8) for precision in ("fp32", "bf16_autocast")
    ]
    assert {row["global_batch_size"] for row in rows} == {8}
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 and row["memory_peak_bytes"] > 2**20 for row in rows)
    text = capsys.readouterr().out
    assert "Self CPU" in text, "where the time goes"


@pytest.mark.slow
def test_cells_share_a_machine(plan: Plan) -> None:
    rows = bench_sharing(plan.runs[0], FP32, 8, [1, 2], n_blocks=2)
    assert [(row.n_cells, len(row.speeds)) for row in rows] == [(1, 2), (2, 2)]


class FakePipe:
    """A worker that answers at once, and has no memory for large micro-batches."""

    def __init__(self, limit: int) -> None:
        self.limit, self.asked = limit, []

    def send(self, request: tuple[str, int, int] | None) -> None:
        self.asked.append(request)

    def recv(self) -> Block:
        _, micro_batch_size, n_steps = self.asked[-1]
        return Block(None, None) if micro_batch_size > self.limit else Block(0.1 * n_steps, 1000)


def test_what_does_not_fit_is_left_out_and_the_others_take_turns(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipe(4)
    monkeypatch.setattr(bench_cells, "open_side", lambda _run, variant, _threads: Side(variant, pipe, None))
    monkeypatch.setattr(Side, "close", lambda self: None)
    rows = bench_cell(plan.runs[0], [FP32], [2, 4, 8], n_blocks=10, n_threads=1)
    assert [(row.micro_batch_size, len(row.speeds)) for row in rows] == [(2, 10), (4, 10)]
    timed = [request[1] for request in pipe.asked if request[2] > 1]
    assert timed[:4] in ([4, 2, 2, 4], [2, 4, 4, 2]), "in turn"
    assert statistics.median(rows[0].speeds) == pytest.approx(128 / 0.1)


def test_a_worker_that_fails_says_why(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="cannot be timed"):
        bench_cell(plan.runs[0], [Variant("torch", "fp32", False)], [3], n_blocks=2, n_threads=1)


def test_a_search_halves_the_global_batch(plan: Plan) -> None:
    assert list_micro_batches(plan.runs[0]) == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("", "fast", "", "off", "", ""), "--engines=fast, is not one"),
        (("", "torch", "bf16_native", "off", "", ""), "takes --engines of zero1"),
        (("", "", "", "perhaps", "", ""), "--compile=perhaps"),
        (("", "", "", "off", "3", ""), "is not a multiple of micro_batch_size"),
        (("", "", "", "off", "a", ""), "is not a list of numbers"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_line(plan: Plan, choice: tuple[str, ...], message: str) -> None:
    chosen = Choice(*choice)
    with pytest.raises(ConfigError, match=message):
        chosen.list_variants(plan.runs[0]), chosen.list_sizes(plan.runs[0])
    with pytest.raises(ConfigError, match="--size=l9, is not in the grid; use l1-h2-d16, l1-h2-d8"):
        find_run(plan, "l9")


def test_the_table_says_median_spread_and_what_is_not_known(plan: Plan) -> None:
    rows = [Row(FP32, 8, speeds=[10.0, 20.0, 30.0, 40.0]), Row(FP32, 4, speeds=[50.0] * 4, mfu=0.5, memory_peak_bytes=2**21)]
    text = render_rows(rows)
    assert "| torch | fp32 | no | 8 | 1 | 25 (12 to 38) | 1.00 |  |  |" in text
    assert "| torch | fp32 | no | 4 | 1 | 50 (50 to 50) | 2.00 | 50.0% | 2 MiB |" in text
    assert find_fastest(rows).micro_batch_size == 4
    assert describe_row(plan.runs[0], rows[0], 1)["mfu"] is None


def test_what_is_left_is_read_from_the_rows(plan: Plan, data_dir: Path, tmp_path: Path) -> None:
    from conftest import plan_into

    assert count_left(tmp_path, plan.runs[0]) == 12 + 2 + 4
    run_dir = plan_into(tmp_path, data_dir)
    run_attempt(run_dir, None, None)
    assert count_left(tmp_path, plan.runs[0]) == 0


def test_the_loops_own_work_is_small(plan: Plan) -> None:
    """No step waits for a disk: the bound leaves room for a busy machine, BENCHMARKS.md has the number."""
    assert 0 < min(measure_own_work(plan.runs[0], 300) for _ in range(3)) < 1e-2


def test_seeding_a_step_formats_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed does, for each kind of device that is not there: a tenth of a millisecond each."""
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack was formatted"))
    with pytest.raises(pytest.fail.Exception):
        torch.manual_seed(1)
    seed_step(0, 1, 0)
    first = torch.rand(3)
    seed_step(0, 1, 0)
    assert torch.equal(torch.rand(3), first)
