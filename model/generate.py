"""Text from a model, token by token: draw the next one, and remember what was computed for those before."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import KeyValueCache
from model.size import ModelConfig


@dataclass(frozen=True)
class Draw:
    """How a token is drawn: temperature 0 takes the likeliest; top_k and top_p leave only likely ones in."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Predictor(Protocol):
    """What can be asked for the logits of the next token."""

    config: ModelConfig

    def predict_next(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor: ...
    def build_caches(self) -> list[KeyValueCache] | None: ...


def draw_token(logits: Tensor, draw: Draw, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token for each row. Shapes: (B, V) -> (B, 1).

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p: the smallest set with at least that probability).
    """
    logits = logits.float()
    if draw.temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / draw.temperature  # the likeliest at 0: none too large to hold
    if draw.top_k is not None and draw.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(draw.top_k).values[:, -1:], -torch.inf)
    if draw.top_p is not None and draw.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        likely = F.softmax(ordered, dim=-1)
        before = likely.cumsum(dim=-1) - likely  # probability of the likelier ones
        is_out = before >= draw.top_p
        is_out[:, 0] = False  # the likeliest stays, whatever top_p is
        logits = logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)


@torch.no_grad()
def iter_tokens(
    model: Predictor,
    ids: Tensor,
    n_new_tokens: int,
    draw: Draw,
    generator: torch.Generator | None = None,
    *,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the tokens that follow `ids`, one column at a time; the context is cropped to the last seq_len tokens.

    Shapes: ids (B, T); each yield (B, 1).
    Note: once the context is full, every position moves at each token and nothing remembered holds: it is computed anew.
    """
    seq_len = model.config.seq_len
    caches = model.build_caches() if use_cache else None
    for _ in range(n_new_tokens):
        if caches is not None and ids.shape[1] <= seq_len:
            logits = model.predict_next(ids if caches[0].length == 0 else ids[:, -1:], caches)
        else:
            logits = model.predict_next(ids[:, -seq_len:])
        following = draw_token(logits, draw, generator)
        ids = torch.cat([ids, following], dim=1)
        yield following
