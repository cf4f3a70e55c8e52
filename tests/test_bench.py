"""The comparison takes turns, begins both sides from the same weights, and says its numbers. A small fake stands for nanoGPT."""

from pathlib import Path

import pytest
import torch

from harness import bench
from harness.bench import Comparison, OurSide, Shape, compare_speed, draw_batch, render_comparison
from harness.config import ConfigError

SMALL = Shape(2, 2, 16, 8, 4, 32, 2)
# What the comparison needs of nanoGPT's model.py: its names of weights, and its two methods.
FAKE = """
import torch, torch.nn as nn, torch.nn.functional as F
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
def block(d):
    attn = nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d, bias=False), "c_proj": nn.Linear(d, d, bias=False)})
    mlp = nn.ModuleDict({"c_fc": nn.Linear(d, 4 * d, bias=False), "c_proj": nn.Linear(4 * d, d, bias=False)})
    return nn.ModuleDict({"ln_1": nn.LayerNorm(d, bias=False), "attn": attn, "ln_2": nn.LayerNorm(d, bias=False), "mlp": mlp})
class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, d = c, c.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.vocab_size, d), "wpe": nn.Embedding(c.block_size, d),
            "h": nn.ModuleList(block(d) for _ in range(c.n_layer)), "ln_f": nn.LayerNorm(d, bias=False)})
        self.lm_head = nn.Linear(d, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=0.02)
    def forward(self, ids, targets):
        t, (B, T) = self.transformer, ids.shape
        x = t.wte(ids) + t.wpe.weight[:T]
        for b in t.h:
            q, k, v = (p.view(B, T, self.c.n_head, -1).transpose(1, 2) for p in b.attn.c_attn(b.ln_1(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + b.attn.c_proj(y)
            x = x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(b.ln_2(x))))
        logits = self.lm_head(t.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, lr, betas, device):
        matrices, others = ([p for p in self.parameters() if (p.dim() > 1) == m] for m in (True, False))
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
"""


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(FAKE)
    return tmp_path


def test_both_sides_learn_alike_from_the_same_weights_and_batches(nanogpt: Path) -> None:
    ours, theirs = OurSide(SMALL, nanogpt), bench.TheirSide(SMALL, nanogpt)
    for step in range(40):
        if step % 20 == 0:
            scores = [side.score(draw_batch(SMALL, 1000)) for side in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=0.02)
        for side in (ours, theirs):
            side.step(draw_batch(SMALL, step))
    after = [side.score(draw_batch(SMALL, 1000)) for side in (ours, theirs)]
    assert after[0] == pytest.approx(after[1], abs=0.02)
    assert after[0] < scores[0] - 0.01


def test_blocks_are_timed_in_turn_in_two_processes(nanogpt: Path) -> None:
    found = compare_speed(SMALL, nanogpt, n_blocks=3, n_threads=1, n_steps=12)
    assert len(found.ours) == len(found.theirs) == 3
    assert found.n_steps == 12
    assert found.our_loss == pytest.approx(found.their_loss, abs=0.02)
    assert all(ratio > 0 for ratio in found.ratios)


def test_a_comparison_says_median_and_quartiles() -> None:
    found = Comparison([20.0, 30.0, 40.0, 50.0], [10.0] * 4, 400, 1.5, 1.5001)
    row = render_comparison("toy", SMALL, found, 2)
    assert "| 10 | 35 | 3.50 (3.00 to 4.00) | 400: 1.5001, 1.5000 |" in row


def test_batches_are_the_steps_alone() -> None:
    assert torch.equal(draw_batch(SMALL, 3), draw_batch(SMALL, 3))
    assert not torch.equal(draw_batch(SMALL, 3), draw_batch(SMALL, 4))
    assert int(draw_batch(SMALL, 3).max()) < 32


def test_a_folder_without_model_py_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no model\.py; give a checkout of nanoGPT"):
        compare_speed(SMALL, tmp_path, n_blocks=2, n_threads=1, n_steps=2)
