"""The decoder-only GPT of the video and of nanoGPT: pre-norm blocks, learned positions, fused causal self-attention.

One module; the differences between the two are values of `ModelConfig`. Shape letters: B batch, T sequence,
C width (d_model), H heads, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.size import ModelConfig

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


class CausalSelfAttention(nn.Module):
    """All heads at once; each position attends to itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.qkv_bias)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C/H)
            for part in self.qkv(x).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(B, T, C)
        return self.proj_dropout(self.proj(out))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two matrices with an activation between, on each position alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.down(self.activation(self.up(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder-only language model.

    Weights are drawn from torch's global generator: seed it before building, on any device the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw matrices from N(0, init_std), residual projections smaller where `residual_init` is scaled; zero biases.

        Source: Radford et al. 2019, section 2.3 (scaled); the video's script (plain).
        """
        std = self.config.init_std
        scaled = std / math.sqrt(2 * self.config.n_layer) if self.config.residual_init == "scaled" else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=scaled if name.endswith(("proj", "down")) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position.

        Shapes: ids and targets (B, T) int64, T at most seq_len; logits (B, T, V); loss a scalar.
        Units: loss in nats per token, the mean over B x T, computed in fp32.
        """
        T = ids.shape[1]
        if self.config.seq_len < T:
            raise ValueError(f"ids of length {T}, longer than seq_len={self.config.seq_len}; crop them")
        x = self.token_embedding(ids) + self.position_embedding.weight[:T]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        n_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `ids` token by token; the context is cropped to the last seq_len tokens.

        Shapes: ids (B, T) -> (B, T + n_new_tokens).
        Note: temperature 0 takes the likeliest token.
        """
        for _ in range(n_new_tokens):
            logits = self(ids[:, -self.config.seq_len :])[0][:, -1].float()  # (B, V)
            if temperature == 0.0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k is not None and top_k < logits.shape[-1]:
                    cut = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < cut, -torch.inf)
                following = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=generator)
            ids = torch.cat([ids, following], dim=1)
        return ids
