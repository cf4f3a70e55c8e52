"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the methods of the torch engine.

DeepSpeed reduces, partitions and gathers; data, schedule, optimiser and what becomes of a checkpoint stay ours.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import EngineSection
from harness.distributed import Ranks, form_group_of_one
from harness.engine import draw_model
from harness.optimizer import build_adamw, set_lr
from harness.records import What
from harness.zero import render_zero_config
from model.tutorial import build_model

TAG = "deepspeed"  # the folder inside a checkpoint's


class DeepSpeedEngine:
    """Model and optimiser of one run under ZeRO."""

    def __init__(self, what: What, how: EngineSection, ranks: Ranks, init_from: str | None = None) -> None:
        deepspeed = import_deepspeed(ranks)
        self.what, self.ranks, self.stage = what, ranks, how.zero_stage
        self.model = draw_model(what, how, init_from)
        client = build_adamw(self.model, what, ranks.device)
        config = render_zero_config(what, how, ranks.world_size)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=self.model, optimizer=client, config=config)
        self.engine._copy_recovery_script = lambda save_path: None  # no program in a checkpoint, and no copy on a full disk
        if how.compile:
            self.engine.compile()
        self.norm = torch.zeros(())
        self.measure_norm = self.take_over_norm()

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was not applied."""
        return int(self.engine.skipped_steps)

    def backward(self, ids: Tensor, targets: Tensor, *, micro_step: int, n_micro_steps: int) -> Tensor:
        """Add one micro-step's share of the gradient of the step's mean loss; return that share of the loss.

        Note: stages 0 and 1 reduce gradients over ranks once a step; 2 and 3, which split them, at each micro-step.
        """
        self.engine.set_gradient_accumulation_boundary(micro_step == n_micro_steps - 1)
        loss = self.engine(ids, targets)[1] / n_micro_steps
        self.engine.backward(loss, scale_wrt_gas=False)
        return loss.detach()  # type: ignore[no-any-return]

    def clip(self) -> Tensor:
        """Measure the norm over all gradients, before clipping; `step` clips, and at stage 0 it is done already."""
        self.norm = self.measure_norm()
        return self.norm

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""
        set_lr(self.optimizer.param_groups, lr)
        self.engine.step()

    def skip(self) -> None:
        """Forget the gradients without an update, and count it: DeepSpeed does so itself where the norm is not finite."""
        if self.stage == 0:
            self.engine.zero_grad()
            self.engine.skipped_steps += 1
        else:
            self.norm = torch.full_like(self.norm, float("inf"))
            self.engine.step()

    def take_over_norm(self) -> Callable[[], Tensor]:
        """Return what measures the norm, and let DeepSpeed's step use `self.norm` instead of measuring again.

        Note: DeepSpeed measures inside its step, and the loop has to know before it. These are its own methods, not an API.
        """
        optimizer = self.optimizer
        if self.stage == 0:
            limit = self.what.optim.grad_clip or float("inf")
            return partial(nn.utils.clip_grad_norm_, list(self.model.parameters()), limit)
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            measure_groups, optimizer._get_norm_groups = optimizer._get_norm_groups, lambda: [self.norm]
            return lambda: combine_grad_norm_groups(measure_groups())
        if hasattr(optimizer, "scaled_global_norm"):
            measure, optimizer.scaled_global_norm = optimizer.scaled_global_norm, lambda: self.norm
            return measure  # type: ignore[no-any-return]
        from deepspeed.runtime.utils import get_global_norm_of_tensors  # stage 1 in bf16: BF16_Optimizer

        list_grads = optimizer.get_grads_for_norm
        optimizer.get_grads_for_norm = lambda for_clipping=False: list_grads(True) if for_clipping else ([self.norm], {})
        return lambda: get_global_norm_of_tensors(list_grads()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which to evaluate the model: inside `backward` DeepSpeed casts by itself."""
        if self.what.precision == "bf16_autocast":
            return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def whole_model(self) -> nn.Module:
        """Return a copy on the CPU with every weight, whole on rank 0: ZeRO's are views of flat buffers, or pieces."""
        from deepspeed.runtime.zero import GatheredParameters

        whole = build_model(self.what.model)
        for target, parameter in zip(whole.parameters(), self.model.parameters(), strict=True):
            with GatheredParameters(parameter, enabled=self.stage == 3):
                if self.ranks.rank == 0:
                    target.data = parameter.detach().cpu().clone()
        return whole

    def write_state(self, folder: Path) -> None:
        """Write weights and optimiser state; each rank writes its part under names with its rank."""
        with refusing_late(self.engine.checkpoint_engine):
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def read_state(self, folder: Path) -> None:
        """Take over weights and optimiser state. DeepSpeed runs what code the pickles hold: look at them before."""
        self.engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)

    def read_universal(self, folder: Path, n_updates: int) -> None:
        """Take over a converted checkpoint, which fits any number of ranks, after so many updates.

        Note: at stage 3 DeepSpeed 0.19.8 gives every group the first one's weight decay and one counter of updates for all of
        them, which each then advances; so both are set here.
        """
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        config = self.engine._config
        config.load_universal_checkpoint = True
        try:
            self.read_state(folder)
        finally:
            config.load_universal_checkpoint = False
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], n_updates)


@contextmanager
def refusing_late(writer: Any) -> Iterator[None]:  # noqa: ANN401 - DeepSpeed's
    """Raise what the disk refused to DeepSpeed's writer only at the end: saving has barriers, at which the others would wait."""
    save, refusals = writer.save, []

    def save_or_note(state_dict: Any, path: str) -> None:  # noqa: ANN401 - DeepSpeed's
        try:
            Path(path).parent.mkdir(exist_ok=True)
            with Path(path).open("wb") as file:  # by its name torch would write it in C++, which does not say that a disk is full
                save(state_dict, file)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter over the former
            refusals.append(error)

    writer.save = save_or_note
    try:
        yield
    finally:
        writer.save = save
    if refusals:
        raise refusals[0]


def import_deepspeed(ranks: Ranks) -> ModuleType:
    """Import DeepSpeed for this device, and have it use the group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    form_group_of_one(ranks)
    import deepspeed

    # Which operators could be compiled; asked only for a shared-memory all-reduce, which takes a minute to compile. gloo serves.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed  # type: ignore[no-any-return]
