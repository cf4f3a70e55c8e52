"""Ladders of sizes: published shapes by name, a ladder grown with one dial, depth, and shapes nearest to a count. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.size import ModelConfig, SizeError, count_params, resolve_model

# name: (preset, n_layer, n_head, d_model, vocab_size, seq_len), as published.
PUBLISHED: dict[str, tuple[str, int, int, int, int, int]] = {
    "video-10M": ("video", 6, 6, 384, 65, 256),
    "nanogpt-10M": ("nanogpt", 6, 6, 384, 65, 256),
    "gpt2-124M": ("gpt2", 12, 12, 768, 50_257, 1024),
    "gpt2-350M": ("gpt2", 24, 16, 1024, 50_257, 1024),
    "gpt2-774M": ("gpt2", 36, 20, 1280, 50_257, 1024),
    "gpt2-1.5B": ("gpt2", 48, 25, 1600, 50_257, 1024),
    "gpt3-175B": ("gpt2", 96, 96, 12_288, 50_257, 2048),
}

# A shape that is nearest to a count keeps d_model / n_layer in this range; published GPTs have 33 (1.5B) to 128 (175B).
ASPECTS = (32.0, 128.0)
NEAR = 0.03  # nearer to the count than this is near enough
TENTH = 0.1  # beyond, this far from the count weighs as much as an aspect twice or half the usual one
MAX_LAYERS = 160


@dataclass(frozen=True)
class Rung:
    """A size of the ladder: what was asked for, and what a whole number of layers and heads makes of it."""

    nominal: float
    config: ModelConfig

    @property
    def achieved(self) -> int:
        """Parameters outside the embeddings."""
        return count_params(self.config).n_params_non_embedding

    @property
    def off(self) -> float:
        """The distance from nominal, as a fraction of it."""
        return self.achieved / self.nominal - 1.0


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def published_model(name: str) -> ModelConfig:
    """Build a published model by name.

    Raises:
        SizeError: no such name; the message lists them.
    """
    if name not in PUBLISHED:
        raise SizeError(f"model={name!r}, is not a published size; use one of {', '.join(PUBLISHED)}")
    preset, n_layer, n_head, d_model, vocab_size, seq_len = PUBLISHED[name]
    return resolve_model(preset, n_layer=n_layer, n_head=n_head, d_model=d_model, vocab_size=vocab_size, seq_len=seq_len)


def iter_ladder(
    smallest: float,
    largest: float,
    *,
    preset: str,
    aspect: int,
    d_head: int,
    vocab_size: int,
    seq_len: int,
) -> Iterator[ModelConfig]:
    """Yield the models of depth 1, 2, 3, ... whose non-embedding parameters lie between `smallest` and `largest`.

    Width follows depth: d_model = aspect x n_layer, rounded up to whole heads of width `d_head`, so that the shape stays
    alike while size grows (a constant head count or depth would be a second thing that varies).
    """
    if not 0 < smallest <= largest < float("inf"):
        raise SizeError(f"from={smallest:g}, to={largest:g}: the ladder is empty or endless; use 0 < from <= to")
    n_layer = 1
    while True:
        n_head = max(1, -(-aspect * n_layer // d_head))
        config = resolve_model(
            preset,
            n_layer=n_layer,
            n_head=n_head,
            d_model=n_head * d_head,
            vocab_size=vocab_size,
            seq_len=seq_len,
        )
        size = count_params(config).n_params_non_embedding
        if size > largest:
            return
        if size >= smallest:
            yield config
        n_layer += 1


def iter_rungs(
    smallest: float, largest: float, *, per_decade: int, preset: str, d_head: int | None, vocab_size: int, seq_len: int
) -> Iterator[Rung]:
    """Yield the sizes nearest to evenly spaced counts (in logs) from `smallest` to `largest`, both among them."""
    if not 0 < smallest <= largest < float("inf"):
        raise SizeError(f"from={smallest:g}, to={largest:g}: the ladder is empty or endless; use 0 < from <= to")
    n_steps = max(1, round(per_decade * math.log10(largest / smallest))) if largest > smallest else 0
    for step in range(n_steps + 1):
        nominal = smallest * (largest / smallest) ** (step / n_steps) if n_steps else smallest
        yield Rung(nominal, find_nearest(nominal, preset=preset, d_head=d_head, vocab_size=vocab_size, seq_len=seq_len))


def find_nearest(count: float, *, preset: str, d_head: int | None, vocab_size: int, seq_len: int) -> ModelConfig:
    """Return the shape nearest to `count` parameters outside the embeddings, with an aspect in `ASPECTS`.

    Of the shapes within `NEAR`, the one whose aspect is nearest to a target that grows with size as published models' does;
    a shape farther off must have a so much better aspect (`TENTH`).

    Raises:
        SizeError: no shape has an aspect in the range.
    """
    d_head, target = d_head or choose_d_head(count), choose_aspect(count)
    candidates = []
    for n_layer in range(1, MAX_LAYERS + 1):
        ideal = math.sqrt(count / (12 * n_layer)) / d_head  # heads; a block has about 12 d^2
        for n_head in {max(1, math.floor(ideal)), max(1, math.ceil(ideal))}:
            if ASPECTS[0] <= n_head * d_head / n_layer <= ASPECTS[1]:
                shape = {"n_layer": n_layer, "n_head": n_head, "d_model": n_head * d_head}
                candidates.append(resolve_model(preset, **shape, vocab_size=vocab_size, seq_len=seq_len))
    if not candidates:
        raise SizeError(
            f"{format_count(count)} parameters: no shape with d_head={d_head} has d_model / n_layer between {ASPECTS[0]:g} and "
            f"{ASPECTS[1]:g}; use another d_head"
        )

    def strangeness(config: ModelConfig) -> float:
        off = abs(math.log(count_params(config).n_params_non_embedding / count))
        return max(0.0, off - NEAR) / TENTH + abs(math.log2(config.d_model / config.n_layer / target))

    return min(candidates, key=strangeness)


def choose_d_head(count: float) -> int:
    """Return the usual width of a head at a size: 8 and 16 for toys, 64 as in GPT-2, 128 from a billion on as in GPT-3."""
    return next(d_head for limit, d_head in ((1e5, 8), (1e6, 16), (1e7, 32), (1e9, 64), (math.inf, 128)) if count < limit)


def choose_aspect(count: float) -> float:
    """Return the usual d_model / n_layer at a size: 32 at 10K parameters to 128 at 175B, even in logs."""
    progress = math.log(count / 1e4) / math.log(175e9 / 1e4)
    return float(ASPECTS[0] * (ASPECTS[1] / ASPECTS[0]) ** min(1.0, max(0.0, progress)))


def parse_count(text: str) -> float:
    """Read a count such as 0.01M, 124M, 1.5B or 250_000.

    Raises:
        SizeError: not a count.
    """
    number, unit = text.strip().replace("_", ""), ""
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], number[-1].upper()
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise SizeError(f"{text!r} is not a count; write it like 0.01M, 124M, 1.5B or 250_000") from None


def format_count(count: float) -> str:
    """Write a count with three significant digits and a unit: 10,788,929 -> 10.8M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale * 0.9995:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.3g}"
