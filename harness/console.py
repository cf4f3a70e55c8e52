"""A run's progress for people: one live line on a terminal, plain lines in a log. No torch."""

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from harness.records import CellRecord

REFRESH_S = 0.2  # between two drawings of the live line
CLEAR_LINE = "\r\x1b[K"


class Console:
    """Writes lines for people; on a terminal the newest step stands in a last line that is drawn over."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_live = self.stream.isatty()
        self.n_left, self.n_ticks, self.began, self.drawn = 0, 0, 0.0, 0.0

    def expect(self, n_steps: int) -> None:
        """Learn how many steps are left to do, and measure their pace from here on."""
        self.n_left, self.n_ticks = n_steps, 0

    def tick(self, step: int, loss: float, tokens_per_step: int, flops_per_token: int, peak_flops_per_s: float | None) -> None:
        """Count one step; on a terminal draw the live line, not more often than an eye can follow."""
        now = time.monotonic()
        if self.n_ticks == 0:
            self.began = now  # the first step, with its warming up, is no measure
        self.n_ticks, self.n_left = self.n_ticks + 1, self.n_left - 1
        if not self.is_live or now - self.drawn < REFRESH_S or self.n_ticks < 2:
            return
        self.drawn = now
        step_s = (now - self.began) / (self.n_ticks - 1)
        rate = tokens_per_step / step_s
        mfu = None if peak_flops_per_s is None else rate * flops_per_token / peak_flops_per_s
        left = format_seconds(self.n_left * step_s)
        self.stream.write(f"{CLEAR_LINE}step {step:,}  loss {loss:.4f}  {render_rate(rate, mfu)}  {left} left")
        self.stream.flush()

    def note(self, line: str) -> None:
        """Write a line that stays."""
        self.stream.write(f"{CLEAR_LINE if self.is_live else ''}{line}\n")
        self.stream.flush()

    def show(self, row: dict[str, Any]) -> None:
        """Write a row in short; a training row on a terminal is what the live line shows."""
        if row["kind"] == "eval" or not self.is_live:
            self.note(render_row(row))

    def close(self) -> None:
        """Leave the terminal with a clean line."""
        if self.is_live:
            self.stream.write(CLEAR_LINE)
            self.stream.flush()


def count_steps_left(pending: Sequence[CellRecord], cell: CellRecord | None, step: int) -> int:
    """Return the steps that a run still has to take, standing at `step` of the trunk (no cell) or of a cell's cooldown."""
    in_cooldown = cell is not None and cell.n_cooldown_steps > 0
    done = step - cell.branch_step if cell is not None and in_cooldown else 0
    at = cell.branch_step if cell is not None and in_cooldown else step
    trunk = max(0, max((one.branch_step for one in pending), default=at) - at)
    return trunk + sum(one.n_cooldown_steps for one in pending) - done


def render_row(row: dict[str, Any]) -> str:
    """Render a row as one line of a log."""
    where = f"step {row['step']:>7,}  {row['tokens'] / 1e6:8.3f}M tokens"
    if row["kind"] == "eval":
        return f"{where}  val_loss {number(row['val_loss'])}  ({number(row['val_bpb'])} bits per byte)"
    rate = "" if row["tokens_per_s"] is None else render_rate(row["tokens_per_s"], row.get("mfu"))
    return f"{where}  loss {number(row['train_loss'])}  lr {row['lr']:.2e}  {rate}"


def render_rate(tokens_per_s: float, mfu: float | None) -> str:
    """Render a rate, with the fraction of the peak where that is known."""
    return f"{tokens_per_s:>10,.0f} tokens/s" + ("" if mfu is None else f"  MFU {mfu:.0%}")


def number(value: float | None) -> str:
    """Render a loss, or say that it is not a number."""
    return "not finite" if value is None else f"{value:.4f}"


def format_seconds(seconds: float) -> str:
    """Write a duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
