"""The ranks of one run: who am I, how many are we, and the few things that all must agree on."""

import gc
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from harness.config import ConfigError, EngineSection
from harness.runs import describe_code, find_code_root


@dataclass(frozen=True)
class Ranks:
    """The process group of a run. World size 1 needs no group and pays for none."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks. Exact for integers below 2^53."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def share(self, text: str) -> str:
        """Return rank 0's text on every rank; also a barrier."""
        if self.world_size == 1:
            return text
        box = [text]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Leave the group; let go of the model first.

        Note: a DDP module that outlives its group (it sits in reference cycles) aborted one exit in twelve on gloo.
        """
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()


def join_ranks(device: str, planned_world_size: int | None = None) -> Ranks:
    """Join the group that torchrun set up through the environment, or be alone without it.

    Raises:
        ConfigError: the device is not there, or other ranks formed than were planned.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if planned_world_size not in (None, world_size):
        raise ConfigError(
            f"engine.world_size={planned_world_size}, but {world_size} started; start {planned_world_size} with torchrun, or "
            "plan again"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('engine.device="cuda", this machine has no usable CUDA device; use "auto" or "cpu"')
    use_cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if use_cuda else "gloo")
    return Ranks(rank=int(os.environ.get("RANK", "0")), world_size=world_size, device=chosen)


def form_group_of_one(ranks: Ranks) -> None:
    """Give a lone process the process group that DeepSpeed asks for; no port is opened."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined] # in torch's documentation, not in its __all__
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def describe_machine(ranks: Ranks, engine: EngineSection) -> dict[str, Any]:
    """Return what ran and on what: the columns of a row that say where its numbers come from."""
    code = describe_code(find_code_root())
    return {
        "engine": engine.kind,
        "zero_stage": engine.zero_stage if engine.kind == "deepspeed" else None,
        "world_size": ranks.world_size,
        "n_threads": torch.get_num_threads(),
        "device": ranks.device.type,
        "device_name": read_device_name(ranks.device),
        "code_hash": code.code_hash,
        "commit": code.commit,
        "dirty": code.dirty,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
    }


def read_device_name(device: torch.device) -> str | None:
    """Return the model name of the GPU or CPU, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
