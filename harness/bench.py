"""Speed of the model alone, beside nanoGPT's model.py: forward, backward, clip and optimiser step, in turn, on this machine.

Each side is a process of its own, since memory settings hold for a whole process; they take blocks in turn, so that
whatever else the machine does meets both. nanoGPT runs as its documentation says: float32, torch's AdamW, no compile.
"""

import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.allocator import keep_freed_memory
from harness.config import ConfigError, EngineSection
from harness.distributed import Ranks
from harness.engine import TorchEngine
from harness.records import Optim, What
from harness.schedule import Schedule
from model.huggingface import GPT2_BLOCK
from model.size import resolve_model

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0  # nanoGPT's config/train_shakespeare_char.py
N_EVAL_BATCHES = 20


@dataclass(frozen=True)
class Shape:
    """A model and a batch to time."""

    n_layer: int
    n_head: int
    d_model: int
    seq_len: int
    batch_size: int
    vocab_size: int
    block_steps: int  # optimiser steps of one timed block


SHAPES = {
    "toy": Shape(4, 4, 128, 64, 12, 65, 20),  # nanoGPT's README, "I only have a macbook"
    "char": Shape(6, 6, 384, 256, 4, 65, 3),  # the 10.7M character model
    "bpe": Shape(4, 4, 128, 256, 8, 50_304, 2),  # GPT-2's vocabulary, padded
}


def draw_batch(shape: Shape, step: int) -> Tensor:
    """Return the tokens of a step, with something to learn: mostly the token before plus one. Shapes: (B, T + 1)."""
    generator = torch.Generator().manual_seed(step)
    jumps = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len + 1), generator=generator)
    is_jump = torch.rand(jumps.shape, generator=generator) < 0.3
    return torch.where(is_jump, jumps, 1).cumsum(dim=1) % min(shape.vocab_size, 512)


def describe_run(shape: Shape) -> What:
    """Return our side: bfloat16 autocast, the same optimiser."""
    optim = Optim(
        kind="adamw",
        lr=LR,
        betas=BETAS,
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        grad_clip=GRAD_CLIP,
        global_batch_size=shape.batch_size,
    )
    model = resolve_model(
        "nanogpt",
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        d_model=shape.d_model,
        vocab_size=shape.vocab_size,
        seq_len=shape.seq_len,
    )
    return What(
        model=model,
        precision="bf16_autocast",
        data_content_id="",
        seed=0,
        data_seed=0,
        optim=optim,
        schedule=Schedule(kind="constant", n_warmup_steps=0, min_lr_fraction=None),
        eval_stride=shape.seq_len,
        n_steps=1,
    )


def load_nanogpt(folder: Path, shape: Shape) -> Any:  # noqa: ANN401 - somebody else's class
    """Build nanoGPT's model from its model.py, seeded.

    Raises:
        ConfigError: there is no model.py.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").is_file():
        raise ConfigError(f"--nanogpt={folder}: has no model.py; give a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.GPT(
        module.GPTConfig(
            block_size=shape.seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.d_model,
            dropout=0.0,
            bias=False,
        )
    )


class OurSide:
    """Our model and engine, begun from nanoGPT's weights."""

    def __init__(self, shape: Shape, nanogpt: Path) -> None:
        keep_freed_memory()
        self.engine = TorchEngine(describe_run(shape), EngineSection(device="cpu"), Ranks(0, 1, torch.device("cpu")))
        theirs = load_nanogpt(nanogpt, shape).state_dict()
        ours = {"token_embedding.weight": "transformer.wte.weight", "position_embedding.weight": "transformer.wpe.weight"}
        ours |= {"norm.weight": "transformer.ln_f.weight", "head.weight": "lm_head.weight"}
        for index in range(shape.n_layer):
            ours |= {f"blocks.{index}.{a}.weight": f"transformer.h.{index}.{b}.weight" for a, b in GPT2_BLOCK.items()}
        self.engine.model.load_state_dict({name: theirs[their_name] for name, their_name in ours.items()})

    def step(self, tokens: Tensor) -> None:
        """Take one optimiser step."""
        self.engine.backward(tokens[:, :-1], tokens[:, 1:], micro_step=0, n_micro_steps=1)
        self.engine.clip()
        self.engine.step(LR)

    def score(self, tokens: Tensor) -> float:
        """Return the loss of some tokens."""
        with torch.no_grad(), self.engine.autocast():
            return float(self.engine.model(tokens[:, :-1], tokens[:, 1:])[1])


class TheirSide:
    """nanoGPT's model and optimiser, as its train.py uses them on a CPU."""

    def __init__(self, shape: Shape, nanogpt: Path) -> None:
        self.model = load_nanogpt(nanogpt, shape)
        self.optimizer = self.model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cpu")

    def step(self, tokens: Tensor) -> None:
        """Take one optimiser step."""
        loss = self.model(tokens[:, :-1], tokens[:, 1:].contiguous())[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def score(self, tokens: Tensor) -> float:
        """Return the loss of some tokens."""
        with torch.no_grad():
            return float(self.model(tokens[:, :-1], tokens[:, 1:].contiguous())[1])


def serve(side: type[OurSide] | type[TheirSide], shape: Shape, nanogpt: Path, n_threads: int, pipe: Connection) -> None:
    """Take blocks of steps when asked to, and answer with their seconds; asked for 0, answer with the loss."""
    torch.set_num_threads(n_threads)
    worker, step = side(shape, nanogpt), 0
    pipe.send(0.0)
    while (n_steps := pipe.recv()) is not None:
        batches = [draw_batch(shape, step + i) for i in range(n_steps)]
        started = time.perf_counter()
        for tokens in batches:
            worker.step(tokens)
        seconds, step = time.perf_counter() - started, step + n_steps
        losses = [worker.score(draw_batch(shape, 10**6 + i)) for i in range(N_EVAL_BATCHES)] if n_steps == 0 else []
        pipe.send(statistics.mean(losses) if losses else seconds)


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of each block, ours beside theirs, and the losses after the same batches."""

    ours: list[float]
    theirs: list[float]
    n_steps: int
    our_loss: float
    their_loss: float

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, block by block."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]


def compare_speed(shape: Shape, nanogpt: Path, *, n_blocks: int, n_threads: int, n_steps: int) -> Comparison:
    """Time blocks in turn, then bring both to `n_steps` steps and compare losses."""
    if not (nanogpt / "model.py").is_file():
        raise ConfigError(f"--nanogpt={nanogpt}: has no model.py; give a checkout of nanoGPT")
    context, pipes, workers = get_context("spawn"), [], []
    for side in (OurSide, TheirSide):
        pipe, far_end = context.Pipe()
        worker = context.Process(target=serve, args=(side, shape, nanogpt, n_threads, far_end), daemon=True)
        worker.start()
        pipes.append(pipe)
        workers.append(worker)
    for pipe in pipes:
        pipe.recv()

    def ask(index: int, steps: int) -> float:
        pipes[index].send(steps)
        return float(pipes[index].recv())

    speeds: list[list[float]] = [[], []]
    for block in range(n_blocks + 1):
        for index in (0, 1) if block % 2 else (1, 0):
            seconds = ask(index, shape.block_steps)
            if block:  # the first warms up
                speeds[index].append(shape.block_steps * shape.batch_size * shape.seq_len / seconds)
    taken = (n_blocks + 1) * shape.block_steps
    losses = []
    for index in (0, 1):
        if n_steps > taken:
            ask(index, n_steps - taken)
        losses.append(ask(index, 0))
        pipes[index].send(None)
    for worker in workers:
        worker.join()
    return Comparison(speeds[0], speeds[1], max(taken, n_steps), losses[0], losses[1])


def render_comparison(name: str, shape: Shape, found: Comparison, n_threads: int) -> str:
    """Write a comparison as one row in Markdown."""
    ratios = sorted(found.ratios)
    n = len(ratios)
    spread = f"{statistics.median(ratios):.2f} ({ratios[n // 4]:.2f} to {ratios[-1 - n // 4]:.2f})"
    what = f"{shape.n_layer} layers, width {shape.d_model}, block {shape.seq_len}, batch {shape.batch_size}"
    what += f", vocabulary {shape.vocab_size:,}"
    speeds = f"{statistics.median(found.theirs):,.0f} | {statistics.median(found.ours):,.0f}"
    return (
        f"| {name}: {what} | {n_threads} | {speeds} | {spread} | {found.n_steps}: {found.their_loss:.4f}, {found.our_loss:.4f} |"
    )
