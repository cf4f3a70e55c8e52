"""Text from a finished cell: load its weights and its data's tokenizer, continue a prompt."""

from pathlib import Path

import torch
from safetensors.torch import load_model

from data_prep.tokenizer import load_tokenizer
from harness.config import ConfigError
from harness.records import RunRecord
from harness.runs import is_cell_done, load_run
from model.gpt import GPT


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


def sample_text(source: Path, prompt: str, n_tokens: int, temperature: float, top_k: int | None, seed: int) -> str:
    """Return the prompt and its continuation.

    Raises:
        ConfigError: nothing finished there, or an empty prompt.
        DataError: the prompt has a character that the tokenizer does not know.
    """
    run, cell_dir = find_cell(source)
    tokenizer = load_tokenizer(Path(run.how.data_dir) / "tokenizer")
    if not prompt:
        raise ConfigError("--prompt='', is empty; give at least one character, such as a line break")
    model = GPT(run.what.model).eval()
    load_model(model, str(cell_dir / "model.safetensors"))
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    generator = torch.Generator().manual_seed(seed)
    ids = model.generate(ids, n_tokens, temperature=temperature, top_k=top_k, generator=generator)
    return tokenizer.decode(ids[0].numpy())
