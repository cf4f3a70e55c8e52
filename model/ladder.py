"""Ladders of sizes: published shapes by name, and a ladder grown with one dial, depth. No torch."""

from collections.abc import Iterator

from model.size import ModelConfig, SizeError, count_params, resolve_model

# name: (preset, n_layer, n_head, d_model, vocab_size, seq_len), as published.
PUBLISHED: dict[str, tuple[str, int, int, int, int, int]] = {
    "video-10M": ("video", 6, 6, 384, 65, 256),
    "nanogpt-10M": ("nanogpt", 6, 6, 384, 65, 256),
    "gpt2-124M": ("gpt2", 12, 12, 768, 50_257, 1024),
    "gpt2-350M": ("gpt2", 24, 16, 1024, 50_257, 1024),
    "gpt2-774M": ("gpt2", 36, 20, 1280, 50_257, 1024),
    "gpt2-1.5B": ("gpt2", 48, 25, 1600, 50_257, 1024),
}

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
