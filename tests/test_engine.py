"""Weights, optimiser and precision: what the definition of correct does."""

from pathlib import Path

import pytest
import torch
from conftest import plan_into

from harness.distributed import Ranks
from harness.engine import TorchEngine, seed_step
from harness.runs import load_run

ALONE = Ranks(0, 1, torch.device("cpu"))


def build(data_dir: Path, tmp_path: Path, **sections: object) -> TorchEngine:
    run = load_run(plan_into(tmp_path, data_dir, **sections))
    return TorchEngine(run.what, run.how.engine, ALONE)


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 9, (8, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def test_weight_decay_spares_norms_and_biases(data_dir: Path, tmp_path: Path) -> None:
    engine = build(data_dir, tmp_path, model={"preset": "gpt2"})
    decayed, spared = engine.optimizers[0].param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sum(len(g["params"]) for g in (decayed, spared)) == len(list(engine.model.parameters()))


def test_accumulated_micro_steps_give_the_gradient_of_the_mean(data_dir: Path, tmp_path: Path) -> None:
    whole, parts = build(data_dir, tmp_path), build(data_dir, tmp_path)
    ids, targets = draw()
    loss = whole.backward(ids, targets, micro_step=0, n_micro_steps=1)
    total = sum(
        parts.backward(*micro_batch, micro_step=k, n_micro_steps=4)
        for k, micro_batch in enumerate(zip(ids.chunk(4), targets.chunk(4), strict=True))
    )
    assert float(total) == pytest.approx(float(loss), rel=1e-6)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_clipping_bounds_the_norm_and_reports_the_one_before(data_dir: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "global_batch_size": 8}
    clipped = build(data_dir, tmp_path / "a", optim={**optim, "grad_clip": 0.01})
    free = build(data_dir, tmp_path / "b", optim={**optim, "grad_clip": False})
    norms = []
    for engine in (clipped, free):
        engine.backward(*draw(), micro_step=0, n_micro_steps=1)
        norms.append(float(engine.clip()))
    assert norms[0] == pytest.approx(norms[1])
    after = [torch.cat([p.grad.flatten() for p in e.model.parameters()]).norm().item() for e in (clipped, free)]
    assert after == pytest.approx([0.01, norms[1]], rel=1e-4)


def test_a_seed_draws_the_same_weights_and_another_draws_others(data_dir: Path, tmp_path: Path) -> None:
    first, again, other = (build(data_dir, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    weights = [engine.model.head.weight for engine in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_seeds_differ_by_seed_step_and_rank() -> None:
    drawn = set()
    for seed in range(3):
        for step in range(4):
            for rank in range(2):
                seed_step(seed, step, rank)
                drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == 24


def test_bf16_autocast_keeps_fp32_weights_and_gradients(data_dir: Path, tmp_path: Path) -> None:
    engine = build(data_dir, tmp_path, precision="bf16_autocast")
    engine.backward(*draw(), micro_step=0, n_micro_steps=1)
    assert {p.dtype for p in engine.model.parameters()} == {p.grad.dtype for p in engine.model.parameters()} == {torch.float32}
    with engine.autocast():
        assert engine.model(draw()[0])[0].dtype == torch.bfloat16


MUON = {"lr": 3e-3, "global_batch_size": 8, "kind": "muon"}


def test_muon_takes_hidden_matrices_and_adamw_the_rest(data_dir: Path, tmp_path: Path) -> None:
    engine = build(data_dir, tmp_path, model={"preset": "gpt2"}, optim=MUON)
    muon, adamw = engine.optimizers
    names = {id(p): name for name, p in engine.model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {
        name for name in names.values() if name.startswith("blocks") and name.endswith("weight") and "norm" not in name
    }
    assert len(taken) + sum(len(group["params"]) for group in adamw.param_groups) == len(names)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    losses = []
    for _ in range(20):
        losses.append(float(engine.backward(*draw(), micro_step=0, n_micro_steps=1)))
        engine.clip()
        engine.step(3e-3)
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


@pytest.mark.parametrize("optim", [MUON, {**MUON, "kind": "adamw"}])
def test_state_written_and_read_goes_on_bit_equal(data_dir: Path, tmp_path: Path, optim: dict[str, object]) -> None:
    engine = build(data_dir, tmp_path / "a", optim=optim)
    advance(engine, 3)
    (tmp_path / "state").mkdir()
    engine.write_state(tmp_path / "state")
    other = build(data_dir, tmp_path / "b", optim=optim, seed=1)
    other.read_state(tmp_path / "state")
    for one in (engine, other):
        advance(one, 3)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True))


def advance(engine: TorchEngine, n_steps: int) -> None:
    for step in range(n_steps):
        engine.backward(*draw(step), micro_step=0, n_micro_steps=1)
        engine.clip()
        engine.step(1e-3)


def test_a_skipped_step_changes_nothing_and_is_counted(data_dir: Path, tmp_path: Path) -> None:
    engine, calm = build(data_dir, tmp_path), build(data_dir, tmp_path)
    engine.backward(*draw(7), micro_step=0, n_micro_steps=1)
    engine.skip()
    for one in (engine, calm):
        advance(one, 2)
    assert (engine.skipped_steps, calm.skipped_steps) == (1, 0)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), calm.model.parameters(), strict=True))


@pytest.mark.parametrize("preset", ["nanogpt", "video"])
def test_activation_checkpointing_changes_memory_only(data_dir: Path, tmp_path: Path, preset: str) -> None:
    """With dropout, so that the masks drawn again are the ones drawn before."""
    model = {"preset": preset, "dropout": 0.2}
    plain = build(data_dir, tmp_path / "a", model=model)
    thrifty = build(data_dir, tmp_path / "b", model=model, engine={"device": "cpu", "activation_checkpointing": True})
    saved = []
    for engine in (plain, thrifty):
        seed_step(0, 0, 0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            engine.module(*draw())
        saved.append(sum(sizes))
        seed_step(0, 0, 0)
        engine.backward(*draw(), micro_step=0, n_micro_steps=1)
    assert saved[1] < 0.6 * saved[0]
    for one, other in zip(plain.model.parameters(), thrifty.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert plain.model.state_dict().keys() == thrifty.model.state_dict().keys()
