"""The shape of a GPT, and exact counts of its parameters and FLOPs, by component. No torch.

Every convention that the literature calls "N" or "FLOPs" is a named sum of the components, so that a law can be
refitted under each of them.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_VOCAB_SIZE = 2**31


# What "Let's build GPT" runs on its way to the GPT, in its order; tutorial.py builds them.
Stage = Literal["bigram", "head", "multi_head", "feed_forward", "blocks", "layer_norm"]
STAGES: tuple[Stage, ...] = get_args(Stage)
BLOCK_STAGES = ("blocks", "layer_norm")  # those that stack n_layer blocks


class SizeError(ValueError):
    """A model that cannot be built: the message names the key, the value and what to type instead."""


class ModelConfig(BaseModel):
    """Everything that fixes a model's computation. Frozen; nothing is derived later, except that `d_ff` is 4 d_model.

    Names against the video's: seq_len is block_size, d_model is n_embd.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    d_model: int = Field(ge=1)
    vocab_size: int = Field(ge=1, le=MAX_VOCAB_SIZE)
    seq_len: int = Field(ge=1)
    d_ff: int | None = Field(default=None, ge=1)  # None: 4 d_model; under swiglu 8/3 d_model, up to a multiple of 8
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    positions: Literal["learned", "rotary"] = "learned"
    bias: bool = False  # in LayerNorm, MLP and the attention's output projection
    qkv_bias: bool = False
    head_bias: bool = False
    tied: bool = True  # the head shares the token embedding's matrix
    init_std: float = Field(default=0.02, gt=0.0)
    residual_init: Literal["plain", "scaled"] = "scaled"  # scaled: 1/sqrt(2 n_layer) on residual projections (GPT-2)
    # From here on None where unused: these came later, and ids of older runs leave them out (harness/FORMAT.md).
    stage: Stage | None = None  # a model of the video before the GPT (tutorial.py); None: the GPT
    n_kv_head: int | None = Field(default=None, ge=1)  # heads of keys and values, each shared by n_head / n_kv_head queries
    qk_norm: bool | None = None  # RMSNorm on the queries and keys of each head
    rope_theta: float | None = Field(default=None, gt=0.0)  # rotary only; None: 10,000
    padded_vocab_size: int | None = Field(default=None, ge=1)  # rows of the vocabulary's matrices; the loss never sees the rest
    parametrization: Literal["mup"] | None = None  # None: standard; the rules stand in parametrization.py
    base_d_model: int | None = Field(default=None, ge=1)  # mup: the width at which the settings were found
    base_d_head: int | None = Field(default=None, ge=1)  # mup: the head width there; None: the same, more heads
    base_n_layer: int | None = Field(default=None, ge=1)  # mup: the depth there; None: depth is not scaled

    @model_validator(mode="after")
    def check_shape(self) -> Self:
        """Refuse heads that do not divide, and options that need another one."""
        if self.d_model % self.n_head:
            below, above = nearest_divisors(self.d_model, self.n_head)
            raise ValueError(f"n_head={self.n_head}, does not divide d_model={self.d_model}; use {below} or {above}")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            below, above = nearest_divisors(self.n_head, self.n_kv_head)
            raise ValueError(f"n_kv_head={self.n_kv_head}, does not divide n_head={self.n_head}; use {below} or {above}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"positions='rotary', turns pairs and d_head={self.d_head} is odd; use an even d_model / n_head")
        if self.rope_theta is not None and self.positions != "rotary":
            raise ValueError(f"rope_theta={self.rope_theta:g}, needs rotary positions; drop it or use positions = 'rotary'")
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            fitting = -(-self.vocab_size // 64) * 64
            raise ValueError(
                f"padded_vocab_size={self.padded_vocab_size}, is below vocab_size={self.vocab_size}; use for example {fitting}"
            )
        return self

    @model_validator(mode="after")
    def check_parametrization(self) -> Self:
        """Refuse mup without its base, and a base without mup."""
        if self.parametrization == "mup" and self.base_d_model is None:
            raise ValueError("parametrization='mup', needs the width that it is relative to; add base_d_model")
        bases = [key for key in ("base_d_model", "base_d_head", "base_n_layer") if getattr(self, key) is not None]
        if self.parametrization is None and bases:
            raise ValueError(f"{bases[0]}={getattr(self, bases[0])}, is for mup; drop it or use parametrization = 'mup'")
        if self.parametrization is not None and self.stage is not None:
            raise ValueError(f"parametrization='mup', does not apply to stage={self.stage!r}; drop one of them")
        return self

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def d_mlp(self) -> int:
        """Hidden width of the MLP."""
        return self.d_ff if self.d_ff is not None else default_d_ff(self.d_model, self.activation)

    @property
    def d_kv(self) -> int:
        """Width of all keys, and of all values."""
        return (self.n_kv_head or self.n_head) * self.d_head

    @property
    def n_vocab_rows(self) -> int:
        """Rows of the token embedding and of the head."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def size(self) -> str:
        """The readable name of the shape, as it stands in every id: l4-h4-d128; a stage's name leads."""
        parts: list[str] = [self.stage] if self.stage else []
        parts.append(f"l{self.n_layer}-h{self.n_head}-d{self.d_model}")
        parts += [f"kv{self.n_kv_head}"] if self.n_kv_head is not None else []
        parts += [f"f{self.d_ff}"] if self.d_ff is not None else []
        return "-".join(parts)


def default_d_ff(d_model: int, activation: str) -> int:
    """Return the MLP's usual hidden width.

    Note: SwiGLU has three matrices, so 2/3 of the width has the same parameters (Shazeer 2020, section 2), up to a multiple of 8.
    """
    return -(-8 * d_model // 24) * 8 if activation == "swiglu" else 4 * d_model


# Architecture only: shape, vocabulary and dropout come from the experiment. Published shapes stand in ladder.py.
PRESETS: dict[str, dict[str, Any]] = {
    # "Let's build GPT", final script: keys, queries and values without bias, biases elsewhere, ReLU, untied head.
    "video": {
        "activation": "relu",
        "bias": True,
        "qkv_bias": False,
        "head_bias": True,
        "tied": False,
        "residual_init": "plain",
    },
    # nanoGPT's train_shakespeare_char: no bias anywhere, exact GELU, tied head.
    "nanogpt": {
        "activation": "gelu",
        "bias": False,
        "qkv_bias": False,
        "head_bias": False,
        "tied": True,
        "residual_init": "scaled",
    },
    # GPT-2 as published: biases everywhere but in the head, GELU by tanh.
    "gpt2": {
        "activation": "gelu_tanh",
        "bias": True,
        "qkv_bias": True,
        "head_bias": False,
        "tied": True,
        "residual_init": "scaled",
    },
    # As open models of 2024 and 2025 are built (Qwen3): rotary positions, RMSNorm, SwiGLU, QK-norm, no bias, untied head.
    "modern": {
        "activation": "swiglu",
        "norm": "rmsnorm",
        "positions": "rotary",
        "qk_norm": True,
        "bias": False,
        "qkv_bias": False,
        "head_bias": False,
        "tied": False,
        "residual_init": "scaled",
    },
}


def nearest_divisors(width: int, n_head: int) -> tuple[int, int]:
    """Return the divisors of `width` next below and above `n_head` (width itself where there is none above)."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return max(d for d in divisors if d <= n_head), min((d for d in divisors if d >= n_head), default=width)


def resolve_model(preset: str, **options: Any) -> ModelConfig:  # noqa: ANN401 - values are checked by ModelConfig
    """Build a model from a preset's options, overridden by `options`.

    Raises:
        SizeError: unknown preset or key, wrong type, or an impossible combination.
    """
    if preset not in PRESETS:
        raise SizeError(f"model.preset={preset!r}, there is no such preset; use one of {', '.join(PRESETS)}")
    merged = {**PRESETS[preset], **options}
    if merged.get("d_ff") is not None and merged["d_ff"] == default_d_ff(options.get("d_model", 0), merged["activation"]):
        merged["d_ff"] = None  # the default written out: one model, one name, one id
    try:
        return ModelConfig(**reduce_to_stage(merged))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["model", *(str(part) for part in first["loc"])])
        if not first["loc"]:  # the cross-field rule: its message already names keys and values
            raise SizeError(f"model: {first['msg'].removeprefix('Value error, ')}") from None
        raise SizeError(f"{where}={first['input']!r}, {first['msg'][0].lower()}{first['msg'][1:]}; mend it") from None


def reduce_to_stage(options: dict[str, Any]) -> dict[str, Any]:
    """Set what an early stage of the video does not have to one layer and one head, so that one model has one id."""
    stage, vocab_size = options.get("stage"), options.get("vocab_size")
    if stage == "bigram":
        return {**options, "n_layer": 1, "n_head": 1, "d_model": vocab_size}
    if stage in ("head", "multi_head", "feed_forward"):
        return {**options, "n_layer": 1, "n_head": 1 if stage == "head" else options.get("n_head")}
    return options


@dataclass(frozen=True)
class ParamCount:
    """Parameters by component. Units: parameters."""

    token_embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int  # 0 where tied, but for its bias
    attention_matrices: int
    mlp_matrices: int
    head_matrix: int  # d_model x vocab_size, tied or not

    @property
    def n_params(self) -> int:
        """All parameters (Hoffmann et al. 2022)."""
        return self.token_embedding + self.positions + self.attention + self.mlp + self.norms + self.head

    @property
    def n_params_non_embedding(self) -> int:
        """The blocks and the final norm: no embedding, no positions, no head (Kaplan et al. 2020, section 2.1)."""
        return self.attention + self.mlp + self.norms

    @property
    def n_params_matmul(self) -> int:
        """The entries of every matrix that a token is multiplied by, the head included."""
        return self.attention_matrices + self.mlp_matrices + self.head_matrix


def count_params(config: ModelConfig) -> ParamCount:
    """Count parameters by component, exactly; `tests/test_gpt.py` holds it equal to the module's."""
    if config.stage is not None:
        return count_stage_params(config)
    d, n_layer, rows = config.d_model, config.n_layer, config.n_vocab_rows
    attention_matrices = n_layer * (2 * d * d + 2 * d * config.d_kv)
    n_up = 2 if config.activation == "swiglu" else 1  # gate and up
    mlp_matrices = n_layer * (n_up + 1) * d * config.d_mlp
    attention_biases = n_layer * (config.qkv_bias * (d + 2 * config.d_kv) + config.bias * d)
    mlp_biases = n_layer * config.bias * (n_up * config.d_mlp + d)
    per_norm = d * (1 + (config.bias and config.norm == "layernorm"))
    head_matrix = d * rows
    return ParamCount(
        token_embedding=rows * d,
        positions=config.seq_len * d if config.positions == "learned" else 0,
        attention=attention_matrices + attention_biases,
        mlp=mlp_matrices + mlp_biases,
        norms=(2 * n_layer + 1) * per_norm + (2 * n_layer * config.d_head if config.qk_norm else 0),
        head=(0 if config.tied else head_matrix) + config.head_bias * rows,
        attention_matrices=attention_matrices,
        mlp_matrices=mlp_matrices,
        head_matrix=head_matrix,
    )


def count_stage_params(config: ModelConfig) -> ParamCount:
    """Count a stage of the video: what it has so far, by component; the bigram's table of logits is its embedding."""
    stage, d, vocab = STAGES.index(config.stage or "bigram"), config.d_model, config.vocab_size
    has_head, has_mlp, has_blocks, has_norms = (stage >= first for first in (1, 3, 4, 5))
    n_layer = config.n_layer if has_blocks else 1
    attention_matrices = n_layer * has_head * (4 if has_blocks else 3) * d * d  # blocks add the projection
    mlp_matrices = n_layer * has_mlp * (8 if has_blocks else 1) * d * d  # the first MLP is one matrix of d x d
    return ParamCount(
        token_embedding=vocab * (d if has_head else vocab),
        positions=has_head * config.seq_len * d,
        attention=attention_matrices + n_layer * has_blocks * d,
        mlp=mlp_matrices + n_layer * has_mlp * (5 if has_blocks else 1) * d,
        norms=has_norms * (2 * n_layer + 1) * 2 * d,
        head=has_head * (d + 1) * vocab,
        attention_matrices=attention_matrices,
        mlp_matrices=mlp_matrices,
        head_matrix=has_head * d * vocab,
    )


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs per token (forward and backward), by component. A multiply and an add are 2.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 per matrix parameter, and 12 n_layer d_model seq_len for the
    attention scores and their use, counted over the full sequence (the causal half is not taken off).
    """

    attention_matrices: int
    attention_scores: int
    mlp: int
    head: int

    @property
    def flops_per_token(self) -> int:
        """All of it: the convention of the columns `flops` and `mfu`."""
        return sum(int(getattr(self, field.name)) for field in fields(self))

    @property
    def forward(self) -> "FlopCount":
        """The forward pass alone: a third, since the backward pass multiplies twice for each product of the forward one."""
        return FlopCount(*(int(getattr(self, field.name)) // 3 for field in fields(self)))

    @property
    def backward(self) -> "FlopCount":
        """The backward pass alone: two thirds."""
        return FlopCount(*(2 * int(getattr(self, field.name)) // 3 for field in fields(self)))


def count_flops(config: ModelConfig) -> FlopCount:
    """Count training FLOPs per token by component; lookups, norms, biases, softmax and the optimiser are left out."""
    params, has_scores = count_params(config), config.stage != "bigram"
    return FlopCount(
        attention_matrices=6 * params.attention_matrices,
        attention_scores=12 * config.n_layer * config.d_model * config.seq_len * has_scores,
        mlp=6 * params.mlp_matrices,
        head=6 * params.head_matrix,
    )


def list_flop_conventions(config: ModelConfig) -> dict[str, int]:
    """Return training FLOPs per token under each convention of the literature, by its name.

    Note: causal counts the T (T + 1) / 2 scores that are not masked, of the T^2 that the plain product computes.
    """
    params, flops = count_params(config), count_flops(config)
    full, T = flops.flops_per_token, config.seq_len
    masked = flops.attention_scores - flops.attention_scores * (T + 1) // (2 * T)
    return {
        "exact: matrices, scores, head": full,
        "exact, causal half of the scores": full - masked,
        "exact, no scores": full - flops.attention_scores,
        "exact, no head": full - flops.head,
        "exact, no scores, no head": full - flops.attention_scores - flops.head,
        "6 n_params (Hoffmann)": 6 * params.n_params,
        "6 n_params_non_embedding (Kaplan)": 6 * params.n_params_non_embedding,
        "6 n_params_matmul": 6 * params.n_params_matmul,
    }


def compare_chinchilla(config: ModelConfig) -> float:
    """Return Chinchilla's exact FLOPs over its 6 N D, as in its Table A4.

    Source: Hoffmann et al. 2022, appendix F and Table A4.
    Note: the paper does not say what N counts. These reproduce the printed ratios: FLOPs without embedding and logits,
    with 3 n_head T^2 for the softmax; N without token embedding, with untied head, relative positions (d^2 + 2d a layer),
    biases and LayerNorms.
    """
    params, d, n_layer = count_params(config), config.d_model, config.n_layer
    softmax = 9 * n_layer * config.n_head * config.seq_len  # 3 n_head T^2 forward for T tokens, tripled for training
    flops = count_flops(config)
    exact = flops.attention_matrices + flops.attention_scores + flops.mlp + softmax
    biases = n_layer * (4 * d + config.d_mlp + d)
    norms = (2 * n_layer + 1) * 2 * d
    matrices = params.attention_matrices + params.mlp_matrices + params.head_matrix
    return exact / (6 * (matrices + n_layer * (d * d + 2 * d) + biases + norms))
