"""A peak comes from the table or from a measurement; what neither knows stays empty."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from harness.accelerators import ACCELERATORS
from harness.devices import Devices, find_peak, measure_product, open_devices, read_resident_peak
from harness.distributed import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 836, 60),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("NVIDIA A10G", None, None),
        ("A processor", None, None),
    ],
)
def test_a_gpu_is_known_by_a_word_of_its_name(name: str, bf16: float | None, fp32: float | None) -> None:
    for expected, is_bf16 in ((bf16, True), (fp32, False)):
        assert find_peak(name, is_bf16) == (None if expected is None else pytest.approx(expected * 1e12))


def test_no_name_of_the_table_is_hidden_by_one_before_it() -> None:
    for device in ACCELERATORS:
        assert find_peak(f"NVIDIA {device.name}", False) == device.fp32_flops_per_s
        assert find_peak(f"NVIDIA {device.name}", True) == device.bf16_flops_per_s


def test_products_in_tf32_have_no_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert find_peak("NVIDIA H100", False) is None
    assert find_peak("NVIDIA H100", True) is not None


def test_a_cpu_is_measured_and_two_ranks_have_twice_its_peak() -> None:
    torch.set_num_threads(1)
    assert 1e9 < measure_product(torch.float32) < 1e13
    two = open_devices(Ranks(0, 2, CPU), "bf16_autocast")
    assert two.peak_source == "measured product"
    assert two.peak_flops_per_s is not None
    assert two.compute_mfu(two.peak_flops_per_s / 4) == pytest.approx(0.25)


def test_without_a_peak_there_is_no_mfu() -> None:
    assert Devices(CPU, 1, None, None).compute_mfu(1e12) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_is_this_processs_own_and_its_peak() -> None:
    """Not that of the process that started it, as getrusage has it on Linux; and it stays when memory is let go."""
    script = (
        "from harness.devices import read_resident_peak as peak; before = peak(); held = bytearray(2**27); "
        "full = peak(); del held; print(before, full, peak())"
    )
    held = bytearray(3 * 2**28)  # this process is larger than the one it starts
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    before, full, after = map(int, result.stdout.split())
    own = read_resident_peak()
    assert own is not None
    assert before < len(held) <= own
    assert full - before == pytest.approx(2**27, rel=0.1)
    assert after == pytest.approx(full, rel=0.02)  # the kernel counts in steps
