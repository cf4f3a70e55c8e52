"""The coordinate check tells the two parametrizations apart, on the engine that trains."""

import pytest
from conftest import plan_into

from harness import verify
from harness.runs import load_run, read_json
from harness.verify import build_checked, check_axis, describe_run, find_growth, render_growth, write_check


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return check_axis("d_model", (64, 256), seeds=(0,), n_steps=4)


@pytest.mark.parametrize("activation", ["logits", "stream", "first attention", "last mlp"])
@pytest.mark.parametrize("step", [1, 4])
def test_changes_are_flat_under_mup_and_grow_under_standard(facts: dict[str, object], activation: str, step: int) -> None:
    assert find_growth(facts, "standard", activation, step) > 2
    assert 0.4 < find_growth(facts, "mup", activation, step) < 1.8


def test_at_the_base_width_both_are_one(facts: dict[str, object]) -> None:
    base = {
        parametrization: [
            row["change"] for row in facts["rows"] if row["d_model"] == 64 and row["parametrization"] == parametrization
        ]
        for parametrization in ("standard", "mup")
    }
    assert base["standard"] == pytest.approx(base["mup"], rel=1e-5)


def test_a_forgotten_factor_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is checked: with hidden matrices learning at the full rate, mup's changes grow."""
    monkeypatch.setattr("harness.optimizer.scale_lr", lambda config, role: 1.0)
    facts = check_axis("d_model", (64, 256), seeds=(0,), n_steps=2)
    assert find_growth(facts, "mup", "last mlp", 2) > 2.5


def test_the_learning_rate_factor_reaches_the_optimiser(data_dir, tmp_path) -> None:
    model = {"preset": "nanogpt", "parametrization": "mup", "base_d_model": 4}
    run = load_run(plan_into(tmp_path, data_dir, model=model))
    assert run.what.model.parametrization == "mup"
    assert run.cells[0].parametrization == "mup"
    engine = verify.TorchEngine(run.what, run.how.engine, verify.Ranks(0, 1, verify.torch.device("cpu")))
    engine.step(1.0)
    groups = {tuple(group[key] for key in ("lr", "weight_decay", "eps")) for group in engine.optimizers[0].param_groups}
    embeddings, blocks, norms, last_norm = (1.0, 0.1, 1e-8), (0.5, 0.2, 5e-9), (1.0, 0.0, 5e-9), (1.0, 0.0, 1e-8)
    assert groups == {embeddings, blocks, norms, last_norm}
    assert describe_run(build_checked("d_model", 64, "standard"), 0).model.parametrization is None


def test_with_depth_the_stream_grows_under_standard_and_not_under_mup(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the factor on what a block adds, it grows under mup too."""
    depth = check_axis("n_layer", (2, 8), seeds=(0,), n_steps=3)
    assert find_growth(depth, "standard", "stream", 3) > 3
    assert 0.4 < find_growth(depth, "mup", "stream", 3) < 1.5
    monkeypatch.setattr("model.gpt.scale_residual", lambda config: 1.0)
    forgotten = check_axis("n_layer", (2, 8), seeds=(0,), n_steps=3)
    assert find_growth(forgotten, "mup", "stream", 3) > 2


def test_the_check_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    rows = [
        {"parametrization": p, "activation": "logits", "step": 1, "n_layer": n, "change": n}
        for p in ("standard", "mup")
        for n in (2, 4)
    ]
    monkeypatch.setattr(verify, "check_axis", lambda axis, values: {"axis": axis, "rows": rows})
    path, facts = write_check(tmp_path / "new", "n_layer")
    assert read_json(path) == facts
    assert "logits               standard     2.00   mup   2.00" in render_growth(facts)
