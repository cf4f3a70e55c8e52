"""The optimisers, and which parameters they treat alike: by matrix or vector, and by mup's role."""

import torch
from torch import nn

from harness.records import What
from model.parametrization import find_role, scale_lr, scale_weight_decay


def build_adamw(model: nn.Module, what: What, device: torch.device) -> tuple[torch.optim.AdamW, list[float]]:
    """Build AdamW with decoupled weight decay on matrices (embeddings among them), none on biases and norms.

    Also return each group's factor on the learning rate: 1 but under mup, where matrices learn by their role.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for is_matrix in (True, False):
        for name, parameter in model.named_parameters():
            if (parameter.dim() >= 2) == is_matrix:
                role = find_role(name, parameter.dim())
                decay = what.optim.weight_decay * scale_weight_decay(what.model, role) if is_matrix else 0.0
                groups.setdefault((is_matrix, scale_lr(what.model, role), decay), []).append(parameter)
    optim, factors = what.optim, [factor for _, factor, _ in groups]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for (_, _, decay), parameters in groups.items()],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, factors
