"""How settings found at one size carry over to another: mup's factors for AdamW, and rules by size for other settings.

No torch. `m` is d_model over the base width. Under the standard parametrization every factor is 1. Sources:
TP5: Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466. CompleteP: Dey et al. 2025, arXiv 2505.01618, whose table 1
was read in its authors' repository (EleutherAI/nanoGPT-mup, branch completep).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from model.size import ModelConfig, SizeError

Role = Literal["input", "hidden", "output", "vector"]


def find_role(name: str, n_dims: int) -> Role:
    """Return what kind of tensor a parameter of the GPT is: which of its sides grow with width.

    Note: a tied head is the token embedding, an input; its use as output is scaled by `scale_output`, as in TP5, table 8.
    """
    if n_dims < 2:
        return "vector"  # biases and gains
    if "embedding" in name:
        return "input"
    return "output" if name.startswith("head") else "hidden"


def measure_width(config: ModelConfig) -> float:
    """Return m, the width relative to the base; 1 under the standard parametrization."""
    return config.d_model / config.base_d_model if config.base_d_model is not None else 1.0


def scale_init(config: ModelConfig, role: Role) -> float:
    """Return the factor on init_std: 1/sqrt(m) where a matrix's inputs grow with width, 1 elsewhere.

    Source: TP5, table 8: variance 1/fan_in for hidden matrices, constant for embeddings and, with `scale_output`, the head.
    """
    return measure_width(config) ** -0.5 if role == "hidden" else 1.0


def scale_lr(config: ModelConfig, role: Role) -> float:
    """Return the factor on Adam's learning rate: 1/m for hidden matrices, 1 elsewhere.

    Source: TP5, table 8. With the residual factor 1/depth, none for depth (CompleteP, table 1, alpha = 1).
    """
    return 1.0 / measure_width(config) if role == "hidden" else 1.0


def scale_weight_decay(config: ModelConfig, role: Role) -> float:
    """Return the factor on weight decay, which AdamW multiplies by the learning rate: m undoes `scale_lr`.

    Source: CompleteP, table 1; Wang and Aitchison 2024, arXiv 2405.13698: lr x weight decay should not depend on width.
    """
    return 1.0 / scale_lr(config, role)


def scale_eps(config: ModelConfig, name: str) -> float:
    """Return the factor on AdamW's eps: inside the blocks, where gradients shrink so, base width over width and depth.

    Source: CompleteP, table 1, last row, "AdamW eps (residual blocks)".
    """
    return scale_residual(config) / measure_width(config) if name.startswith("blocks.") else 1.0


def scale_attention(config: ModelConfig) -> float | None:
    """Return what queries times keys are multiplied by; None: 1/sqrt(d_head).

    Source: TP5, definition 4.1: 1/d_head, since trained queries and keys are correlated; equal to standard at the base.
    """
    if config.parametrization is None or config.base_d_head is None:
        return None  # the head's width is the base's
    return math.sqrt(config.base_d_head) / config.d_head


def scale_output(config: ModelConfig) -> float:
    """Return what logits are multiplied by: 1/m.

    Source: TP5, table 8.
    """
    return 1.0 / measure_width(config)


def scale_residual(config: ModelConfig) -> float:
    """Return what each block adds is multiplied by: base depth over depth where depth is scaled.

    Source: CompleteP, table 1, alpha = 1.
    """
    return config.base_n_layer / config.n_layer if config.base_n_layer is not None else 1.0


@dataclass(frozen=True)
class Scale:
    """What a rule may look at. Units: parameters, tokens, FLOPs per token (no embeddings, no head)."""

    n_params_non_embedding: int
    n_params_with_head: int  # the same and the head's matrix, tied or not: all that multiplies a token, and norms and biases
    tokens: int
    flops_per_token_non_embedding: int


def compute_olmo_lr(scale: Scale) -> float:
    """Return 0.0047 (N / 108e6)^(-1/3), N with the head.

    Source: Porian et al. 2024, arXiv 2406.19146, the rounded fit of its plotting code; OLMo-core's model_ladder uses it.
    Note: for 20 tokens a parameter; OLMo-core halves it under WSD (`factor = 0.5`). Its N leaves out the token embedding only.
    """
    return float(0.0047 * (scale.n_params_with_head / 108e6) ** (-1 / 3))


def compute_step_law_lr(scale: Scale) -> float:
    """Return 1.79 N^-0.713 D^0.307.

    Source: Li et al. 2025, "Step Law", arXiv 2503.04715, equation 1; N without the vocabulary's matrices.
    Note: checked against the means of the authors' 1,000 bootstrap fits (step-law/steplaw, data/1004_*): 1.797, -0.7129, 0.3075.
    The number of the equation was not checked.
    """
    return float(1.79 * scale.n_params_non_embedding**-0.713 * scale.tokens**0.307)


def compute_deepseek_lr(scale: Scale) -> float:
    """Return 0.3118 C^-0.1250, C = M D.

    Source: DeepSeek LLM 2024, arXiv 2401.02954, section 3.1, equation 1; checked against Porian et al.'s plotting code.
    Note: M is FLOPs per token with attention and without the vocabulary's matrices.
    """
    return float(0.3118 * (scale.flops_per_token_non_embedding * scale.tokens) ** -0.1250)


def compute_kaplan_lr(scale: Scale) -> float:
    """Return 0.003239 - 0.0001395 ln N.

    Source: Kaplan et al. 2020, arXiv 2001.08361, equation D.1 in appendix D.6; read in others' quotations of it.
    Note: said to break down above 1e10 parameters, and zero at 1.2e10 by the natural logarithm, which tells that it is meant.
    Raises:
        SizeError: it is not positive at this size.
    """
    lr = 0.003239 - 0.0001395 * math.log(scale.n_params_non_embedding)
    if lr <= 0.0:
        N = f"{scale.n_params_non_embedding:,}"
        raise SizeError(f'optim.lr.rule="kaplan", is not positive at {N} parameters; it holds up to 1e10, use another rule')
    return lr


def compute_olmo_batch(scale: Scale) -> float:
    """Return 160 x 2048 (N / 108e6)^(2/3), N with the head. Units: tokens.

    Source: Porian et al. 2024, arXiv 2406.19146, the rounded fit, in sequences of 2,048; so used in OLMo-core's model_ladder.
    """
    return float(160 * 2048 * (scale.n_params_with_head / 108e6) ** (2 / 3))


def compute_step_law_batch(scale: Scale) -> float:
    """Return 0.58 D^0.571. Units: tokens.

    Source: as `compute_step_law_lr`; the authors' means are 0.581 and 0.5709.
    """
    return float(0.58 * scale.tokens**0.571)


def compute_deepseek_batch(scale: Scale) -> float:
    """Return 0.2920 C^0.3271. Units: tokens.

    Source: as `compute_deepseek_lr`.
    """
    return float(0.2920 * (scale.flops_per_token_non_embedding * scale.tokens) ** 0.3271)


def compute_model_size_warmup(scale: Scale) -> float:
    """Return as many tokens as the model has parameters in matrices, head included. Units: tokens.

    Source: Porian et al. 2024, arXiv 2406.19146, section 3.2: a warmup that is long for small models bends the law.
    """
    return float(scale.n_params_with_head)


def compute_fraction_warmup(scale: Scale) -> float:
    """Return the budget, of which the rule's factor takes a part. Units: tokens."""
    return float(scale.tokens)


def compute_product_decay(lr: float, n_steps: int) -> float:
    """Return 1 / lr, so that lr x weight decay is the rule's factor at every size.

    Source: Wang and Aitchison 2024, arXiv 2405.13698: the product sets the optimiser's timescale, in steps.
    """
    return 1.0 / lr


def compute_timescale_decay(lr: float, n_steps: int) -> float:
    """Return 1 / (lr x steps): averages over 1 / factor of the training, whatever its length.

    Source: the same, and Bergsma et al. 2025, "Power Lines", arXiv 2505.13738, whose tau is 1 / (lr x weight decay x steps).
    """
    return 1.0 / (lr * n_steps)


LR_RULES: dict[str, Callable[[Scale], float]] = {
    "olmo": compute_olmo_lr,
    "step_law": compute_step_law_lr,
    "deepseek": compute_deepseek_lr,
    "kaplan": compute_kaplan_lr,
}
BATCH_RULES: dict[str, Callable[[Scale], float]] = {
    "olmo": compute_olmo_batch,
    "step_law": compute_step_law_batch,
    "deepseek": compute_deepseek_batch,
}
WARMUP_RULES: dict[str, Callable[[Scale], float]] = {
    "model_size": compute_model_size_warmup,
    "budget_fraction": compute_fraction_warmup,
}
DECAY_RULES: dict[str, Callable[[float, int], float]] = {
    "product": compute_product_decay,
    "timescale": compute_timescale_decay,
}
# Rules that look at a cell's budget: they cannot serve the budgets that share a trunk.
BUDGET_RULES = frozenset({"step_law", "deepseek", "budget_fraction", "timescale"})
