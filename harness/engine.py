"""The torch engine: one process, or DDP where there are several ranks. It defines what correct means.

It knows the weights, the optimiser and the precision, and nothing of data, schedules or files but its own.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from harness.config import ConfigError, EngineSection
from harness.distributed import Ranks
from harness.optimizer import build_optimizers, set_lr
from harness.plan import hash_weights
from harness.records import RunRecord, What
from model.gpt import GPT
from model.huggingface import load_weights
from model.size import SizeError
from model.tutorial import Bigram, build_model

ENGINE_STATE = "engine.pt"  # the torch engine's file in a checkpoint


class Engine(Protocol):
    """What the loop asks of an engine. A step is `backward` for each micro-step, `clip`, and then `step` or `skip`."""

    model: GPT | Bigram
    ranks: Ranks

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was not applied, since this engine was opened."""
        ...

    def backward(self, ids: Tensor, targets: Tensor, *, micro_step: int, n_micro_steps: int) -> Tensor:
        """Add one micro-step's share of the gradient of the step's mean loss; return that share of the loss."""
        ...

    def clip(self) -> Tensor:
        """Clip the norm over all gradients, of all ranks, where asked for; return the norm before clipping."""
        ...

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""
        ...

    def skip(self) -> None:
        """Forget the gradients without an update, and count it. All ranks must agree to."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which to evaluate the model in this run's precision."""
        ...

    def whole_model(self) -> nn.Module:
        """Return a model with every weight, for export. All ranks must ask; only rank 0's is sure to be whole."""
        ...

    def write_state(self, folder: Path) -> None:
        """Write weights and optimiser state into a folder. All ranks must; each writes files of its own."""
        ...

    def read_state(self, folder: Path) -> None:
        """Take over weights and optimiser state that as many ranks of this engine wrote. All ranks must."""
        ...


class TorchEngine:
    """Model and optimiser of one run."""

    def __init__(self, what: What, how: EngineSection, ranks: Ranks, init_from: str | None = None) -> None:
        self.model = draw_model(what, how, init_from).to(ranks.device)
        self.ranks, self.precision, self.optim, self.skipped_steps = ranks, what.precision, what.optim, 0
        module: nn.Module = self.model
        if ranks.world_size > 1:
            module = DistributedDataParallel(module, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None)
        self.module: nn.Module = torch.compile(module) if how.compile else module  # type: ignore[assignment]
        self.optimizers = build_optimizers(self.model, what, ranks.device)
        self.parameters = list(self.model.parameters())  # found once: to walk the staircase's last model takes 0.12 ms

    def backward(self, ids: Tensor, targets: Tensor, *, micro_step: int, n_micro_steps: int) -> Tensor:
        """Add one micro-step's share of the gradient of the step's mean loss; return that share of the loss.

        Note: DDP averages gradients over ranks once a step, at its last micro-step.
        """
        with self.postpone_sync(micro_step < n_micro_steps - 1), self.autocast():
            loss = self.module(ids, targets)[1] / n_micro_steps
            loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    def clip(self) -> Tensor:
        """Clip the norm over all gradients where asked for; return the norm before clipping."""
        limit = self.optim.grad_clip if self.optim.grad_clip is not None else float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""
        for optimizer in self.optimizers:
            set_lr(optimizer.param_groups, lr)
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Forget the gradients without an update, and count it."""
        self.model.zero_grad(set_to_none=True)
        self.skipped_steps += 1

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of this run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def postpone_sync(self, postpone: bool) -> AbstractContextManager[Any]:
        """Return the context in which DDP keeps gradients to itself."""
        if postpone and isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def whole_model(self) -> nn.Module:
        """Return the model: every rank has every weight."""
        return self.model

    def write_state(self, folder: Path) -> None:
        """Write weights and optimiser state, the same on all ranks, from rank 0."""
        if self.ranks.rank == 0:
            with (folder / ENGINE_STATE).open("wb") as file:  # by its name torch would write it in C++, which hides a full disk
                torch.save(self.state_dict(), file)

    def read_state(self, folder: Path) -> None:
        """Take over weights and optimiser state; no code in the file can run."""
        self.load_state_dict(torch.load(folder / ENGINE_STATE, map_location=self.ranks.device, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimiser state."""
        return {"model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over weights and optimiser state."""
        self.model.load_state_dict(state["model"])
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)


def draw_model(what: What, how: EngineSection, init_from: str | None) -> GPT | Bigram:
    """Build a run's model on the CPU, so that a seed gives the same weights on every device and engine."""
    torch.manual_seed(what.seed)
    model = build_model(what.model)
    if init_from is not None:
        load_weights(model, Path(init_from))
    if how.activation_checkpointing:
        for block in getattr(model, "blocks", ()):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def open_engine(run: RunRecord, ranks: Ranks) -> Engine:
    """Build a run's engine, its weights drawn or read from where the run starts.

    Raises:
        ConfigError: the weights to start from are not those of the plan.
    """
    start, how = run.how.init_from, run.how.engine
    if start is not None and hash_weights(start) != run.what.init_sha256:
        raise ConfigError(f"{start}: has changed since the plan; restore it, or plan again")
    try:
        if how.kind == "deepspeed":
            from harness.deepspeed_engine import DeepSpeedEngine  # here, since deepspeed takes seconds to import

            return DeepSpeedEngine(run.what, how, ranks, start)
        return TorchEngine(run.what, how, ranks, start)
    except SizeError as error:
        raise ConfigError(f"model.init_from: {error}") from None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step: a resumed run draws the masks of an uninterrupted one, with no generator state saved.

    Note: torch.manual_seed does the same and formats three tracebacks for the kinds of device that it finds asleep.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**63
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(mixed)
