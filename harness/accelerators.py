"""What devices can do at most, from their data sheets: arithmetic, memory, links. One table for forecasts and MFU. No torch."""

import re
from dataclasses import dataclass

from harness.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of device. Units: FLOP/s without sparsity, bytes, bytes per second (a link: per device, one way)."""

    name: str
    bf16_flops_per_s: float | None  # with sums in fp32; None: no bf16
    fp32_flops_per_s: float  # plain fp32, no TF32
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float

    def peak(self, precision: str) -> float:
        """Return the arithmetic peak at a precision.

        Raises:
            ConfigError: the device does not have it.
        """
        if precision == "fp32":
            return self.fp32_flops_per_s
        if self.bf16_flops_per_s is None:
            raise ConfigError(f'precision="{precision}", {self.name} has no bf16; use "fp32" or another device')
        return self.bf16_flops_per_s


def describe(name: str, bf16: float | None, fp32: float, memory_gib: float, memory_tb_per_s: float, link: float) -> Accelerator:
    """Take a row of the table out of the data sheets' units: TFLOP/s, GiB, TB/s, GB/s."""
    bf16_flops = None if bf16 is None else bf16 * 1e12
    return Accelerator(name, bf16_flops, fp32 * 1e12, memory_gib * GIB, memory_tb_per_s * 1e12, link * 1e9)


# After NVIDIA's data sheets and architecture whitepapers, figures "with sparsity" halved, links one way; not every figure was
# looked up again, so check the row of your device. A device is found by a word of the name that torch gives it; the first match
# counts, so the narrower names stand first.
ACCELERATORS = (
    describe("B200", 2250, 75, 180, 8.0, 900),
    describe("GH200", 989, 67, 96, 4.0, 450),
    describe("H200 NVL", 836, 60, 141, 4.8, 450),
    describe("H200", 989, 67, 141, 4.8, 450),
    describe("H100 NVL", 835, 60, 94, 3.9, 300),
    describe("H100 PCIe", 756, 51, 80, 2.0, 32),
    describe("H100", 989, 67, 80, 3.35, 450),  # SXM: "NVIDIA H100 80GB HBM3"
    describe("A100", 312, 19.5, 80, 2.039, 300),  # SXM, 80 GB
    describe("A40", 149.7, 37.4, 48, 0.696, 32),
    describe("A30", 165, 10.3, 24, 0.933, 32),
    describe("A10", 125, 31.2, 24, 0.6, 32),
    describe("L40S", 362, 91.6, 48, 0.864, 32),
    describe("L40", 181, 90.5, 48, 0.864, 32),
    describe("L4", 121, 30.3, 24, 0.3, 32),
    describe("RTX 6000 Ada", 364.2, 91.1, 48, 0.96, 32),
    describe("RTX A6000", 154.8, 38.7, 48, 0.768, 32),
    describe("RTX 4090", 165.2, 82.6, 24, 1.008, 32),
    describe("RTX 3090", 71, 35.6, 24, 0.936, 32),
    describe("V100", None, 15.7, 32, 0.9, 150),
    describe("T4", None, 8.1, 16, 0.32, 16),
    # One thread of a server CPU: products of 1,024 on an AMD EPYC (BENCHMARKS.md); memory: what a run may take.
    describe("CPU", 0.2, 0.09, 4, 0.02, 5),
)


def find_accelerator(device_name: str) -> Accelerator | None:
    """Look a device up by a word of its name, in any case; None where the table does not know it."""
    for accelerator in ACCELERATORS:
        if re.search(rf"\b{accelerator.name}\b", device_name, flags=re.IGNORECASE):
            return accelerator
    return None
