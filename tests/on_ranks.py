"""What tests run under torchrun: cases of the parity check, sound or with a mistake planted, and an engine's own methods.

`on_ranks.py FOLDER MISTAKE/CASE ... [engine/CASE ...]`
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from harness import optimizer, train
from harness.batches import Batches, open_data
from harness.deepspeed_engine import DeepSpeedEngine
from harness.distributed import join_ranks
from harness.engine import TorchEngine, open_engine
from harness.parity import load_case, train_case


def average_nothing(patch: pytest.MonkeyPatch) -> None:
    """Accumulation not averaged: gradients are the sum over micro-steps."""

    def plain(self, ids, targets, *, micro_step, n_micro_steps):
        with self.postpone_sync(micro_step < n_micro_steps - 1), self.autocast():
            loss = self.module(ids, targets)[1]
            loss.backward()
        return loss.detach() / n_micro_steps

    def zero(self, ids, targets, *, micro_step, n_micro_steps):
        self.engine.set_gradient_accumulation_boundary(micro_step == n_micro_steps - 1)
        loss = self.engine(ids, targets)[1]
        self.engine.backward(loss, scale_wrt_gas=False)
        return loss.detach() / n_micro_steps

    patch.setattr(TorchEngine, "backward", plain)
    patch.setattr(DeepSpeedEngine, "backward", zero)


def clip_per_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank clips its own gradient before they are averaged; the norm reported is the right one."""

    def average(gradients):
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()

    def clip(self):
        gradients = [p.grad for p in self.model.parameters()]
        whole = [gradient.clone() for gradient in gradients]
        average(whole)
        clip_grad_norm_(self.model.parameters(), self.optim.grad_clip)
        average(gradients)
        return torch.stack([gradient.norm() for gradient in whole]).norm()

    patch.setattr(TorchEngine, "clip", clip)
    patch.setattr(TorchEngine, "postpone_sync", lambda self, _: self.module.no_sync())


def decay_norms(patch: pytest.MonkeyPatch) -> None:
    """Weight decay on biases and norms too."""
    group = optimizer.group_parameters
    patch.setattr(
        optimizer,
        "group_parameters",
        lambda m, what, n: [g | {"weight_decay": what.optim.weight_decay} for g in group(m, what, n)],
    )


def shift_schedule(patch: pytest.MonkeyPatch) -> None:
    """The learning rate of the next step; the row says what it should have been."""
    compute, step_of = train.compute_lr, {TorchEngine: TorchEngine.step, DeepSpeedEngine: DeepSpeedEngine.step}
    rates = {}

    def remember(step, *rest):
        rates["next"] = compute(step + 1, *rest)
        return compute(step, *rest)

    patch.setattr(train, "compute_lr", remember)
    for engine, step in step_of.items():
        patch.setattr(engine, "step", lambda self, _lr, step=step: step(self, rates["next"]))


def read_one_slice(patch: pytest.MonkeyPatch) -> None:
    """All ranks read the slice of rank 0."""
    init = Batches.__init__
    patch.setattr(Batches, "__init__", lambda self, *args, **kwargs: init(self, *args, **{**kwargs, "rank": 0}))


MISTAKES = {
    "none": lambda patch: None,
    "accumulation": average_nothing,
    "clipping": clip_per_rank,
    "decay": decay_norms,
    "schedule": shift_schedule,
    "slices": read_one_slice,
}


def check_engine(case_dir: Path, ranks) -> None:
    """Skip a step, save, go on, come back, go on again; write what was seen."""
    run = load_case(case_dir)
    batches, folder = open_data(run, ranks)[1], case_dir / "state"
    if ranks.rank == 0:
        folder.mkdir()
    ranks.share("made")
    engine, calm = open_engine(run, ranks), open_engine(run, ranks)
    advance(calm, batches, range(3))
    advance(engine, batches, range(2))
    advance(engine, batches, range(9, 10), spoil=float("nan"))
    advance(engine, batches, range(2, 3))
    skipped = [engine.skipped_steps, calm.skipped_steps]
    apart = measure(engine, calm)
    engine.write_state(folder)
    ranks.share("written")
    first = advance(engine, batches, range(3, 6))
    engine.read_state(folder)
    again = advance(engine, batches, range(3, 6))
    other = open_engine(run, ranks)
    other.read_state(folder)
    fresh = advance(other, batches, range(3, 6))
    if ranks.rank == 0:
        files = sorted(path.name for path in folder.rglob("*") if path.is_file())
        seen = {"skipped": skipped, "apart": apart, "first": first, "again": again, "fresh": fresh, "files": files}
        (case_dir / "seen.json").write_text(json.dumps(seen))


def advance(engine, batches, steps, spoil: float | None = None) -> list[list[float]]:
    """Take steps and return each one's loss and norm; a spoilt one has a gradient that is not finite on the last rank."""
    seen, n = [], batches.n_micro_steps
    for step in steps:
        last = spoil is not None and engine.ranks.rank == engine.ranks.world_size - 1
        handle = engine.model.norm.weight.register_hook(lambda g: g * spoil) if last else None
        loss = sum(engine.backward(*batches.batch(step, k), micro_step=k, n_micro_steps=n).item() for k in range(n))
        norm = float(engine.clip())
        if spoil is None:
            engine.step(1e-3)
        else:
            assert not 0 <= norm < float("inf"), norm
            engine.skip()
            handle and handle.remove()
        seen.append([loss, norm])
    return seen


def measure(engine, other) -> float:
    """Return the largest difference of a weight."""
    pairs = zip(engine.whole_model().parameters(), other.whole_model().parameters(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    ranks = join_ranks("cpu")
    for name in names:
        mistake = name.split("/")[0]
        if mistake == "engine":
            check_engine(folder / name, ranks)
            continue
        with pytest.MonkeyPatch.context() as patch:
            MISTAKES[mistake](patch)
            train_case(folder / name, ranks)
    ranks.close()


if __name__ == "__main__":
    main()
