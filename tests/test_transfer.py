"""Optima are found where they are, and both figures are drawn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.config import ConfigError
from harness.runs import write_json
from results.plot import write_pictures
from results.transfer import (
    find_optima,
    has_sweep,
    load_coordinates,
    measure_drift,
    plot_coordinates,
    plot_transfer,
    render_optima,
)

LRS = [2.0**-k for k in range(4, 13)]


def fake_sweep() -> pd.DataFrame:
    """Parabolas in log lr: under mup with their lowest point at 2^-7.3 at every width, under standard moving as 1/width."""
    rows = []
    for parametrization in (None, "mup"):
        for d_model in (32, 64, 128, 256):
            best = -7.3 if parametrization else -7.3 - np.log2(d_model / 64)
            for lr in LRS:
                loss = 2.0 + 0.05 * (np.log2(lr) - best) ** 2
                rows.append(
                    {
                        "state": "done",
                        "role": "grid",
                        "parametrization": parametrization,
                        "d_model": d_model,
                        "lr": lr,
                        "val_loss": loss,
                    }
                )
    return pd.DataFrame(rows)


def test_optima_lie_between_the_points_of_the_sweep() -> None:
    optima = find_optima(fake_sweep())
    assert [o.lr for o in optima if o.parametrization == "mup"] == pytest.approx([2**-7.3] * 4)
    assert measure_drift(optima, "mup") == pytest.approx(1.0)
    assert measure_drift(optima, "standard") == pytest.approx(8.0)
    assert "standard 8.00, mup 1.00" in render_optima(optima)


def test_an_optimum_at_the_edge_is_called_so() -> None:
    sweep = fake_sweep()
    optima = find_optima(sweep[sweep["lr"] >= 2**-8])
    edges = {(o.parametrization, o.d_model) for o in optima if o.at_edge}
    assert edges == {("standard", 128), ("standard", 256)}
    assert "(edge of the sweep)" in render_optima(optima)


def test_a_sweep_is_told_from_another_study() -> None:
    sweep = fake_sweep()
    assert has_sweep(sweep)
    assert not has_sweep(sweep[sweep["lr"] == LRS[0]])
    assert not has_sweep(sweep[sweep["parametrization"] == "mup"])


def test_both_figures_are_drawn(tmp_path: Path) -> None:
    rows = [
        {
            "parametrization": p,
            "activation": a,
            "step": step,
            "d_model": d,
            "seed": seed,
            "change": (d if p == "standard" else 1) * step,
        }
        for p in ("standard", "mup")
        for a in ("logits", "first attention", "stream")
        for step in (1, 2)
        for d in (64, 128)
        for seed in (0, 1)
    ]
    write_json(tmp_path / "coordinate_check.json", {"format": "scaling-harness-coordinates", "axis": "d_model", "rows": rows})
    pictures = [plot_coordinates(*load_coordinates(tmp_path)), plot_transfer(fake_sweep())]
    paths = write_pictures(pictures, tmp_path / "figures")
    assert [path.name for path in paths] == [
        f"{name}.{suffix}" for name in ("coordinate_check", "width_transfer") for suffix in ("png", "svg", "pdf")
    ]
    assert all(path.stat().st_size > 5_000 for path in paths)
    write_json(tmp_path / "coordinate_check.json", {"rows": []})
    with pytest.raises(ConfigError, match="is not a coordinate check"):
        load_coordinates(tmp_path)
