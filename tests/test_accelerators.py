"""The table of devices answers in plain units, and a device without bf16 says so."""

import pytest

from harness.accelerators import ACCELERATORS, GIB, find_accelerator
from harness.config import ConfigError


def test_a_row_is_in_plain_units() -> None:
    h100 = find_accelerator("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    assert (h100.peak("bf16_autocast"), h100.peak("fp32"), h100.memory_bytes) == (989e12, 67e12, 80 * GIB)
    assert find_accelerator("h100") == h100
    assert find_accelerator("abacus") is None


def test_fp32_is_never_faster_than_bf16_nor_a_link_than_memory() -> None:
    for device in ACCELERATORS:
        assert device.bf16_flops_per_s is None or device.bf16_flops_per_s > device.fp32_flops_per_s
        assert device.link_bytes_per_s < device.memory_bytes_per_s


def test_without_bf16_a_bf16_run_is_refused() -> None:
    v100 = find_accelerator("Tesla V100-SXM2-16GB")
    assert v100 is not None
    with pytest.raises(ConfigError, match=r'precision="bf16_native", V100 has no bf16; use "fp32" or another device'):
        v100.peak("bf16_native")
