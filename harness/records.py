"""The frozen values of a plan as they stand in JSON (harness/FORMAT.md), and how they are hashed. No torch.

A run's `what` fixes its results, and its hash is the id; the `how` may change between attempts.
"""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from harness.config import EngineSection, EvalSection, Precision, TrackSection
from harness.schedule import CooldownShape, Schedule, ScheduleKind
from model.size import ModelConfig

Role = Literal["grid", "repeat", "held_out", "scratch"]


class Record(BaseModel):
    """A frozen value that is written to and read from JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecord(Record):
    """The prepared data that the plan was made for."""

    dir: str
    content_id: str
    source: str
    is_fallback: bool
    tokenizer: str
    vocab_size: int
    train_tokens: int
    val_tokens: int
    val_bytes: int
    seq_len: int
    n_windows: int
    epoch_tokens: int
    metric_id: str


class Optim(Record):
    """The optimiser as resolved."""

    kind: Literal["adamw", "muon"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float | None
    global_batch_size: int
    skip_spikes: bool | None = None


class What(Record):
    """Everything that fixes a run's results, but for budgets under wsd."""

    model: ModelConfig
    precision: Precision
    data_content_id: str
    seed: int
    data_seed: int
    optim: Optim
    schedule: Schedule
    eval_stride: int
    n_steps: int | None  # the horizon; None under wsd, where budgets are cooldown branches of one trunk
    init_sha256: str | None = None  # of the weights that training starts from; None: drawn from the seed


class How(Record):
    """What may change without changing a result beyond rounding."""

    data_dir: str
    engine: EngineSection
    eval: EvalSection
    track: TrackSection
    init_from: str | None = None  # where the weights of what.init_sha256 lie


class CellRecord(Record):
    """One result of the plan; the fields are those of harness/FORMAT.md, cell.json."""

    cell_id: str
    run_id: str
    experiment: str
    role: Role
    size: str
    n_layer: int
    n_head: int
    d_model: int
    seq_len: int
    vocab_size: int
    seed: int
    data_seed: int
    n_params: int
    n_params_non_embedding: int
    n_params_matmul: int
    flops_per_token: int
    requested_tokens: int
    tokens: int
    n_steps: int
    branch_step: int
    n_cooldown_steps: int
    cooldown_shape: CooldownShape | None
    cooldown_min_lr_fraction: float | None
    flops: int
    flops_6nd: int
    flops_6nd_non_embedding: int
    unique_tokens: int
    epochs: float
    lr: float
    global_batch_size: int
    schedule: ScheduleKind
    precision: str
    stage: str | None = None  # of the video; None: the GPT
    parametrization: str | None = None  # None: standard


class RunRecord(Record):
    """One run of the plan: a trunk with its cooldown branches, or a single cell."""

    format: Literal["scaling-harness-run"] = "scaling-harness-run"
    format_version: Literal[1] = 1
    experiment: str
    run_id: str
    size: str
    seed: int
    what: What
    how: How
    data: DataRecord
    cells: tuple[CellRecord, ...]

    def with_engine(self, **changes: object) -> Self:
        """Return the run with other values of [engine]: how it is trained, not what."""
        engine = self.how.engine.model_copy(update=changes)
        return self.model_copy(update={"how": self.how.model_copy(update={"engine": engine})})

    @property
    def n_trunk_steps(self) -> int:
        """The last branch point."""
        return max(cell.branch_step for cell in self.cells)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimiser step, all ranks."""
        return self.what.optim.global_batch_size * self.what.model.seq_len

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run, the shared trunk counted once."""
        n_steps = self.n_trunk_steps + sum(cell.n_cooldown_steps for cell in self.cells)
        return n_steps * self.tokens_per_step * self.cells[0].flops_per_token


class Finding(Record):
    """Something in a plan that could confound its study. `field` is a key of the plan or of the experiment file."""

    severity: Literal["error", "warning"]
    rule: str
    field: str
    cells: tuple[str, ...]
    message: str  # names the first of the cells


class StageForecast(Record):
    """What a ZeRO stage would need at the largest micro-batch that fits; None where not one sequence does."""

    zero_stage: int
    micro_batch_size: int | None
    state_bytes: float
    peak_bytes: float
    step_s: float | None
    communication_s: float | None


class SizeForecast(Record):
    """What a step of one size needs on one rank, as planned, and under each ZeRO stage."""

    size: str
    n_params: int
    global_batch_size: int
    world_size: int
    micro_batch_size: int  # as planned; where that does not fit, the largest that does
    n_micro_steps: int
    fits: bool
    memory: dict[str, float]
    compute_s: float
    communication_s: float
    step_s: float
    stages: tuple[StageForecast, ...]


class CellForecast(Record):
    """What a cell takes: seconds in training steps on its path from step 0, and device-seconds that it adds to its run."""

    cell_id: str
    train_s: float
    device_s: float


class Forecast(Record):
    """What a plan will take on a machine. Units: hours times devices, seconds, bytes; price as given per device-hour."""

    basis: Literal["roofline", "probe"]
    device: str
    n_devices: int
    device_hours: float
    wall_s: float
    disk_bytes: float
    price: float | None
    sizes: tuple[SizeForecast, ...]
    cells: tuple[CellForecast, ...]


class Plan(Record):
    """The frozen plan of an experiment."""

    format: Literal["scaling-harness-plan"] = "scaling-harness-plan"
    format_version: Literal[1] = 1
    experiment: str
    created_utc: str
    source: dict[str, Any]
    data: DataRecord
    runs: tuple[RunRecord, ...]
    findings: tuple[Finding, ...] = ()  # what the lint warns of
    forecast: Forecast | None = None

    @property
    def cells(self) -> tuple[CellRecord, ...]:
        """All cells, run by run."""
        return tuple(cell for run in self.runs for cell in run.cells)


def hash_record(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a mapping's canonical JSON: sorted keys, no spaces, fields that are None left out."""
    return hashlib.sha256(json.dumps(drop_none(record), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def drop_none(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Leave out mapping entries that are None, at every depth."""
    if isinstance(value, dict):
        return {key: drop_none(item) for key, item in value.items() if item is not None}
    return [drop_none(item) for item in value] if isinstance(value, list) else value
