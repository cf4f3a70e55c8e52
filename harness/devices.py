"""What a device could do at most, and how much memory a process took: a cited table for GPUs, a measured product for CPUs.

A peak that is not known stays empty, and with it the MFU.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from harness.accelerators import find_accelerator
from harness.distributed import Ranks, read_device_name

PeakSource = Literal["data sheet", "measured product"]

PRODUCT_WIDTH, PRODUCT_TRIES = 1024, 5
MAX_MEASURE_S = 0.5  # a CPU without fast bf16 is not asked twice


@dataclass(frozen=True)
class Devices:
    """The devices of a run as a yardstick: what all ranks together could do at most, None where that is not known."""

    device: torch.device
    world_size: int
    peak_flops_per_s: float | None
    peak_source: PeakSource | None

    def compute_mfu(self, flops_per_s: float) -> float | None:
        """Return the fraction of the peak that a rate is."""
        return None if self.peak_flops_per_s is None else flops_per_s / self.peak_flops_per_s

    def read_memory_peak(self) -> int | None:
        """Return the most memory held so far by this rank. Units: bytes; on CUDA allocated by torch, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return read_resident_peak()


def open_devices(ranks: Ranks, precision: str) -> Devices:
    """Find the peak of the run's devices at its precision; on a CPU this takes a fraction of a second of products.

    Note: with several ranks on a CPU only rank 0's peak is used, measured with its own threads.
    """
    is_bf16 = precision != "fp32"
    source: PeakSource
    if ranks.device.type == "cuda":
        peak, source = find_peak(read_device_name(ranks.device) or "", is_bf16), "data sheet"
    else:
        peak, source = measure_product(torch.bfloat16 if is_bf16 else torch.float32), "measured product"
    total = None if peak is None else peak * ranks.world_size
    return Devices(ranks.device, ranks.world_size, total, source if peak is not None else None)


def find_peak(device_name: str, is_bf16: bool) -> float | None:
    """Look a GPU up. Units: FLOP/s; None for a GPU that is not in the table, or one whose fp32 products run in TF32."""
    if not is_bf16 and torch.get_float32_matmul_precision() != "highest":
        return None
    found = find_accelerator(device_name)
    if found is None:
        return None
    return found.bf16_flops_per_s if is_bf16 else found.fp32_flops_per_s


def measure_product(dtype: torch.dtype) -> float:
    """Return the best rate of a square product with the threads that torch has now. Units: FLOP/s."""
    a = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype)
    begun, best = time.perf_counter(), float("inf")
    for _ in range(PRODUCT_TRIES):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > MAX_MEASURE_S:
            break
    return 2 * PRODUCT_WIDTH**3 / best


def read_resident_peak() -> int | None:
    """Return the most memory this process has had resident. Units: bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose figure begins with that of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
