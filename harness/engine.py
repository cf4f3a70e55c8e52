"""The torch engine: one process, or DDP where there are several ranks. It defines what correct means.

It knows the weights, the optimiser and the precision, and nothing of data, schedules or files.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config import EngineSection
from harness.distributed import Ranks
from harness.records import What
from model.gpt import GPT


class TorchEngine:
    """Model and optimiser of one run.

    A step is `backward` for each micro-step, then `clip`, then `step`.
    """

    def __init__(self, what: What, how: EngineSection, ranks: Ranks) -> None:
        torch.manual_seed(what.seed)  # on the CPU, so that a seed gives the same weights on every device
        self.model = GPT(what.model).to(ranks.device)
        self.ranks, self.precision, self.optim = ranks, what.precision, what.optim
        module: nn.Module = self.model
        if ranks.world_size > 1:
            module = DistributedDataParallel(module, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None)
        self.module: nn.Module = torch.compile(module) if how.compile else module  # type: ignore[assignment]
        self.optimizer = build_adamw(self.model, what, ranks.device)

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
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

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

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimiser state."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over weights and optimiser state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_adamw(model: GPT, what: What, device: torch.device) -> torch.optim.AdamW:
    """Build AdamW with decoupled weight decay on matrices (embeddings among them), none on biases and norms."""
    named = list(model.parameters())
    groups = [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": what.optim.weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optim = what.optim
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=device.type in ("cpu", "cuda"))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step: a resumed run draws the masks of an uninterrupted one, with no generator state saved."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**63
    torch.manual_seed(mixed)
