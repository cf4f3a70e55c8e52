"""Estimates against measurement: state under ZeRO, what autograd keeps, growth of the process; times beside published ones."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from memory_probe import SHAPES, SMALL
from torch import Tensor

import model.head
from harness import estimate, zero
from harness.accelerators import find_accelerator
from harness.estimate import (
    Links,
    Setting,
    count_activation_bytes,
    count_buffers,
    estimate_communication,
    estimate_memory,
    estimate_step,
    find_micro_batch,
)
from model.gpt import GPT
from model.ladder import published_model
from model.size import count_flops, count_params, resolve_model

LINKS = Links(devices_per_node=8, intra_bytes_per_s=450e9, inter_bytes_per_s=400e9)


def test_constants_are_those_of_the_modules_they_describe() -> None:
    assert (estimate.LARGE_VOCAB, estimate.CHUNK_LOGITS) == (model.head.LARGE_VOCAB, model.head.CHUNK_LOGITS)
    assert estimate.BUCKET_ELEMENTS == zero.BUCKET_ELEMENTS


def measure_kept_bytes(network: GPT, precision: str, ids: Tensor) -> int:
    """Add up what autograd keeps for the backward pass, parameters and targets aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()} | {ids.untyped_storage().data_ptr()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its place is not used again
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        network(ids, ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("nanogpt", {}),
        ("gpt2", {}),
        ("video", {}),
        ("nanogpt", {"n_layer": 6, "d_ff": 512}),
        ("modern", {"norm": "layernorm"}),
        ("modern", {"norm": "layernorm", "n_kv_head": 2, "qk_norm": None}),
    ],
)
def test_activations_are_what_autograd_keeps(preset: str, options: dict[str, Any], precision: str) -> None:
    shape = {"n_layer": 3, "n_head": 4, "d_model": 128, "vocab_size": 64, "seq_len": 64}
    config = resolve_model(preset, **(shape | options))
    torch.manual_seed(0)
    ids = torch.randint(64, (8, 64))
    found = measure_kept_bytes(GPT(config), precision, ids)
    log_p = 4 * 64 * ids.numel()
    copies = 2 * count_params(config).n_params_matmul if precision != "fp32" else 0
    expected = ids.numel() * count_activation_bytes(config, Setting(precision, 8, on_cuda=False)) + log_p + copies
    assert expected == pytest.approx(found, rel=0.12)


def test_without_ranks_to_share_with_zero_saves_nothing_and_with_them_each_stage_saves_more() -> None:
    config = published_model("gpt2-1.5B")
    n = count_params(config).n_params
    alone = Setting("bf16_native", 1, kind="deepspeed", zero_stage=3)
    assert estimate_memory(config, alone).state == pytest.approx(18 * n, rel=0.01)
    states = [estimate_memory(config, replace(alone, zero_stage=stage, world_size=64)).state / n for stage in (1, 2, 3)]
    assert states == [pytest.approx(8 + 12 / 64), pytest.approx(2 + 16 / 64), pytest.approx(18 / 64, rel=0.02)]


def test_checkpointing_and_smaller_micro_batches_save_memory() -> None:
    config, h100 = published_model("gpt2-1.5B"), find_accelerator("H100")
    assert h100 is not None
    setting = Setting("bf16_autocast", 16)
    peak = estimate_memory(config, setting).peak
    assert estimate_memory(config, replace(setting, activation_checkpointing=True)).peak < 0.6 * peak
    assert estimate_memory(config, replace(setting, micro_batch_size=4)).peak < 0.6 * peak
    largest = find_micro_batch(config, setting, h100.memory_bytes, 512)
    assert largest is not None
    assert 512 % largest == 0
    fits = [
        estimate_memory(config, replace(setting, micro_batch_size=size, n_micro_steps=512 // size)).peak
        for size in (largest, 2 * largest)
    ]
    assert fits[0] <= estimate.USABLE_MEMORY * h100.memory_bytes < fits[1]
    assert find_micro_batch(published_model("gpt3-175B"), setting, h100.memory_bytes, 512) is None


def test_communication_goes_by_stage_micro_steps_and_the_slowest_link() -> None:
    config = published_model("gpt2-124M")
    setting = Setting("bf16_autocast", 8, 4, kind="deepspeed", world_size=8)
    once = 4 * count_params(config).n_params * 7 / 8 / 450e9
    times = [estimate_communication(config, replace(setting, zero_stage=stage), LINKS) / once for stage in range(4)]
    assert times == [pytest.approx(2), pytest.approx(2), pytest.approx(5), pytest.approx(12)]
    assert estimate_communication(config, replace(setting, world_size=1), LINKS) == 0
    far = replace(LINKS, inter_bytes_per_s=50e9)
    assert estimate_communication(config, setting, far) == estimate_communication(config, setting, LINKS)
    two_nodes = replace(setting, world_size=16)
    assert estimate_communication(config, two_nodes, far) == pytest.approx(
        9 * 15 / 14 * estimate_communication(config, setting, LINKS)
    )


# Tokens per second and device: what was published, on what, with how many sequences (BENCHMARKS.md names the sources).
PUBLISHED = [
    ("gpt2-124M", "A100", 64, 218e3),
    ("gpt2-350M", "A100", 32, 80e3),
    ("gpt2-774M", "A100", 16, 38.6e3),
    ("gpt2-1.5B", "H100", 16, 46.8e3),
    ("gpt2-124M", "H100", 64, 462e3),
]


@pytest.mark.parametrize(("name", "device", "micro_batch_size", "published"), PUBLISHED)
def test_the_roofline_is_near_published_throughputs(name: str, device: str, micro_batch_size: int, published: float) -> None:
    config, accelerator = published_model(name), find_accelerator(device)
    assert accelerator is not None
    setting = Setting("bf16_autocast", micro_batch_size, 524_288 // 8 // 1024 // micro_batch_size, world_size=8, compile=True)
    step = estimate_step(config, setting, accelerator, LINKS)
    tokens = setting.micro_batch_size * setting.n_micro_steps * config.seq_len
    assert tokens / step.step_s == pytest.approx(published, rel=0.25)
    flops_per_s = count_flops(config).flops_per_token * tokens / step.step_s
    assert 0.3 < flops_per_s / accelerator.peak("bf16_autocast") < 0.7


@pytest.mark.slow
def test_state_is_what_lives_between_backward_and_update() -> None:
    """Two ranks on gloo, every stage and precision, in one process group."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "tests/memory_probe.py",
        "state",
    ]
    rows = run_probe(command)
    assert len(rows) == 12
    for row in rows:
        setting = Setting(row["precision"], 2, kind=row["kind"], zero_stage=row["stage"], world_size=2, on_cuda=False)
        config = resolve_model("nanogpt", **SMALL)
        expected = estimate_memory(config, setting).state
        if row["stage"] == 3:  # its bucket is there from the start
            expected += estimate.BUCKET_ELEMENTS * (2 if row["precision"] == "bf16_native" else 4)
            assert count_buffers(config, setting) > estimate.BUCKET_ELEMENTS
        assert expected == pytest.approx(row["bytes"], rel=0.02), row


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_process_grows_by_what_was_estimated(shape: str) -> None:
    precision, batch, sizes = SHAPES[shape]
    config = resolve_model("nanogpt", **sizes)
    memory = estimate_memory(config, Setting(precision, batch, on_cuda=False))
    assert memory.state > 1e9
    (row,) = run_probe([sys.executable, "tests/memory_probe.py", "growth", shape])
    assert memory.peak == pytest.approx(row["bytes"], rel=0.2)


def run_probe(command: list[str]) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
