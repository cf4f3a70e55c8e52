"""Both ways of attending are one function: equal forward and backward, with and without a mask; memory changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from model import attention
from model.attention import CausalSelfAttention, KeyValueCache, attend, attend_by_matmul, build_rotation, rotate
from model.size import resolve_model

SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 13, "seq_len": 16}


def draw(dtype: torch.dtype = torch.float32, T: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, T, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_matrix_products_equal_the_fused_kernel(is_causal: bool, scale: float | None) -> None:
    fused, plain = draw(), draw()
    one = attend(*fused, is_causal=is_causal, scale=scale)
    other = attend_by_matmul(*plain, is_causal=is_causal, dropout=0.0, scale=scale)
    torch.testing.assert_close(one, other)
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_rule_sends_bfloat16_on_a_cpu_to_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it gives is the float32 result to bfloat16's rounding."""
    taken = []
    monkeypatch.setattr(attention, "attend_by_matmul", lambda *a, **k: (taken.append(1), attend_by_matmul(*a, **k))[1])
    exact = attend(*draw())
    assert not taken
    rounded = attend(*draw(torch.bfloat16))
    assert taken
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)


def test_dropout_drops_in_both_ways() -> None:
    torch.manual_seed(0)
    ones = [torch.ones(64, 4, 8, 8)] * 3
    for out in (attend(*ones, dropout=0.25), attend_by_matmul(*ones, is_causal=True, dropout=0.25, scale=None)):
        assert out.mean().item() == pytest.approx(1.0, abs=0.02)
        assert out.std().item() > 0.1


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "positions": "learned"}, {"qk_norm": None}])
def test_remembered_keys_and_values_change_nothing(options: dict[str, object]) -> None:
    config = resolve_model("modern", **SHAPE, **options)
    torch.manual_seed(0)
    layer = CausalSelfAttention(config).eval()
    x = torch.randn(2, 10, 32)
    rotation = build_rotation(config) if config.positions == "rotary" else None
    whole = layer(x, rotation[:, :10] if rotation is not None else None)
    cache, parts = KeyValueCache(), []
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 10)]:
        parts.append(layer(x[:, start:end], rotation[:, start:end] if rotation is not None else None, cache))
    assert cache.length == 10
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_shared_heads_equal_their_repetition() -> None:
    """Grouped-query attention is full attention whose key and value matrices repeat."""
    grouped = CausalSelfAttention(resolve_model("nanogpt", **SHAPE, n_kv_head=2))
    full = CausalSelfAttention(resolve_model("nanogpt", **SHAPE))
    q, k, v = grouped.qkv.weight.split([32, 16, 16])
    repeated = [part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (k, v)]
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([q, *repeated]))
        full.proj.load_state_dict(grouped.proj.state_dict())
    x = torch.randn(2, 10, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotation_depends_on_distance_alone_and_keeps_lengths() -> None:
    rotation = build_rotation(resolve_model("modern", **SHAPE))
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(x.expand(1, 1, 16, 8), rotation)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 5):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(scores[5, 0], scores[0, 5])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(16))


def test_qk_norm_makes_scores_blind_to_the_size_of_the_input() -> None:
    config = resolve_model("modern", **SHAPE, positions="learned")
    layer = CausalSelfAttention(config).eval()
    x = torch.randn(1, 8, 32)
    one, large = layer(x), layer(100 * x)
    torch.testing.assert_close(100 * one, large, atol=1e-2, rtol=1e-2)
    assert F.cosine_similarity(one.flatten(), large.flatten(), dim=0) > 0.999
