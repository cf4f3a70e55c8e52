"""From the residual stream to the next token: logits, or straight to the loss where the vocabulary is large.

At a vocabulary of 50,257 the logits of a batch are the largest tensor of a step. `ChunkedLoss` works on a few rows at a
time, takes loss and gradient in one go, and keeps no logits; on a CPU it takes as long as the plain loss.
Shape letters: n positions, C width (d_model), V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.parametrization import scale_output
from model.size import ModelConfig

LARGE_VOCAB = 16_384  # from here on the loss is taken in chunks; below, the logits are no burden
CHUNK_LOGITS = 2**25  # logits at a time: 128 MiB in float32; on a CPU any size from 2**24 to 2**27 was as fast


class Head(nn.Linear):
    """The last matrix. The rows that pad the vocabulary are never seen from outside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, config.n_vocab_rows, bias=config.head_bias)
        self.vocab_size, self.scale = config.vocab_size, scale_output(config)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits, or with targets the mean loss in chunks. Shapes: x (..., C), targets (...) -> (..., V) or a scalar."""
        if targets is not None:
            weight, bias = self.weight[: self.vocab_size], None if self.bias is None else self.bias[: self.vocab_size]
            return score_in_chunks(x.flatten(0, -2), weight, bias, targets.flatten(), self.scale)
        logits = super().forward(x)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits[..., : self.vocab_size]


def score_in_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float = 1.0, chunk_logits: int | None = None
) -> Tensor:
    """Return the mean cross-entropy of scale * (x W^T + b), in nats, without ever holding all logits.

    Shapes: x (n, C), weight (V, C), bias (V,), targets (n,).
    Note: matrix products as autocast has them; `chunk_logits` at a time, CHUNK_LOGITS where not given.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = max(1, (chunk_logits or CHUNK_LOGITS) // len(weight))
    with torch.autocast(device, enabled=False):
        return ChunkedLoss.apply(x, weight, bias, targets, scale, dtype, rows)  # type: ignore[no-any-return, no-untyped-call]


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy whose gradient is made beside it, chunk by chunk, while the chunk's logits are at hand.

    Source: the idea of taking both in the forward pass is Liger Kernel's (Hsu et al. 2024, arXiv 2410.10989).
    Note: between forward and backward it holds a float32 copy of the gradient of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        """Sum the loss over chunks of `rows` positions; matrix products in `dtype`, everything else in float32."""
        low_x, low_weight, low_bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(low_x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(x), rows):
            chunk, wanted = low_x[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(chunk, low_weight, low_bias)
            if scale != 1.0:
                logits = logits * scale
            log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= log_p.gather(1, wanted).sum()
            if any(ctx.needs_input_grad):
                grad = log_p.exp_().scatter_add_(1, wanted, log_p.new_full((), -1.0).expand_as(wanted)).to(dtype)
                torch.mm(grad, low_weight, out=grad_x[start : start + rows])
                grad_weight += grad.T @ chunk
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.factor, ctx.dtypes = scale / len(x), (x.dtype, weight.dtype)
        return total / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Scale what the forward pass has left."""
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        factor, (x_dtype, weight_dtype) = grad_loss * ctx.factor, ctx.dtypes
        found_bias = None if grad_bias is None else (grad_bias * factor).to(weight_dtype)
        found = (grad_x.float() * factor).to(x_dtype), (grad_weight * factor).to(weight_dtype), found_bias
        return *found, None, None, None, None
