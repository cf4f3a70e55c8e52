"""A rank in which something goes wrong: `python -m faulty` is `python -m harness.train` with the faults of HARNESS_FAULTS.

Each fault is {"at": place, "do": deed} and may say "rank", "attempt", "n" (at the n-th passing, from 0) and "s" (seconds). Places
are those of `fault_point`, and "step:<k>": the batch of step k is asked for.
"""

import errno
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import fault
from harness.attempt import ATTEMPT_VARIABLE
from harness.batches import Batches
from harness.config import run_command_line
from harness.engine import TorchEngine

VARIABLE = "HARNESS_FAULTS"
passed: Counter[int] = Counter()
spoil: dict[str, float] = {}  # "loss" or "gradient" of the present step -> factor


def break_in(place: str) -> None:
    """Do what the faults say for this place."""
    rank, attempt = int(os.environ.get("RANK", "0")), int(Path(os.environ[ATTEMPT_VARIABLE]).name)
    for index, planned in enumerate(json.loads(os.environ.get(VARIABLE, "[]"))):
        if planned["at"] == place and planned.get("rank", rank) == rank and planned.get("attempt", attempt) == attempt:
            passed[index] += 1
            if passed[index] == planned.get("n", 0) + 1:
                do(planned)


def do(planned: dict[str, Any]) -> None:
    """Let one fault happen."""
    match planned["do"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "signal":
            os.kill(os.getppid() if planned.get("to") == "agent" else os.getpid(), signal.Signals[planned["signal"]])
            time.sleep(planned.get("s", 0))
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "loop":
            spin_for_ever()
        case "sleep":
            time.sleep(planned["s"])
        case "oom":
            raise torch.OutOfMemoryError("out of memory, says the test")
        case "refuse":
            raise OSError(getattr(errno, planned["errno"]), os.strerror(getattr(errno, planned["errno"])))
        case "raise":
            raise ZeroDivisionError("says the test")
        case "spoil":
            spoil[planned["what"]] = planned.get("factor", math.nan)


def spin_for_ever() -> None:
    """Hang without a system call."""
    while True:
        pass


def install() -> None:
    """Put the faults in place: at the named points, and around batches and engine."""
    fault.injector = break_in
    batch, backward, clip = Batches.batch, TorchEngine.backward, TorchEngine.clip

    def batch_or_fault(self: Batches, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        spoil.clear()
        break_in(f"step:{step}")
        break_in("step")
        return batch(self, step, micro_step)

    def backward_or_fault(self: TorchEngine, ids: Tensor, targets: Tensor, **steps: int) -> Tensor:
        return backward(self, ids, targets, **steps) * spoil.get("loss", 1.0)

    def clip_or_fault(self: TorchEngine) -> Tensor:
        if "gradient" in spoil:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(spoil["gradient"])
        return clip(self)

    Batches.batch = batch_or_fault  # type: ignore[method-assign]
    TorchEngine.backward = backward_or_fault  # type: ignore[assignment,method-assign]
    TorchEngine.clip = clip_or_fault  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    from harness.train import main

    sys.exit(run_command_line(main))  # type: ignore[func-returns-value]
