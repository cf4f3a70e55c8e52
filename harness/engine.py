"""The torch engine: one process, or DDP where there are several ranks. It defines what correct means.

It knows the weights, the optimiser and the precision, and nothing of data, schedules or files.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config import ConfigError, EngineSection
from harness.distributed import Ranks
from harness.plan import hash_weights
from harness.records import RunRecord, What
from model.gpt import GPT
from model.huggingface import load_weights
from model.parametrization import find_role, scale_eps, scale_lr, scale_weight_decay
from model.size import SizeError
from model.tutorial import Bigram, build_model


class TorchEngine:
    """Model and optimiser of one run.

    A step is `backward` for each micro-step, then `clip`, then `step`.
    """

    def __init__(self, what: What, how: EngineSection, ranks: Ranks, init_from: str | None = None) -> None:
        torch.manual_seed(what.seed)  # on the CPU, so that a seed gives the same weights on every device
        self.model = build_model(what.model)
        if init_from is not None:
            load_weights(self.model, Path(init_from))
        self.model.to(ranks.device)
        self.ranks, self.precision, self.optim = ranks, what.precision, what.optim
        module: nn.Module = self.model
        if ranks.world_size > 1:
            module = DistributedDataParallel(module, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None)
        self.module: nn.Module = torch.compile(module) if how.compile else module  # type: ignore[assignment]
        self.optimizer, self.lr_factors = build_adamw(self.model, what, ranks.device)
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
        for group, factor in zip(self.optimizer.param_groups, self.lr_factors, strict=True):
            group["lr"] = lr * factor
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


def open_engine(run: RunRecord, ranks: Ranks) -> TorchEngine:
    """Build a run's engine, its weights drawn or read from where the run starts.

    Raises:
        ConfigError: the weights to start from are not those of the plan.
    """
    start = run.how.init_from
    if start is not None and hash_weights(start) != run.what.init_sha256:
        raise ConfigError(f"{start}: has changed since the plan; restore it, or plan again")
    try:
        return TorchEngine(run.what, run.how.engine, ranks, start)
    except SizeError as error:
        raise ConfigError(f"model.init_from: {error}") from None


def build_adamw(model: GPT | Bigram, what: What, device: torch.device) -> tuple[torch.optim.AdamW, list[float]]:
    """Build AdamW with decoupled weight decay on matrices (embeddings among them), none on biases and norms.

    Also return each group's factor on the learning rate: 1 but under mup, where matrices learn by their role.
    """
    groups: dict[tuple[bool, float, float, float], list[nn.Parameter]] = {}
    for is_matrix in (True, False):
        for name, parameter in model.named_parameters():
            if (parameter.dim() >= 2) == is_matrix:
                role = find_role(name, parameter.dim())
                decay = what.optim.weight_decay * scale_weight_decay(what.model, role) if is_matrix else 0.0
                eps = what.optim.eps * scale_eps(what.model, name)
                groups.setdefault((is_matrix, scale_lr(what.model, role), decay, eps), []).append(parameter)
    optim, factors = what.optim, [factor for _, factor, _, _ in groups]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay, "eps": eps} for (_, _, decay, eps), parameters in groups.items()],
        lr=optim.lr,
        betas=optim.betas,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, factors


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step: a resumed run draws the masks of an uninterrupted one, with no generator state saved.

    Note: torch.manual_seed does the same and formats three tracebacks for the kinds of device that it finds asleep.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**63
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(mixed)
