"""People see one live line on a terminal and plain lines in a log, and the time left is that of all that is left."""

import io
from dataclasses import dataclass
from typing import Any

import pytest

from harness import console as console_module
from harness.console import CLEAR_LINE, Console, count_steps_left, format_seconds

ROW = {"kind": "train", "step": 20, "tokens": 2560, "train_loss": 2.5, "lr": 1e-3, "tokens_per_s": 1000.0, "mfu": 0.41}
EVAL = {"kind": "eval", "step": 20, "tokens": 2560, "val_loss": None, "val_bpb": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Branch:
    branch_step: int
    n_cooldown_steps: int


def tick(console: Console, monkeypatch: pytest.MonkeyPatch, step_s: float, n_steps: int) -> None:
    now = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    for step in range(1, n_steps + 1):
        console.tick(step, 2.5, tokens_per_step=100, flops_per_token=10, peak_flops_per_s=4000.0)
        now[0] += step_s


def test_a_log_gets_plain_lines_and_nothing_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.expect(100)
    tick(console, monkeypatch, 1.0, 10)
    assert stream.getvalue() == ""
    console.show(ROW)
    console.show(EVAL)
    console.close()
    first, second = stream.getvalue().splitlines()
    assert first == "step      20     0.003M tokens  loss 2.5000  lr 1.00e-03       1,000 tokens/s  MFU 41%"
    assert "val_loss not finite" in second
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_has_one_line_that_says_step_loss_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    console = Console(stream)
    console.expect(100)
    tick(console, monkeypatch, 0.5, 11)
    assert "\n" not in stream.getvalue()
    last = stream.getvalue().split(CLEAR_LINE)[-1]
    assert last == "step 11  loss 2.5000         200 tokens/s  MFU 50%  44 s left", "89 steps of half a second"
    console.show(ROW)
    assert "\n" not in stream.getvalue(), "a training row is what the line shows"
    console.show(EVAL)
    assert stream.getvalue().count("\n") == 1
    console.close()
    assert stream.getvalue().endswith(CLEAR_LINE)


def test_the_line_is_not_drawn_for_every_quick_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    console = Console(stream)
    console.expect(1000)
    tick(console, monkeypatch, 0.001, 1000)
    assert 3 <= stream.getvalue().count(CLEAR_LINE) <= 7


@pytest.mark.parametrize(
    ("cell", "step", "left"),
    [(None, 0, 60 + 10 + 20), (None, 25, 35 + 30), (0, 42, 20 + 8 + 20), (1, 60, 20), (1, 79, 1)],
)
def test_steps_left_are_the_rest_of_the_trunk_and_of_every_cooldown(cell: int | None, step: int, left: int) -> None:
    cells: Any = [Branch(40, 10), Branch(60, 20)]
    chosen = None if cell is None else cells[cell]
    assert count_steps_left(cells[cell or 0 :], chosen, step) == left


def test_without_cooldown_the_trunk_is_all() -> None:
    cells: Any = [Branch(50, 0)]
    assert count_steps_left(cells, None, 20) == 30
    assert count_steps_left(cells, cells[0], 50) == 0


def test_durations_are_for_people() -> None:
    assert [format_seconds(s) for s in (5, 100, 6000)] == ["5 s", "2 min", "1.7 h"]
