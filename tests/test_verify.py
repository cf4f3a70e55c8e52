"""The coordinate check tells the two parametrizations apart, on the engine that trains."""

import pytest
from conftest import plan_into

from harness import verify
from harness.runs import load_run, read_json
from harness.verify import build_width, check_width, describe_run, find_growth, write_check


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return check_width(widths=(64, 256), seeds=(0,), n_steps=4)


@pytest.mark.parametrize("activation", ["logits", "blocks.0.attention", "blocks.1.mlp"])
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
    facts = check_width(widths=(64, 256), seeds=(0,), n_steps=2)
    assert find_growth(facts, "mup", "blocks.1.mlp", 2) > 2.5


def test_the_learning_rate_factor_reaches_the_optimiser(data_dir, tmp_path) -> None:
    model = {"preset": "nanogpt", "parametrization": "mup", "base_d_model": 4}
    run = load_run(plan_into(tmp_path, data_dir, model=model))
    assert run.what.model.parametrization == "mup"
    assert run.cells[0].parametrization == "mup"
    engine = verify.TorchEngine(run.what, run.how.engine, verify.Ranks(0, 1, verify.torch.device("cpu")))
    engine.step(1.0)
    assert sorted(group["lr"] for group in engine.optimizers[0].param_groups) == [0.5, 1.0, 1.0]
    by_lr = {group["lr"]: group["weight_decay"] for group in engine.optimizers[0].param_groups if group["weight_decay"]}
    assert by_lr == {0.5: 0.2, 1.0: 0.1}
    assert describe_run(build_width(64, "standard"), 0).model.parametrization is None


def test_the_check_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(verify, "check_width", lambda: {"format": "scaling-harness-coordinates", "rows": []})
    path, facts = write_check(tmp_path / "new")
    assert read_json(path) == facts
