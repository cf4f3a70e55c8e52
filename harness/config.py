"""The experiment file: TOML into frozen values. Unknown keys, wrong types and impossible numbers end in one line.

Every key of the file stands here. A key that a later version adds is None where unused, so that ids of existing runs stay
as they are (harness/FORMAT.md).
"""

import difflib
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Precision = Literal["fp32", "bf16_autocast", "bf16_native"]  # the last under DeepSpeed only
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ConfigError(ValueError):
    """Bad input: the message names where, the key and value, what is wrong, and what to type instead."""


class Section(BaseModel):
    """A frozen table of the experiment file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PaperData(Section):
    """Data that does not exist yet, so that a study can be planned and priced before anything is prepared."""

    vocab_size: PositiveInt
    train_tokens: PositiveInt
    val_tokens: PositiveInt
    bytes_per_token: Positive = 4.0


class DataSection(Section):
    """Which tokens, in windows of what length: a prepared directory, or figures on paper (planned, never trained)."""

    dir: str | None = Field(default=None, min_length=1)
    on_paper: PaperData | None = None
    seq_len: PositiveInt
    max_epochs: Positive = 4.0  # more repetition than this bends a law (Muennighoff et al. 2023): refused unless raised
    seed: Seed | None = None  # None: the run's seed

    @model_validator(mode="after")
    def check_source(self) -> Self:
        """Refuse no data, and two kinds of it."""
        if (self.dir is None) == (self.on_paper is None):
            raise ValueError("needs a prepared directory (dir) or figures (on_paper), one of them; give exactly one")
        return self


class ModelSection(Section):
    """A preset of model/size.py; any other option of ModelConfig may stand beside it."""

    preset: Literal["video", "nanogpt", "gpt2", "modern"]
    stage: Literal["bigram", "head", "multi_head", "feed_forward", "blocks", "layer_norm"] | None = None
    parametrization: Literal["standard", "mup"] = "standard"
    base_d_model: PositiveInt | None = None
    base_d_head: PositiveInt | None = None
    base_n_layer: PositiveInt | None = None
    init_from: str | None = None
    d_ff: PositiveInt | None = None
    n_kv_head: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    positions: Literal["learned", "rotary"] | None = None
    rope_theta: Positive | None = None
    qk_norm: bool | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    head_bias: bool | None = None
    tied: bool | None = None
    padded_vocab_size: PositiveInt | None = None
    init_std: Positive | None = None
    residual_init: Literal["plain", "scaled"] | None = None


class LrRule(Section):
    """A learning rate that follows from the size, by a rule of model/parametrization.py."""

    rule: Literal["olmo", "step_law", "deepseek", "kaplan"]
    factor: Positive = 1.0


class BatchRule(Section):
    """A global batch that follows from the size, rounded to a multiple of some number of sequences."""

    rule: Literal["olmo", "step_law", "deepseek"]
    factor: Positive = 1.0
    multiple_of: PositiveInt = 1


class DecayRule(Section):
    """A weight decay that follows from the learning rate, and from the number of steps under `timescale`."""

    rule: Literal["product", "timescale"]
    factor: Positive


class WarmupRule(Section):
    """A warmup that follows from the size, or is a part of the budget."""

    rule: Literal["model_size", "budget_fraction"]
    factor: Positive = 1.0


class OptimSection(Section):
    """The optimiser and the global batch."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices, with AdamW for the rest; torch engine only
    lr: Positive | LrRule
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), strict=False)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] | DecayRule = 0.1  # on matrices only, decoupled
    grad_clip: Positive | None = 1.0  # norm over all gradients; leave out [optim] grad_clip with `grad_clip = false`
    global_batch_size: PositiveInt | BatchRule  # sequences per step, all ranks
    skip_spikes: Literal[True] | None = None  # leave out the update where the loss jumps; leave this key out for none

    @model_validator(mode="before")
    @classmethod
    def read_no_clipping(cls, value: Any) -> Any:  # noqa: ANN401 - TOML has no null
        """Let `grad_clip = false` mean no clipping, since TOML has no null."""
        if isinstance(value, dict) and value.get("grad_clip") is False:
            return {**value, "grad_clip": None}
        return value


class ScheduleSection(Section):
    """Learning rate against tokens."""

    kind: Literal["constant", "cosine", "linear", "wsd"]
    warmup_tokens: Annotated[int, Field(ge=0)] | WarmupRule = 0
    cooldown_fraction: float | None = Field(default=None, gt=0, lt=1)  # wsd only; None: 0.2
    cooldown_shape: Literal["sqrt", "linear"] | None = None  # wsd only; None: sqrt, that is 1 - sqrt(progress)
    min_lr_fraction: Fraction = 0.0  # the last learning rate of cosine, linear and wsd, as a fraction of lr

    @model_validator(mode="after")
    def check_cooldown(self) -> Self:
        """Refuse a cooldown where the schedule has none."""
        if self.kind != "wsd" and (self.cooldown_fraction is not None or self.cooldown_shape is not None):
            raise ValueError(f'kind="{self.kind}", has no cooldown; drop cooldown_* or use kind = "wsd"')
        return self


class Size(Section):
    """One shape of the grid."""

    n_layer: PositiveInt
    n_head: PositiveInt
    d_model: PositiveInt
    d_ff: PositiveInt | None = None


class Repeats(Section):
    """Further seeds of some cells, for the seed noise."""

    cells: Literal["cheapest"]
    n: PositiveInt


class HoldOut(Section):
    """Cells that are planned and trained but never fitted."""

    sizes: Literal["largest"] | None = None
    budgets: Literal["largest"] | None = None


# What pydantic adds to the place of a fault where a key may be a number or a rule.
RULES = ("LrRule", "BatchRule", "DecayRule", "WarmupRule")
UNION_BRANCHES = ("constrained-float", "constrained-int", "float", "int", *RULES)
BUDGET_KEYS = ("tokens", "flops", "tokens_per_param", "steps")


class Scratch(Section):
    """Cells under wsd that are also trained alone to the same horizon, to measure what sharing a trunk changes.

    Note: under `wsd` such a cell repeats its branch, bit for bit on one CPU; under cosine or linear it says what the schedule
    changes.
    """

    cells: Literal["cheapest"]
    n: PositiveInt = 1
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"


class ExtraCell(Section):
    """A cell beside the grid's: a size, and exactly one of `BUDGET_KEYS`."""

    size: Size
    tokens: PositiveInt | None = None
    flops: Positive | None = None
    tokens_per_param: Positive | None = None
    steps: PositiveInt | None = None
    seed: Seed | None = None  # None: the grid's first
    hold_out: bool = False

    @model_validator(mode="after")
    def check_budget(self) -> Self:
        """Refuse none or several kinds of budget."""
        check_one_budget(self)
        return self


def check_one_budget(section: Section) -> None:
    """Refuse none or several of `BUDGET_KEYS`."""
    given = [key for key in BUDGET_KEYS if getattr(section, key) is not None]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has no budget"
        raise ValueError(f"{found}; give exactly one of {', '.join(BUDGET_KEYS)}")


class GridSection(Section):
    """Sizes x budgets x seeds (x axes); exactly one of `BUDGET_KEYS`."""

    sizes: tuple[Size, ...] = Field(min_length=1, strict=False)
    tokens: tuple[PositiveInt, ...] | None = Field(default=None, min_length=1, strict=False)
    flops: tuple[Positive, ...] | None = Field(default=None, min_length=1, strict=False)
    tokens_per_param: tuple[Positive, ...] | None = Field(default=None, min_length=1, strict=False)
    steps: tuple[PositiveInt, ...] | None = Field(default=None, min_length=1, strict=False)
    seeds: tuple[Seed, ...] | None = Field(default=None, min_length=1, strict=False)  # None: the experiment's seed
    axes: dict[str, list[Any]] = Field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = Field(default=(), strict=False)  # keys that change together, one table a variant
    extra: tuple[ExtraCell, ...] = Field(default=(), strict=False)  # cells beside the grid's
    repeats: Repeats | None = None
    scratch: Scratch | None = None
    hold_out: HoldOut | None = None

    @model_validator(mode="after")
    def check_budgets(self) -> Self:
        """Refuse none or several kinds of budget."""
        check_one_budget(self)
        return self


class EvalSection(Section):
    """The full deterministic pass over the validation split."""

    every_tokens: PositiveInt | None = None  # None: at the end only
    stride: PositiveInt | None = None  # None: seq_len
    batch_size: PositiveInt = 64  # sequences at a time, per rank


class EngineSection(Section):
    """How, not what: nothing here may change a result beyond rounding."""

    kind: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1  # deepspeed only: what is split over ranks (harness/zero.py)
    offload_optimizer: bool = False  # deepspeed only: optimiser state and its update on the CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    world_size: PositiveInt | None = None  # ranks that torchrun must have started; None: any
    micro_batch_size: PositiveInt | None = None  # sequences per rank and micro-step; None: all of the rank's share
    activation_checkpointing: bool = False  # a block's activations are computed again backwards: memory for time
    compile: bool = False
    checkpoint_every_s: Positive = 60.0
    max_skipped_steps: int = Field(default=10, ge=0)  # updates left out since loss or gradient was not finite; then: diverged
    hang_after_s: Positive = 600.0  # a silent rank is taken to hang; three times this outside steps


class TrackSection(Section):
    """Where progress is written, besides the run's own metrics.jsonl."""

    log_every_steps: PositiveInt = 10
    wandb: Literal["off", "offline", "online"] = "off"  # a copy for wandb, made beside the training


class Experiment(Section):
    """The user's main interface: one file, one grid."""

    name: str = Field(pattern=NAME_PATTERN)
    seed: Seed = 0  # model and data, unless data.seed is given
    precision: Precision  # never chosen from the hardware
    data: DataSection
    model: ModelSection
    optim: OptimSection
    schedule: ScheduleSection
    grid: GridSection
    eval: EvalSection = EvalSection()
    engine: EngineSection = EngineSection()
    track: TrackSection = TrackSection()


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file; each override is a line `key.path=value` whose value is TOML.

    Raises:
        ConfigError: missing or unreadable file, unknown key, wrong type, impossible number.
    """
    table = read_toml(path)
    for override in overrides or []:
        key, value = parse_override(override)
        set_key(table, key, value, where=f"--set {override}")
    return parse_experiment(table, where=path.name)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file into a mapping."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of an experiment file (*.toml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML ({error}); mend that line") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `optim.lr=3e-4` into the key and its TOML value."""
    key, equals, value = text.partition("=")
    try:
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", key.strip()):
            raise ValueError("no key")
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, KeyError):
        raise ConfigError(f"--set {text}: is not key=value with a TOML value; write optim.lr=3e-4 or name='\"x\"'") from None


def set_key(table: dict[str, Any], key: str, value: Any, where: str) -> None:  # noqa: ANN401 - any TOML value
    """Set a dotted key in a nested mapping, in place."""
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section} is a value, not a table; name a key inside a table")
    table[last] = value


def parse_experiment(table: dict[str, Any], where: str) -> Experiment:
    """Check a mapping against the schema; the first fault is told in one line that starts with `where`."""
    try:
        return Experiment.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_fault(error, Experiment)}") from None


def describe_fault(error: ValidationError, schema: type[BaseModel]) -> str:
    """Say the first fault of a failed validation against `schema` as `key=value, what is wrong; what to do`."""
    faults = [fault for fault in error.errors() if not is_other_branch(fault["loc"], fault["input"])]
    faults = faults or error.errors()
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown or faults)[0]
    key = ".".join(str(part) for part in fault["loc"] if part not in UNION_BRANCHES)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}; {suggest_key(key, schema)}"
    if fault["type"] == "missing":
        return f"{key} is missing; add it"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if fault["type"] == "string_pattern_mismatch":
        message = "is not a name; use up to 64 letters, digits, dots, dashes and underscores, starting with a letter or digit"
        return f"{key}={fault['input']!r}, {message}"
    return f"{key}={fault['input']!r}, is refused: {message[0].lower()}{message[1:]}; mend it"


def is_other_branch(loc: tuple[int | str, ...], value: Any) -> bool:  # noqa: ANN401 - any TOML value
    """Say whether a fault is that of the alternative which the user did not write: a number where a rule stands, or a rule."""
    branch = next((part for part in loc if part in UNION_BRANCHES), None)
    if branch is None or loc[-1] != branch:
        return False
    return isinstance(value, dict) == (branch not in RULES)


def suggest_key(key: str, schema: type[BaseModel]) -> str:
    """Return "did you mean ..." for an unknown dotted key, or the list of keys where nothing is near."""
    known = list_keys(schema)
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    moved = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == last]
    if matches or moved:
        return f"did you mean {(moved or matches)[0]}?"
    prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
    siblings = [name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return f"use one of {', '.join(siblings)}"


def list_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """List every dotted key of a file's schema."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += list_keys(field.annotation, f"{prefix}{name}.")
    return keys


def run_command_line(app: Callable[[], None]) -> None:
    """Run a command line; bad input ends in one line and status 2, a refusal of the disk in one line and status 1."""
    try:
        app()
    except ValueError as error:
        from data_prep.shards import DataError  # here, since numpy comes with it and --help should not wait for it
        from model.size import SizeError

        if not isinstance(error, ConfigError | DataError | SizeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
