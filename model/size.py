"""The shape of a GPT, and exact counts of its parameters and FLOPs, by component. No torch.

Every convention that the literature calls "N" or "FLOPs" is a named sum of the components, so that a law can be
refitted under each of them.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_VOCAB_SIZE = 2**31


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
    d_ff: int | None = Field(default=None, ge=1)  # None: 4 d_model
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu"
    norm: Literal["layernorm"] = "layernorm"
    positions: Literal["learned"] = "learned"
    bias: bool = False  # in LayerNorm, MLP and the attention's output projection
    qkv_bias: bool = False
    head_bias: bool = False
    tied: bool = True  # the head shares the token embedding's matrix
    init_std: float = Field(default=0.02, gt=0.0)
    residual_init: Literal["plain", "scaled"] = "scaled"  # scaled: 1/sqrt(2 n_layer) on residual projections (GPT-2)

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        """Refuse a width that the heads do not divide."""
        if self.d_model % self.n_head:
            below, above = nearest_divisors(self.d_model, self.n_head)
            raise ValueError(f"n_head={self.n_head}, does not divide d_model={self.d_model}; use {below} or {above}")
        return self

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def d_mlp(self) -> int:
        """Hidden width of the MLP."""
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    @property
    def size(self) -> str:
        """The readable name of the shape, as it stands in every id: l4-h4-d128."""
        name = f"l{self.n_layer}-h{self.n_head}-d{self.d_model}"
        return name if self.d_ff is None else f"{name}-f{self.d_ff}"


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
    if options.get("d_ff") == 4 * options.get("d_model", 0):
        options["d_ff"] = None  # the default written out: one model, one name, one id
    try:
        return ModelConfig(**{**PRESETS[preset], **options})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["model", *(str(part) for part in first["loc"])])
        if not first["loc"]:  # the cross-field rule: its message already names keys and values
            raise SizeError(f"model: {first['msg'].removeprefix('Value error, ')}") from None
        raise SizeError(f"{where}={first['input']!r}, {first['msg'][0].lower()}{first['msg'][1:]}; mend it") from None


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
    d, n_layer = config.d_model, config.n_layer
    attention_matrices = n_layer * 4 * d * d
    mlp_matrices = n_layer * 2 * d * config.d_mlp
    attention_biases = n_layer * (config.qkv_bias * 3 * d + config.bias * d)
    mlp_biases = n_layer * config.bias * (config.d_mlp + d)
    head_matrix = d * config.vocab_size
    return ParamCount(
        token_embedding=config.vocab_size * d,
        positions=config.seq_len * d,
        attention=attention_matrices + attention_biases,
        mlp=mlp_matrices + mlp_biases,
        norms=(2 * n_layer + 1) * d * (1 + config.bias),
        head=(0 if config.tied else head_matrix) + config.head_bias * config.vocab_size,
        attention_matrices=attention_matrices,
        mlp_matrices=mlp_matrices,
        head_matrix=head_matrix,
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


def count_flops(config: ModelConfig) -> FlopCount:
    """Count training FLOPs per token by component; lookups, norms, biases and the optimiser are left out."""
    params = count_params(config)
    return FlopCount(
        attention_matrices=6 * params.attention_matrices,
        attention_scores=12 * config.n_layer * config.d_model * config.seq_len,
        mlp=6 * params.mlp_matrices,
        head=6 * params.head_matrix,
    )
