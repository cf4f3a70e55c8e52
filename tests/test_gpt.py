"""The model is what size.py says it is, attends backwards only, and generates reproducibly."""

import math

import pytest
import torch

from model.gpt import GPT
from model.ladder import PUBLISHED, published_model
from model.size import PRESETS, ModelConfig, count_params, resolve_model

SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 13, "seq_len": 8}


def build(preset: str = "nanogpt", seed: int = 0, **options: object) -> GPT:
    torch.manual_seed(seed)
    return GPT(resolve_model(preset, **{**SHAPE, **options}))


def count_module(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_modules(name: str) -> None:
    config = published_model(name)
    assert count_module(config) == count_params(config).n_params


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", [{}, {"bias": True}, {"tied": False}, {"head_bias": True}, {"d_ff": 24}])
def test_parameter_count_is_the_modules_under_every_option(preset: str, option: dict[str, object]) -> None:
    config = resolve_model(preset, **SHAPE, **option)
    assert count_module(config) == count_params(config).n_params


def test_matmul_parameters_are_those_of_the_linear_layers() -> None:
    model = build("video")
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == count_params(model.config).n_params_matmul


@pytest.mark.parametrize("preset", PRESETS)
def test_no_position_sees_the_future(preset: str) -> None:
    model = build(preset).eval()
    ids = torch.randint(0, 13, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 13
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_fused_attention_equals_the_explicit_mask() -> None:
    model = build().eval()
    attention = model.blocks[0].attention
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    q, k, v = (part.view(2, 8, 2, 8).transpose(1, 2) for part in attention.qkv(x).split(16, dim=2))
    scores = (q @ k.transpose(-2, -1)) * 8**-0.5
    scores = scores.masked_fill(torch.tril(torch.ones(8, 8)) == 0, float("-inf"))
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x), expected)


def test_an_untrained_model_knows_nothing() -> None:
    model = build()
    ids, targets = torch.randint(0, 13, (2, 64, 8), generator=torch.Generator().manual_seed(3))
    loss = model(ids, targets)[1]
    assert loss is not None
    assert abs(loss.item() - math.log(13)) < 0.05


def test_generate_is_seeded_and_crops_its_context() -> None:
    model = build().eval()
    prompt = torch.zeros((2, 1), dtype=torch.long)

    def draw(seed: int) -> torch.Tensor:
        return model.generate(prompt, 20, top_k=5, generator=torch.Generator().manual_seed(seed))

    assert draw(0).shape == (2, 21)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    greedy = model.generate(prompt, 20, temperature=0.0)
    assert torch.equal(greedy[:, -1], model(greedy[:, -9:-1])[0][:, -1].argmax(-1))


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than seq_len=8"):
        build()(torch.zeros((1, 9), dtype=torch.long))


def test_residual_projections_start_smaller_when_scaled() -> None:
    wide = {"d_model": 256, "n_layer": 8}
    scaled, plain = build(**wide), build(residual_init="plain", **wide)
    assert scaled.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert plain.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert scaled.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
