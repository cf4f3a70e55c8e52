"""Checks of the machinery that need no study: whether activations keep their scale as width or depth grows.

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1 (coordinate check).
"""

from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.config import EngineSection
from harness.distributed import Ranks
from harness.engine import TorchEngine
from harness.records import Optim, What
from harness.runs import write_json
from harness.schedule import Schedule
from model.size import ModelConfig, resolve_model

WIDTHS, DEPTHS = (64, 128, 256, 512), (2, 4, 8, 16)
BASE_WIDTH, BASE_DEPTH, D_HEAD, VOCAB_SIZE, SEQ_LEN, BATCH = 64, 2, 16, 65, 32, 16
N_STEPS, LR = 8, 1e-2
Axis = Literal["d_model", "n_layer"]
Parametrization = Literal["standard", "mup"]


def check_axis(axis: Axis, values: tuple[int, ...], seeds: tuple[int, ...] = (0, 1, 2), n_steps: int = N_STEPS) -> dict[str, Any]:
    """Train models of several widths or depths for a few steps and return how far their activations moved from the start.

    Flat against size is what lets a learning rate carry over; growing with size means that it must shrink.
    """
    rows = []
    parametrizations: tuple[Parametrization, ...] = ("standard", "mup")
    for parametrization in parametrizations:
        for value in values:
            for seed in seeds:
                changes = measure_changes(build_checked(axis, value, parametrization), seed, n_steps)
                rows += [{"parametrization": parametrization, axis: value, "seed": seed, **change} for change in changes]
    base = {"base_d_model": BASE_WIDTH, "base_n_layer": BASE_DEPTH}
    return {"format": "scaling-harness-coordinates", "format_version": 1, "axis": axis, **base, "lr": LR, "rows": rows}


def build_checked(axis: Axis, value: int, parametrization: Parametrization) -> ModelConfig:
    """Build the checked model at a width (more heads, not wider ones) or a depth, the other as at the base."""
    shape = {"d_model": BASE_WIDTH, "n_layer": BASE_DEPTH, axis: value}
    scaled_depth = {"base_n_layer": BASE_DEPTH} if axis == "n_layer" else {}
    mup = {"parametrization": "mup", "base_d_model": BASE_WIDTH, **scaled_depth} if parametrization == "mup" else {}
    heads = shape["d_model"] // D_HEAD
    return resolve_model("nanogpt", n_head=heads, **shape, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, tied=False, **mup)


def measure_changes(config: ModelConfig, seed: int, n_steps: int) -> list[dict[str, Any]]:
    """Return, after each step, the root mean square of what each activation changed by since before the first."""
    engine = TorchEngine(describe_run(config, seed), EngineSection(device="cpu"), Ranks(0, 1, torch.device("cpu")))
    ids = draw_text(seed)
    before, changes = read_activations(engine.model, ids), []
    for step in range(1, n_steps + 1):
        engine.backward(ids[:, :-1], ids[:, 1:], micro_step=0, n_micro_steps=1)
        engine.step(LR)
        now = read_activations(engine.model, ids)
        for name, activation in now.items():
            change = (activation - before[name]).square().mean().sqrt().item()
            changes.append({"step": step, "activation": name, "change": change})
    return changes


def draw_text(seed: int) -> Tensor:
    """Return sequences with something to learn: each token is the one before plus 1 or 2. Shapes: (B, T + 1)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (BATCH, SEQ_LEN + 1), generator=generator)
    return steps.cumsum(dim=1) % VOCAB_SIZE


def read_activations(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return what the attention and MLP of the first and the last block, all blocks together and the head give."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - torch's hook
        return lambda _module, _inputs, output: found.__setitem__(name, output.detach().float())

    blocks: Any = model.blocks
    parts = {"first": blocks[0], "last": blocks[-1]}
    named = {f"{where} {part}": getattr(block, part) for where, block in parts.items() for part in ("attention", "mlp")}
    hooks = [module.register_forward_hook(keep(name)) for name, module in {**named, "stream": blocks[-1]}.items()]
    try:
        with torch.no_grad():
            found["logits"] = model(ids[:, :-1])[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def describe_run(config: ModelConfig, seed: int) -> What:
    """Return the run of the check: plain Adam at a constant rate."""
    optim = Optim(kind="adamw", lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=None, global_batch_size=BATCH)
    return What(
        model=config,
        precision="fp32",
        data_content_id="",
        seed=seed,
        data_seed=seed,
        optim=optim,
        schedule=Schedule(kind="constant", n_warmup_steps=0, min_lr_fraction=None),
        eval_stride=SEQ_LEN,
        n_steps=N_STEPS,
    )


def find_growth(facts: dict[str, Any], parametrization: str, activation: str, step: int) -> float:
    """Return how often the change grew from the smallest to the largest width or depth, averaged over seeds."""
    wanted, axis = (parametrization, activation, step), facts["axis"]
    rows = [row for row in facts["rows"] if (row["parametrization"], row["activation"], row["step"]) == wanted]
    ends = [pick(row[axis] for row in rows) for pick in (min, max)]
    small, large = (mean(row["change"] for row in rows if row[axis] == end) for end in ends)
    return float(large / small)


def render_growth(facts: dict[str, Any]) -> str:
    """Write, for each activation, how often its change grew under either parametrization."""
    last = max(row["step"] for row in facts["rows"])
    lines = [f"growth of the change after {last} steps, largest {facts['axis']} over smallest (flat: 1)"]
    for name in dict.fromkeys(row["activation"] for row in facts["rows"]):
        standard, mup = (find_growth(facts, one, name, last) for one in ("standard", "mup"))
        lines.append(f"  {name:20} standard {standard:8.2f}   mup {mup:6.2f}")
    return "\n".join(lines)


def write_check(folder: Path, axis: Axis) -> tuple[Path, dict[str, Any]]:
    """Run the check over widths or depths and write coordinate_check.json."""
    facts = check_axis(axis, WIDTHS if axis == "d_model" else DEPTHS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coordinate_check.json"
    write_json(path, facts)
    return path, facts
