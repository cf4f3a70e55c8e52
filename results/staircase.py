"""The video's staircase: the loss of each stage beside what the video shows."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.config import ConfigError
from model.size import STAGES

# What "Let's build GPT" shows at its small setting, read off the screen: a mean over random validation batches, one run.
VIDEO = {"bigram": 2.5, "head": 2.4, "multi_head": 2.28, "feed_forward": 2.24, "blocks": 2.08, "layer_norm": 2.06}
NEAR = 0.05  # nats


@dataclass(frozen=True)
class Step:
    """One stage: its losses by seed on the full validation split, and the video's."""

    stage: str
    n_params: int
    losses: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def off(self) -> float:
        """How far the mean is from the video's value."""
        return self.mean - VIDEO[self.stage]


def list_steps(cells: pd.DataFrame) -> list[Step]:
    """Return the finished stages in the video's order.

    Raises:
        ConfigError: none is finished.
    """
    done = cells[(cells["state"] == "done") & cells["val_loss"].notna()]
    steps = []
    for stage in STAGES:
        rows = done[done["stage"] == stage].sort_values("seed")
        if len(rows):
            losses = {int(seed): float(loss) for seed, loss in zip(rows["seed"], rows["val_loss"], strict=True)}
            steps.append(Step(stage, int(rows["n_params"].iloc[0]), losses))
    if not steps:
        raise ConfigError("staircase: no finished cell is a stage of the video; set model.stage and train")
    return steps


def render_staircase(steps: list[Step]) -> str:
    """Write the staircase as a table in Markdown."""
    seeds = sorted({seed for step in steps for seed in step.losses})
    columns = ["stage", "parameters", *(f"seed {seed}" for seed in seeds), "mean", "video", "difference", f"within {NEAR}"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for step in steps:
        by_seed = [f"{step.losses[seed]:.3f}" if seed in step.losses else "" for seed in seeds]
        verdict = "yes" if abs(step.off) <= NEAR else "no"
        row = [f"`{step.stage}`", f"{step.n_params:,}", *by_seed, f"{step.mean:.3f}"]
        lines.append("| " + " | ".join([*row, f"{VIDEO[step.stage]:g}", f"{step.off:+.3f}", verdict]) + " |")
    return "\n".join(lines)


def write_staircase(steps: list[Step], results_dir: Path) -> Path:
    """Write the table to staircase.md."""
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / "staircase.md"
    note = "Nats per token on the full validation split, at the last step. The video's values: random batches, one run."
    path.write_text(f"# The video's staircase\n\n{note}\n\n{render_staircase(steps)}\n")
    return path
