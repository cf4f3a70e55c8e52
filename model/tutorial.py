"""The video's way to the GPT, one model a stage, to be read beside it: "Let's build GPT", from the bigram to layer norm.

Written plainly, shapes in comments, the mask explicit; gpt.py's fused attention is tested against `Head`. The video's
names are ours (README): block_size is seq_len, n_embd is d_model. Weights begin as torch draws them, as there.
Shape letters: B batch, T positions, C width (d_model), D width of a head, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.generate import Draw, iter_tokens
from model.gpt import GPT
from model.size import BLOCK_STAGES, STAGES, ModelConfig


class Bigram(nn.Module):
    """Each token looks up the logits of the next one in a table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.vocab_size if config.stage == "bigram" else config.d_model)

    def predict(self, ids: Tensor) -> Tensor:
        """Map token ids to the logits of what follows. Shapes: (B, T) -> (B, T, V)."""
        return self.token_embedding(ids)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits, and where targets are given the loss. Units: nats per token."""
        logits = self.predict(ids)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def build_caches(self) -> None:
        """Remember nothing: the whole context is computed anew for each token, as in the video."""

    def predict_next(self, ids: Tensor, caches: object = None) -> Tensor:
        """Return the logits of the token that follows. Shapes: (B, T) -> (B, V)."""
        return self.predict(ids)[:, -1]

    def generate(self, ids: Tensor, n_new_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """Continue `ids` token by token. Shapes: (B, T) -> (B, T + n_new_tokens)."""
        return torch.cat([ids, *iter_tokens(self, ids, n_new_tokens, Draw(), generator)], dim=1)


class Head(nn.Module):
    """One head of self-attention: what each position looks for, what it has, and what it gives away."""

    def __init__(self, config: ModelConfig, d_head: int) -> None:
        super().__init__()
        self.key = nn.Linear(config.d_model, d_head, bias=False)
        self.query = nn.Linear(config.d_model, d_head, bias=False)
        self.value = nn.Linear(config.d_model, d_head, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("tril", torch.ones(config.seq_len, config.seq_len).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, D)."""
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, D)
        T, D = k.shape[1:]
        weights = q @ k.transpose(-2, -1) * D**-0.5  # (B, T, T); without the factor the softmax begins too sharp
        weights = weights.masked_fill(self.get_buffer("tril")[:T, :T] == 0, float("-inf"))  # nobody sees the future
        weights = self.dropout(F.softmax(weights, dim=-1))
        return weights @ v  # type: ignore[no-any-return]


class MultiHead(nn.Module):
    """Several heads side by side; from the stage `blocks` on, a projection back into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(config, config.d_head) for _ in range(config.n_head))
        self.proj = nn.Linear(config.d_model, config.d_model) if config.stage in BLOCK_STAGES else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        out = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)
        return self.dropout(self.proj(out))  # type: ignore[no-any-return]


def build_feed_forward(config: ModelConfig) -> nn.Module:
    """Build the MLP: one matrix at first; four times as wide inside, with a projection back, from `blocks` on."""
    d_model = config.d_model
    if config.stage not in BLOCK_STAGES:
        return nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU())
    inner = nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model)
    return nn.Sequential(*inner, nn.Dropout(config.dropout))


class AttentionModel(Bigram):
    """Tokens and positions are embedded, attend, and where the stage has it each thinks for itself: `head` to `feed_forward`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.seq_len, config.d_model)
        self.body = self.build_body()
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def build_body(self) -> nn.Module:
        """Build what stands between embedding and head."""
        attention = Head(self.config, self.config.d_model) if self.config.stage == "head" else MultiHead(self.config)
        if self.config.stage == "feed_forward":
            return nn.Sequential(attention, build_feed_forward(self.config))
        return attention

    def predict(self, ids: Tensor) -> Tensor:
        """Map token ids to the logits of what follows. Shapes: (B, T) -> (B, T, V)."""
        T = ids.shape[1]
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(T, device=ids.device))  # (B, T, C)
        return self.head(self.body(x))  # type: ignore[no-any-return]


class VideoBlock(nn.Module):
    """Communication, then computation, each added to what was there; from `layer_norm` on each normed before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        has_norm = config.stage == "layer_norm"
        self.attention, self.feed_forward = MultiHead(config), build_feed_forward(config)
        self.norm_1 = nn.LayerNorm(config.d_model) if has_norm else nn.Identity()
        self.norm_2 = nn.LayerNorm(config.d_model) if has_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))  # type: ignore[no-any-return]


class BlockModel(AttentionModel):
    """Several blocks, and under `layer_norm` a last norm before the head."""

    def build_body(self) -> nn.Module:
        """Stack the blocks."""
        last = [nn.LayerNorm(self.config.d_model)] if self.config.stage == "layer_norm" else []
        return nn.Sequential(*(VideoBlock(self.config) for _ in range(self.config.n_layer)), *last)


def build_model(config: ModelConfig) -> GPT | Bigram:
    """Build what the configuration names: the GPT, or a stage on the way to it."""
    if config.stage is None:
        return GPT(config)
    if config.stage == "bigram":
        return Bigram(config)
    return BlockModel(config) if STAGES.index(config.stage) >= STAGES.index("blocks") else AttentionModel(config)
