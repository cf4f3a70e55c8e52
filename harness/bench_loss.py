"""Peak memory and time of the loss over a large vocabulary: in chunks, and with all logits held."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.devices import read_resident_peak
from model.head import score_in_chunks

N_TIMES = 5


def measure_loss(n_positions: int, d_model: int, vocab_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for either way, forward and backward in bf16 autocast: least seconds and peak memory.

    Note: on a CPU the peak is the process's, so the frugal way comes first.
    """
    weight = torch.randn(vocab_size, d_model, device=device, requires_grad=True)
    x = torch.randn(n_positions, d_model, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (n_positions,), device=device)

    def plain() -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), targets)

    def in_chunks() -> Tensor:
        return score_in_chunks(x, weight, None, targets)

    rows = []
    for name, loss in (("in chunks", in_chunks), ("all logits", plain)):
        seconds: list[float] = []
        for _ in range(N_TIMES):
            started = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            x.grad = weight.grad = None
            float(value.detach())  # waits for the device
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else read_resident_peak()
        rows.append({"loss": name, "n_positions": n_positions, "d_model": d_model, "vocab_size": vocab_size})
        rows[-1] |= {"seconds": min(seconds), "memory_peak_bytes": peak}
    return rows
