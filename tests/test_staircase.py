"""The staircase beside the video's: seeds side by side, and what is off is said to be off."""

import pandas as pd
import pytest

from harness.config import ConfigError
from results.staircase import VIDEO, list_steps, render_staircase, write_staircase


def fake(losses: dict[str, tuple[float, ...]]) -> pd.DataFrame:
    rows = [
        {"state": "done", "stage": stage, "seed": seed, "val_loss": loss, "n_params": 4225}
        for stage, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_each_stage_stands_beside_the_videos_value(tmp_path) -> None:
    steps = list_steps(fake({"head": (2.41, 2.43), "bigram": (2.49, 2.48), "blocks": (2.2, 2.3)}))
    assert [step.stage for step in steps] == ["bigram", "head", "blocks"], "in the video's order"
    assert steps[1].mean == pytest.approx(2.42)
    text = render_staircase(steps)
    assert "| `head` | 4,225 | 2.410 | 2.430 | 2.420 | 2.4 | +0.020 | yes |" in text
    assert "| `blocks` | 4,225 | 2.200 | 2.300 | 2.250 | 2.08 | +0.170 | no |" in text
    assert text in write_staircase(steps, tmp_path).read_text()


def test_a_seed_that_is_missing_leaves_an_empty_place() -> None:
    cells = fake({"bigram": (2.5, 2.5), "head": (2.4, float("nan"))})
    assert "| `head` | 4,225 | 2.400 |  | 2.400 |" in render_staircase(list_steps(cells))
    with pytest.raises(ConfigError, match="no finished cell is a stage"):
        list_steps(cells.assign(stage=None))


def test_the_video_has_six_steps_down() -> None:
    assert list(VIDEO.values()) == sorted(VIDEO.values(), reverse=True)
    assert len(VIDEO) == 6
