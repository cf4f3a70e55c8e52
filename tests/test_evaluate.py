"""The validation pass scores every token once, whatever the stride and batch size."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.shards import TokenShards
from harness.distributed import Ranks
from harness.evaluate import evaluate
from model.gpt import GPT
from model.size import resolve_model

SEQ_LEN = 8


def build_engine() -> SimpleNamespace:
    """A whole small stand-in: a real model, fp32, one rank."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "d_model": 8, "vocab_size": 11, "seq_len": SEQ_LEN, "init_std": 0.5}
    model = GPT(resolve_model("nanogpt", **shape))
    ranks = Ranks(0, 1, torch.device("cpu"))
    return SimpleNamespace(model=model, ranks=ranks, autocast=torch.enable_grad)


def score_one_by_one(model: GPT, tokens: np.ndarray, stride: int) -> float:
    """Score target after target, each in the window that should score it."""
    ids, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for target in range(1, len(ids)):
        window = 0 if target <= SEQ_LEN else -(-(target - SEQ_LEN) // stride)
        start = window * stride
        logits = model(ids[None, start:target])[0][0, -1]
        total += F.cross_entropy(logits, ids[target]).item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 40, 41, 47])
@pytest.mark.parametrize("stride", [8, 5, 1])
def test_every_target_is_scored_once_with_the_context_it_should_have(n_tokens: int, stride: int) -> None:
    engine = build_engine()
    tokens = np.random.default_rng(0).integers(0, 11, n_tokens).astype(np.uint16)
    with torch.no_grad():
        expected = score_one_by_one(engine.model, tokens, stride)
    for batch_size in (1, 3, 64):
        val_loss = evaluate(engine, TokenShards([tokens]), seq_len=SEQ_LEN, stride=stride, batch_size=batch_size)
        assert val_loss == pytest.approx(expected, rel=1e-5)
    assert engine.model.training


def test_the_pass_is_deterministic(data_dir: Path) -> None:
    engine, val = build_engine(), TokenShards.open(data_dir, "val")
    losses = {evaluate(engine, val, seq_len=SEQ_LEN, stride=SEQ_LEN, batch_size=16) for _ in range(2)}
    assert len(losses) == 1
