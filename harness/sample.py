"""Text from what was trained: load a cell's or a checkpoint's weights, continue a prompt, and show it as it is written."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.tokenizer import load_tokenizer
from harness.checkpoint import find_fault, find_newest
from harness.config import ConfigError
from harness.engine import ENGINE_STATE
from harness.records import RunRecord
from harness.runs import find_cell_dir, is_cell_done, load_run
from model.generate import Draw, iter_tokens
from model.gpt import GPT
from model.huggingface import load_weights
from model.tutorial import Bigram, build_model


def find_trained(source: Path) -> tuple[RunRecord, Path]:
    """Return the run of a folder and the folder of the weights: a finished cell's, or a checkpoint's.

    A run stands for its finished cell with most tokens, or where none is finished for its newest checkpoint.

    Raises:
        ConfigError: it is no run, cell or checkpoint, or nothing was saved there yet.
    """
    here = source.resolve()
    run_dir = next((folder for folder in (here, *here.parents) if (folder / "run.json").is_file()), source)
    run = load_run(run_dir)
    if here.parent.name == "checkpoints":
        fault = find_fault(here)
        if fault is not None:
            raise ConfigError(f"{source}: is not a whole checkpoint ({fault}); give another step of {source.parent}")
        return run, here
    cells = [cell for cell in run.cells if here in (run_dir, find_cell_dir(run_dir, cell))]
    done = [find_cell_dir(run_dir, cell) for cell in cells if is_cell_done(run_dir, cell)]
    if done:
        return run, done[-1]
    folders = [here, *(find_cell_dir(run_dir, cell) for cell in cells)]
    saved = [found for folder in folders if (found := find_newest(folder / "checkpoints", at_most=sys.maxsize))]
    if not saved:
        raise ConfigError(f"{source}: no finished cell and no checkpoint there; python -m launch status shows how far it is")
    return run, max(saved, key=lambda checkpoint: int(checkpoint.name))


def load_trained(source: Path) -> tuple[RunRecord, GPT | Bigram]:
    """Return the run and the trained model of a run's, a cell's or a checkpoint's folder; say so where it is not finished."""
    run, folder = find_trained(source)
    model = build_model(run.what.model).eval()
    if folder.parent.name != "checkpoints":
        load_weights(model, folder / "model.safetensors")
        return run, model
    if folder != source.resolve():
        print(f"{source}: not finished; from its checkpoint at step {int(folder.name):,}", file=sys.stderr)
    if not (folder / ENGINE_STATE).is_file():
        raise ConfigError(
            f'{folder}: engine.kind="deepspeed", its weights lie in parts until the cell is done; sample a finished cell'
        )
    model.load_state_dict(torch.load(folder / ENGINE_STATE, map_location="cpu", weights_only=True)["model"])
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

    Note: Ctrl-C ends the writing, and what is written so far is returned.
    Raises:
        ConfigError: nothing trained there, or an empty prompt.
        DataError: the prompt has a character that the tokenizer does not know.
    """
    run, model = load_trained(source)
    tokenizer = load_tokenizer(Path(run.how.data_dir) / "tokenizer")
    if not prompt:
        raise ConfigError("--prompt='', is empty; give at least one character, such as a line break")
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None].expand(n_samples, -1)
    columns = [ids]
    generator = torch.Generator().manual_seed(seed)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in iter_pieces(iter_tokens(model, ids, n_tokens, draw, generator), columns, tokenizer.decode):
            if show is not None and n_samples == 1:
                show(piece)
    return [tokenizer.decode(row.numpy()) for row in torch.cat(columns, dim=1)]


def iter_pieces(tokens: Iterator[Tensor], columns: list[Tensor], decode: Callable[..., str]) -> Iterator[str]:
    """Collect tokens in `columns` and yield what each adds to the first sample's text.

    Note: a character of several byte tokens is held back until it is whole, or the text ends.
    """
    shown = text = decode(columns[0][0].numpy())
    yield text
    for column in tokens:
        columns.append(column)
        text = decode(torch.cat(columns, dim=1)[0].numpy())
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]
