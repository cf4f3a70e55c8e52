"""The decoder-only GPT, from the video's and nanoGPT's to today's open models: pre-norm blocks around one residual stream.

One module; the differences between them are values of `ModelConfig`. Shape letters: B batch, T sequence,
C width (d_model), V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import RMS_EPS, CausalSelfAttention, KeyValueCache, build_rotation
from model.generate import Draw, iter_tokens
from model.head import LARGE_VOCAB, Head
from model.parametrization import find_role, scale_init, scale_residual
from model.size import ModelConfig

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


class MLP(nn.Module):
    """Two matrices with an activation between, on each position alone; under SwiGLU a third that gates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        self.up = nn.Linear(config.d_model, config.d_mlp * (2 if self.is_gated else 1), bias=config.bias)
        self.activation = nn.SiLU() if self.is_gated else ACTIVATIONS[config.activation]
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if self.is_gated:
            gate, x = self.up(x).chunk(2, dim=-1)
            return self.dropout(self.down(self.activation(gate) * x))  # type: ignore[no-any-return]
        return self.dropout(self.down(self.activation(self.up(x))))  # type: ignore[no-any-return]


def build_norm(config: ModelConfig) -> nn.Module:
    """Build the norm of the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=RMS_EPS)
    return nn.LayerNorm(config.d_model, bias=config.bias)


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = build_norm(config)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = build_norm(config)
        self.mlp = MLP(config)
        self.scale = scale_residual(config)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if self.scale == 1.0:
            x = x + self.attention(self.norm_1(x), rotation, cache)
            return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]
        x = x + self.scale * self.attention(self.norm_1(x), rotation, cache)
        return x + self.scale * self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder-only language model.

    Weights are drawn from torch's global generator: seed it before building, on any device the same.
    """

    rotation: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.n_vocab_rows, config.d_model)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.seq_len, config.d_model)
        self.register_buffer("rotation", build_rotation(config) if config.positions == "rotary" else None, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = build_norm(config)
        self.head = Head(config)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw matrices from N(0, init_std), residual projections smaller where `residual_init` is scaled; zero biases.

        Source: Radford et al. 2019, section 2.3 (scaled); the video's script (plain).
        Note: where depth is scaled by mup, the projections start as at the base depth.
        """
        config, std = self.config, self.config.init_std
        depth = config.base_n_layer or config.n_layer
        scaled = std / math.sqrt(2 * depth) if config.residual_init == "scaled" else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                factor = scale_init(config, find_role(name, module.weight.dim()))
                nn.init.normal_(module.weight, std=(scaled if name.endswith(("proj", "down")) else std) * factor)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Map token ids (B, T) to what the head reads (B, T, C); with caches, ids are those not yet remembered."""
        start = caches[0].length if caches else 0
        end = start + ids.shape[1]
        if self.config.seq_len < end:
            raise ValueError(f"ids of length {end}, longer than seq_len={self.config.seq_len}; crop them")
        x = self.token_embedding(ids)
        if self.config.positions == "learned":
            x = x + self.position_embedding.weight[start:end]
        rotation = self.rotation[:, start:end] if self.rotation is not None else None
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, caches[index] if caches else None)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Predict the next token at every position.

        Shapes: ids and targets (B, T) int64, T at most seq_len; logits (B, T, V); loss a scalar.
        Units: loss in nats per token, the mean over B x T, computed in fp32.
        Note: with targets and a large vocabulary there are no logits to return.
        """
        x = self.encode(ids)
        if targets is not None and self.config.vocab_size >= LARGE_VOCAB:
            return None, self.head(x, targets)
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def build_caches(self) -> list[KeyValueCache]:
        """Return an empty memory for each block."""
        return [KeyValueCache() for _ in self.blocks]

    def predict_next(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Return the logits of the token that follows. Shapes: (B, T) -> (B, V)."""
        return self.head(self.encode(ids, caches)[:, -1])  # type: ignore[no-any-return]

    def generate(
        self,
        ids: Tensor,
        n_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue `ids` token by token; the context is cropped to the last seq_len tokens.

        Shapes: ids (B, T) -> (B, T + n_new_tokens).
        Note: temperature 0 takes the likeliest token.
        """
        draw = Draw(temperature, top_k, top_p)
        return torch.cat([ids, *iter_tokens(self, ids, n_new_tokens, draw, generator, use_cache=use_cache)], dim=1)
