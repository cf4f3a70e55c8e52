"""Text from what was trained: load a cell's or a GPT-2 folder's weights, continue a prompt, and show it as it is written."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.tokenizer import load_tokenizer
from harness.config import ConfigError
from harness.records import RunRecord
from harness.runs import is_cell_done, load_run
from model.generate import Draw, iter_tokens
from model.gpt import GPT
from model.huggingface import load_weights
from model.tutorial import Bigram, build_model


def find_cell(source: Path) -> tuple[RunRecord, Path]:
    """Return the run and the folder of a finished cell, given either; of a run, the finished cell with most tokens.

    Raises:
        ConfigError: it is neither, or nothing is finished there.
    """
    run_dir = source.parent.parent if source.parent.name == "cells" else source
    run = load_run(run_dir)
    done = [cell for cell in run.cells if is_cell_done(run_dir, cell)]
    chosen = [cell.cell_id for cell in done if source in (run_dir, run_dir / "cells" / cell.cell_id)]
    if not chosen:
        raise ConfigError(f"{source}: no finished cell there; python -m launch status shows which are")
    return run, run_dir / "cells" / chosen[-1]


def load_cell_model(source: Path) -> tuple[RunRecord, GPT | Bigram]:
    """Return the run and the trained model of a run's or a finished cell's folder."""
    run, cell_dir = find_cell(source)
    model = build_model(run.what.model).eval()
    load_weights(model, cell_dir / "model.safetensors")
    return run, model


def sample_text(
    source: Path,
    prompt: str,
    n_tokens: int,
    draw: Draw,
    seed: int,
    *,
    n_samples: int = 1,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the prompt and its continuations; `show` is given a single one piece by piece while it is written.

    Raises:
        ConfigError: nothing finished there, or an empty prompt.
        DataError: the prompt has a character that the tokenizer does not know.
    """
    run, model = load_cell_model(source)
    tokenizer = load_tokenizer(Path(run.how.data_dir) / "tokenizer")
    if not prompt:
        raise ConfigError("--prompt='', is empty; give at least one character, such as a line break")
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None].expand(n_samples, -1)
    columns = [ids]
    generator = torch.Generator().manual_seed(seed)
    for piece in iter_pieces(iter_tokens(model, ids, n_tokens, draw, generator), columns, tokenizer.decode):
        if show is not None and n_samples == 1:
            show(piece)
    return [tokenizer.decode(row.numpy()) for row in torch.cat(columns, dim=1)]


def iter_pieces(tokens: Iterator[Tensor], columns: list[Tensor], decode: Callable[..., str]) -> Iterator[str]:
    """Collect tokens in `columns` and yield what each adds to the first sample's text.

    Note: a character of several byte tokens is held back until it is whole.
    """
    shown = len(decode(columns[0][0].numpy()))
    yield decode(columns[0][0].numpy())
    for column in tokens:
        columns.append(column)
        text = decode(torch.cat(columns, dim=1)[0].numpy())
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
