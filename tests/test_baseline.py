"""The baseline's losses stand beside the video's, and what is not trained yet says so."""

from conftest import ROOT
from fake_experiment import write_experiment

from harness.config import load_experiment
from model.size import count_params, resolve_model
from results.baseline import render_baseline
from results.table import load_cells


def test_losses_stand_beside_the_videos(data_dir, tmp_path) -> None:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 8}], "tokens": [128 * 100]}
    experiment_dir = write_experiment(tmp_path, data_dir, grid=grid)
    cells = load_cells(experiment_dir)
    text = render_baseline(cells)
    assert f"val_loss {cells['val_loss'][0]:.4f} at the end" in text
    assert "shown by the video: 1.48" in text
    next(experiment_dir.glob("*/cells/*/summary.json")).unlink()
    assert "; the same command goes on" in render_baseline(load_cells(experiment_dir))


def test_the_files_are_the_video_and_nanogpt() -> None:
    """Parameter counts as the two programs print them; batch, steps and dropout alike, learning rates apart."""
    video, nanogpt = (load_experiment(ROOT / f"launch/experiments/baseline_10m{variant}.toml") for variant in ("", "_nanogpt"))
    for experiment, n_params in ((video, 10_788_929), (nanogpt, 10_745_088)):
        size = experiment.grid.sizes[0].model_dump(exclude_none=True)
        model = resolve_model(experiment.model.preset, **size, vocab_size=65, seq_len=256, dropout=0.2)
        assert count_params(model).n_params == n_params
        assert (experiment.optim.global_batch_size, experiment.grid.steps, experiment.model.dropout) == (64, (5000,), 0.2)
    assert (video.optim.lr, video.schedule.kind) == (3e-4, "constant")
    assert (nanogpt.optim.lr, nanogpt.schedule.kind, nanogpt.optim.betas) == (1e-3, "cosine", (0.9, 0.99))
    assert nanogpt.schedule.warmup_tokens == 100 * 64 * 256
