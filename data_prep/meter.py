"""How far a preparation is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 10.0


class Meter:
    """Counts text, ids and units of one stage."""

    def __init__(self, stage: str, n_units: int, n_done: int = 0) -> None:
        self.stage, self.n_units, self.n_done, self.n_before = stage, n_units, n_done, n_done
        self.text_bytes = self.n_ids = 0
        self.started = self.told = time.monotonic()

    def advance(self, text_bytes: int, n_ids: int, n_units: int) -> None:
        """Add what was done since the last call."""
        self.text_bytes += text_bytes
        self.n_ids += n_ids
        self.n_done += n_units
        self.tell()

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told >= PLAIN_EVERY_S:
            self.told = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """Return the state in one line."""
        elapsed = max(now - self.started, 1e-9)
        parts = [f"{self.stage}: {self.n_done:,} of {self.n_units:,} units"]
        if self.text_bytes:
            parts.append(f"{self.text_bytes / 1e6:,.0f} MB at {self.text_bytes / elapsed / 1e6:,.1f} MB/s")
        if self.n_ids:
            parts.append(f"{self.n_ids / elapsed / 1e6:,.2f} M tokens/s")
        if (left := self.left_s(elapsed)) is not None:
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts)

    def left_s(self, elapsed: float) -> float | None:
        """Return the time left at the rate of the finished units, once there are any."""
        n_here = self.n_done - self.n_before
        return elapsed / n_here * (self.n_units - self.n_done) if n_here else None


class BarMeter(Meter):
    """The same on a terminal."""

    def __init__(self, stage: str, n_units: int, n_done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(stage, n_units, n_done)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True, refresh_per_second=5
        )
        self.task = self.progress.add_task(stage, total=n_units, completed=n_done)

    def tell(self) -> None:
        self.progress.update(self.task, completed=self.n_done, description=self.line(time.monotonic()))


@contextmanager
def metered(stage: str, n_units: int, n_done: int = 0) -> Iterator[Meter]:
    """Show how far a stage is while it runs."""
    if not sys.stderr.isatty():
        yield Meter(stage, n_units, n_done)
        return
    meter = BarMeter(stage, n_units, n_done)
    with meter.progress:
        yield meter


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last lap."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
