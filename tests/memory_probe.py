"""Measure memory in a process of its own: `python memory_probe.py state` under torchrun, `python memory_probe.py growth SHAPE`.

Prints one JSON object a line; tests/test_estimate.py compares them with the estimates.
"""

import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.allocator import keep_freed_memory
from harness.config import EngineSection
from harness.distributed import Ranks
from harness.engine import TorchEngine
from harness.records import Optim, What
from harness.schedule import Schedule
from model.size import ModelConfig, resolve_model

SMALL = {"n_layer": 4, "n_head": 4, "d_model": 256, "vocab_size": 4096, "seq_len": 64}
# Over a gigabyte of state: parameters x 16 bytes.
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp32": ("fp32", 4, {"n_layer": 9, "n_head": 12, "d_model": 768, "vocab_size": 4096, "seq_len": 512}),
    "autocast": ("bf16_autocast", 8, {"n_layer": 9, "n_head": 12, "d_model": 768, "vocab_size": 4096, "seq_len": 512}),
    "vocabulary": ("fp32", 4, {"n_layer": 13, "n_head": 8, "d_model": 512, "vocab_size": 50_257, "seq_len": 256}),
}


def make_what(model: ModelConfig, precision: Any, batch: int) -> What:
    optim = Optim(kind="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_clip=1.0, global_batch_size=batch)
    return What(
        model=model,
        precision=precision,
        data_content_id="none",
        seed=0,
        data_seed=0,
        optim=optim,
        schedule=Schedule(kind="constant", n_warmup_steps=0, min_lr_fraction=None),
        eval_stride=model.seq_len,
        n_steps=10,
    )


def count_live_bytes() -> int:
    """Add up the storages of every tensor that is alive, each once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        try:
            tensors = [found, found.grad] if isinstance(found, Tensor) and found.is_leaf else [found]
        except (ReferenceError, RuntimeError):
            continue  # a proxy whose object is gone, or a tensor that is half built
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def open_kind(what: What, how: EngineSection, ranks: Ranks) -> Any:
    if how.kind == "torch":
        return TorchEngine(what, how, ranks)
    from harness.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(what, how, ranks)


KEPT: list[Any] = []  # every engine of this process, so that none of their tensors goes while another is measured


def measure_state(kind: Any, stage: int, precision: str) -> None:
    """Print the bytes that live between the backward pass and the update, in the third step."""
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    model, before = resolve_model("nanogpt", **SMALL), count_live_bytes()
    what, how = make_what(model, precision, 2 * ranks.world_size), EngineSection(kind=kind, zero_stage=stage, device="cpu")
    engine = open_kind(what, how, ranks)
    KEPT.append(engine)
    ids = torch.zeros((2, model.seq_len), dtype=torch.int64)
    for _ in range(2):
        engine.backward(ids, ids, micro_step=0, n_micro_steps=1)
        engine.clip()
        engine.step(1e-3)
    engine.backward(ids, ids, micro_step=0, n_micro_steps=1)
    found = count_live_bytes() - before
    KEPT.append([parameter.grad for parameter in engine.model.parameters()])
    if ranks.rank == 0:
        print(json.dumps({"kind": kind, "stage": stage, "precision": precision, "bytes": found}), flush=True)


def measure_growth(shape: str) -> None:
    """Print by how much the resident memory grew over what it was before the model."""
    precision, batch, sizes = SHAPES[shape]
    keep_freed_memory()
    torch.set_num_threads(1)
    warm = torch.ones(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()
    before = read_kib("VmRSS")
    what = make_what(resolve_model("nanogpt", **sizes), precision, batch)
    engine = TorchEngine(what, EngineSection(device="cpu"), Ranks(0, 1, torch.device("cpu")))
    ids = torch.randint(sizes["vocab_size"], (batch, sizes["seq_len"]))
    for _ in range(2):
        engine.backward(ids, ids, micro_step=0, n_micro_steps=1)
        engine.clip()
        engine.step(1e-3)
    print(json.dumps({"shape": shape, "bytes": (read_kib("VmHWM") - before) * 1024}), flush=True)


def read_kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    if sys.argv[1] == "growth":
        measure_growth(sys.argv[2])
    else:
        torch.distributed.init_process_group("gloo")
        measure_state("torch", 0, "fp32")
        for stage in range(4):
            for precision in ("fp32", "bf16_autocast", *(["bf16_native"] if stage else [])):
                measure_state("deepspeed", stage, precision)
