"""Causal self-attention: all heads at once, keys and values remembered where text is written token by token.

Shape letters: B batch, T new positions, S positions attended to, H heads, D width of a head, C width (d_model).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parametrization import scale_attention
from model.size import ModelConfig

DEFAULT_ROPE_THETA = 10_000.0
RMS_EPS = 1e-6


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Mix values by the softmax of queries times keys.

    The rule: bfloat16 on a CPU goes by batched matrix products, everything else by torch's fused kernel (flash on a GPU).
    torch's CPU kernel is slow backwards in bfloat16: 6.6 ms against 0.8 ms at (12, 4, 64, 32).

    Shapes: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_by_matmul(q, k, v, is_causal=is_causal, dropout=dropout, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout, scale=scale)


def attend_by_matmul(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, dropout: float, scale: float | None) -> Tensor:
    """Attend by two batched products with an explicit mask, added inside the first."""
    B, H, T, D = q.shape
    S = k.shape[2]
    mask = torch.zeros((), dtype=q.dtype)
    if is_causal:
        mask = torch.full((T, S), -torch.inf, dtype=q.dtype).triu(1)
    q, k, v = (part.reshape(B * H, -1, D) for part in (q, k, v))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5 if scale is None else scale)  # (B H, T, S)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=q.dtype), dropout)
    return torch.bmm(weights, v).view(B, H, T, D)


class KeyValueCache:
    """The keys and values of one layer for the positions written so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """How many positions are remembered."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions and return all of them."""
        self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
        self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
        return self.keys, self.values


def build_rotation(config: ModelConfig) -> Tensor:
    """Return cosines and sines of every position. Shapes: (2, seq_len, D / 2).

    Source: Su et al. 2021, arXiv 2104.09864; pairs are (i, i + D/2), as in Hugging Face's implementations.
    """
    frequencies = (config.rope_theta or DEFAULT_ROPE_THETA) ** -(torch.arange(0, config.d_head, 2).float() / config.d_head)
    angles = torch.outer(torch.arange(config.seq_len).float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of features by its position's angle. Shapes: x (B, H, T, D), rotation (2, T, D / 2)."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """All heads at once; each position attends to itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.dropout, self.scale = config, config.dropout, scale_attention(config)
        self.qkv = nn.Linear(config.d_model, config.d_model + 2 * config.d_kv, bias=config.qkv_bias)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.proj_dropout = nn.Dropout(config.dropout)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.d_head, eps=RMS_EPS)
            self.k_norm = nn.RMSNorm(config.d_head, eps=RMS_EPS)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C).

        Note: with a cache that is not empty, x is one position, which may see all that is remembered.
        """
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, -1, self.config.d_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(x).split([C, self.config.d_kv, self.config.d_kv], dim=2)
        )
        q, k = self.place(q, k, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        k, v = self.share(k), self.share(v)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, is_causal=k.shape[2] == T, dropout=dropout, scale=self.scale)
        out = out.transpose(1, 2).reshape(B, T, C)
        return self.proj_dropout(self.proj(out))  # type: ignore[no-any-return]

    def place(self, q: Tensor, k: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm queries and keys and turn them by position, where the model does; in float32."""
        dtype = q.dtype
        if self.config.qk_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q.to(dtype), k.to(dtype)

    def share(self, x: Tensor) -> Tensor:
        """Give each query head its keys or values where fewer heads have them."""
        n_shared = self.config.n_head // (self.config.n_kv_head or self.config.n_head)
        return x if n_shared == 1 else x.repeat_interleave(n_shared, dim=1)
