"""The ranks of one run: who am I, how many are we, and the few things that all must agree on."""

import gc
import os
import pickle
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from harness.config import ConfigError, EngineSection
from harness.ending import find_disk_full
from harness.runs import describe_code, find_code_root

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=2)  # for a rank that hashes a checkpoint, say; a hang is noticed by its heartbeat long before


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

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, act: Callable[[], T]) -> T:
        """Act on every rank and return this rank's result; where any rank fails, every rank raises.

        So no rank waits for one that has gone. A full disk is told before other causes.
        """
        result, error = None, None
        try:
            result = act()
        except Exception as caught:  # raised again below, on all ranks
            error = caught
        errors = [e for e in self.gather(make_portable(error)) if e is not None]
        if errors:
            raise error or next((e for e in errors if find_disk_full(e)), errors[0])
        return result  # type: ignore[return-value]

    def decide(self, act: Callable[[], T]) -> T:
        """Have rank 0 act and return its result on every rank; its failure is every rank's."""
        return self.gather(self.together(lambda: act() if self.rank == 0 else None))[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the group; let go of the model first.

        Note: a DDP module that outlives its group (it sits in reference cycles) aborted one exit in twelve on gloo.
        """
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()


def make_portable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent to other ranks and still says what happened."""
    error = find_disk_full(error) or error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception with arguments of its own raises here
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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
        torch.distributed.init_process_group("nccl" if use_cuda else "gloo", timeout=LONGEST_WAIT)
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
