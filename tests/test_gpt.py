"""The model is what size.py says it is, attends backwards only, and generates reproducibly."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.gpt import GPT
from model.ladder import PUBLISHED, published_model
from model.size import PRESETS, ModelConfig, count_flops, count_params, resolve_model

SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 13, "seq_len": 8}

# One option at a time, over every preset.
OPTIONS: list[dict[str, object]] = [
    {},
    {"bias": True},
    {"qkv_bias": True},
    {"tied": False},
    {"tied": True},
    {"head_bias": True},
    {"d_ff": 24},
    {"n_kv_head": 1},
    {"n_kv_head": 1, "qkv_bias": True},
    {"qk_norm": True},
    {"norm": "rmsnorm", "bias": True},
    {"norm": "layernorm"},
    {"positions": "rotary"},
    {"positions": "learned"},
    {"activation": "swiglu"},
    {"activation": "swiglu", "bias": True, "d_ff": 40},
    {"activation": "relu"},
    {"padded_vocab_size": 16},
    {"padded_vocab_size": 16, "head_bias": True, "tied": False},
]


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
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_parameter_count_is_the_modules_under_every_option(preset: str, option: dict[str, object]) -> None:
    config = resolve_model(preset, **SHAPE, **option)
    assert count_module(config) == count_params(config).n_params


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_matmul_parameters_are_those_of_the_linear_layers(preset: str, option: dict[str, object]) -> None:
    model = build(preset, **option)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == count_params(model.config).n_params_matmul


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_no_position_sees_the_future(preset: str, option: dict[str, object]) -> None:
    model = build(preset, **option).eval()
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", [option for option in OPTIONS[1:] if "padded_vocab_size" not in option], ids=str)
def test_every_option_has_an_effect_or_is_the_presets_own(preset: str, option: dict[str, object]) -> None:
    """Weights drawn large, biases and gains too, so that an option that is accepted and ignored shows."""
    outputs = []
    for options in ({}, option):
        model = build(preset, init_std=0.3, **options).eval()
        with torch.no_grad():
            for index, parameter in enumerate(p for _, p in sorted(model.named_parameters())):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
        outputs.append((model.config, model(torch.arange(8)[None])[0]))
    (base, before), (other, after) = outputs
    assert (base == other) == torch.allclose(before, after)


def test_rows_of_padding_change_no_logit_and_no_loss() -> None:
    plain, padded = build(), build(padded_vocab_size=32)
    state = plain.state_dict()
    for name in ("token_embedding.weight", "head.weight"):
        state[name] = torch.cat([state[name], torch.full((32 - 13, 16), 1e3)])
    padded.load_state_dict(state)
    ids = torch.arange(8)[None]
    assert padded(ids)[0].shape == (1, 8, 13)
    torch.testing.assert_close(plain(ids, ids), padded(ids, ids))


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    """Forward and backward, products of matrices and of attention; torch's fused kernel counts the masked half too."""
    config = resolve_model(preset, **{**SHAPE, "seq_len": 32, "d_model": 32, "n_layer": 3})
    model, ids = GPT(config), torch.randint(0, 13, (2, 32))
    counted = count_flops(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(ids, ids)[1]
        forward = counter.get_total_flops()
        assert loss is not None
        loss.backward()
    assert forward == 2 * 32 * counted.forward.flops_per_token
    assert counter.get_total_flops() == 2 * 32 * counted.flops_per_token
