"""Checks of the machinery that need no study: whether activations keep their scale as width grows.

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1 (coordinate check).
"""

from pathlib import Path
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

WIDTHS = (64, 128, 256, 512)
BASE_WIDTH, D_HEAD, N_LAYER, VOCAB_SIZE, SEQ_LEN, BATCH = 64, 16, 2, 65, 32, 16
N_STEPS, LR = 8, 1e-2
Parametrization = Literal["standard", "mup"]


def check_width(widths: tuple[int, ...] = WIDTHS, seeds: tuple[int, ...] = (0, 1, 2), n_steps: int = N_STEPS) -> dict[str, Any]:
    """Train models of several widths for a few steps and return how far their activations moved from where they began.

    Flat against width is what lets a learning rate carry over; growing with width means that it must shrink.
    """
    rows = []
    parametrizations: tuple[Parametrization, ...] = ("standard", "mup")
    for parametrization in parametrizations:
        for width in widths:
            for seed in seeds:
                changes = measure_changes(build_width(width, parametrization), seed, n_steps)
                rows += [{"parametrization": parametrization, "d_model": width, "seed": seed, **change} for change in changes]
    return {
        "format": "scaling-harness-coordinates",
        "format_version": 1,
        "base_d_model": BASE_WIDTH,
        "lr": LR,
        "n_layer": N_LAYER,
        "rows": rows,
    }


def build_width(width: int, parametrization: Parametrization) -> ModelConfig:
    """Build the checked model at a width: more heads, not wider ones."""
    mup = {"parametrization": "mup", "base_d_model": BASE_WIDTH} if parametrization == "mup" else {}
    shape = {"n_layer": N_LAYER, "n_head": width // D_HEAD, "d_model": width}
    return resolve_model("nanogpt", **shape, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, tied=False, **mup)


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
    """Return what each attention, MLP and the head give on these tokens."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - torch's hook
        return lambda _module, _inputs, output: found.__setitem__(name, output.detach().float())

    named = [(n, m) for n, m in model.named_modules() if n.endswith((".attention", ".mlp"))]
    hooks = [module.register_forward_hook(keep(name)) for name, module in named]
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
    """Return how often the change grew from the smallest to the largest width, averaged over seeds."""
    rows = [
        row
        for row in facts["rows"]
        if (row["parametrization"], row["activation"], row["step"]) == (parametrization, activation, step)
    ]
    widths = sorted({row["d_model"] for row in rows})
    means = [torch.tensor([row["change"] for row in rows if row["d_model"] == width]).mean().item() for width in widths]
    return means[-1] / means[0]


def write_check(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Run the check and write coordinate_check.json."""
    facts = check_width()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coordinate_check.json"
    write_json(path, facts)
    return path, facts
