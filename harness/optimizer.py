"""The optimisers: AdamW, or Muon for hidden matrices with AdamW for the rest; and which parameters they treat alike."""

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from harness.records import What
from model.parametrization import find_role, scale_eps, scale_lr, scale_weight_decay

Groups = list[dict[str, Any]]  # torch's parameter groups, with `lr_factor`: what the run's learning rate is multiplied by


def build_optimizers(model: nn.Module, what: What, device: torch.device) -> list[Optimizer]:
    """Build the run's optimisers, decoupled weight decay on matrices (embeddings among them), none on biases and norms.

    Note: Muon's steps are scaled to the size of AdamW's, so that one learning rate and decay serve both.
    Source: Liu et al. 2025, arXiv 2502.16982, section 2.2 (0.2 sqrt(max(rows, columns))).
    """
    if what.optim.kind == "adamw":
        return [build_adamw(model, what, device)]
    hidden = {name for name, parameter in model.named_parameters() if find_role(name, parameter.dim()) == "hidden"}
    groups = [{key: value for key, value in group.items() if key != "eps"} for group in group_parameters(model, what, hidden)]
    muon = Muon(groups, lr=what.optim.lr, adjust_lr_fn="match_rms_adamw")  # its eps is another: it guards a division by a norm
    return [muon, build_adamw(model, what, device, without=hidden)]


def build_adamw(model: nn.Module, what: What, device: torch.device, without: Set[str] = frozenset()) -> AdamW:
    """Build AdamW for every parameter but those named."""
    names = {name for name, _ in model.named_parameters()} - without
    optim, fused = what.optim, device.type in ("cpu", "cuda")
    return AdamW(group_parameters(model, what, names), lr=optim.lr, betas=optim.betas, fused=fused)


def group_parameters(model: nn.Module, what: What, names: Set[str]) -> Groups:
    """Return the named parameters in groups of one weight decay, eps and factor on the learning rate, matrices first.

    The factor is 1 but under mup, where matrices learn by their role.
    """
    groups: dict[tuple[bool, float, float, float], list[nn.Parameter]] = {}
    for is_matrix in (True, False):
        for name, parameter in model.named_parameters():
            if name in names and (parameter.dim() >= 2) == is_matrix:
                role = find_role(name, parameter.dim())
                decay = what.optim.weight_decay * scale_weight_decay(what.model, role) if is_matrix else 0.0
                eps = what.optim.eps * scale_eps(what.model, name)
                groups.setdefault((is_matrix, scale_lr(what.model, role), decay, eps), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "eps": eps, "lr_factor": factor}
        for (_, factor, decay, eps), parameters in groups.items()
    ]


def set_lr(groups: Groups, lr: float) -> None:
    """Give every group its learning rate."""
    for group in groups:
        group["lr"] = lr * group["lr_factor"]
