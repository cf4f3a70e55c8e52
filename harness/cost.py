"""What a plan takes on a machine: memory and seconds by size, device-hours, wall time, disk, money. No torch."""

import heapq
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError

from harness.accelerators import ACCELERATORS, GIB, Accelerator, find_accelerator
from harness.config import ConfigError, Positive, PositiveInt, Section, describe_fault, read_toml
from harness.estimate import (
    USABLE_MEMORY,
    Links,
    Setting,
    StepTime,
    add_communication,
    estimate_memory,
    estimate_step,
    find_micro_batch,
)
from harness.records import CellForecast, Forecast, Plan, RunRecord, SizeForecast, StageForecast
from model.size import ModelConfig, count_params

CLUSTERS_DIR = Path(__file__).resolve().parent.parent / "launch" / "clusters"  # files, read as such
KEEP_LAST = 2  # harness/checkpoint.py: checkpoints of a segment that are kept
ZERO_STAGES = (0, 1, 2, 3)
EVALUATION = 1 / 3  # of training: a forward pass alone


class Machine(Section):
    """Where a plan would run: the table [machine] of a cluster's file. Links one way: per device, and per node between nodes."""

    device: str = "CPU"
    n_devices: PositiveInt = 1
    devices_per_node: PositiveInt = 8
    intra_gb_per_s: Positive | None = None  # None: the device's data sheet
    inter_gb_per_s: Positive = 400.0  # eight links of 400 Gbit/s
    memory_gib: Positive | None = Field(default=None)  # None: the device's data sheet
    price_per_device_hour: Positive | None = None

    @property
    def accelerator(self) -> Accelerator:
        """The device's figures.

        Raises:
            ConfigError: the table does not know it.
        """
        found = find_accelerator(self.device)
        if found is None:
            known = ", ".join(accelerator.name for accelerator in ACCELERATORS)
            raise ConfigError(f"machine.device={self.device!r}, is not in the table of devices; use one of {known}")
        return found if self.memory_gib is None else replace(found, memory_bytes=self.memory_gib * GIB)

    @property
    def links(self) -> Links:
        """The links in bytes per second."""
        intra = self.intra_gb_per_s * 1e9 if self.intra_gb_per_s is not None else self.accelerator.link_bytes_per_s
        return Links(self.devices_per_node, intra, self.inter_gb_per_s * 1e9)


@dataclass(frozen=True)
class Measured:
    """What a probe found for a size on one rank. Units: seconds."""

    micro_step_s: float
    update_s: float


SizeKey = tuple[ModelConfig, int]  # the model and the global batch


def key_of(run: RunRecord) -> SizeKey:
    """Return what tells sizes apart as far as cost goes."""
    return run.what.model, run.what.optim.global_batch_size


def load_machine(name: str) -> Machine:
    """Read the table [machine] of a cluster's file, by name or path; a cluster without one is this machine.

    Raises:
        ConfigError: no such file, or a fault in its table.
    """
    path = Path(name) if name.endswith(".toml") else CLUSTERS_DIR / f"{name}.toml"
    table = read_toml(path).get("machine")
    if table is None:
        return describe_here()
    try:
        return Machine.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: machine.{describe_fault(error, Machine)}") from None


def describe_here() -> Machine:
    """Return this machine's processor, one thread a device."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(device="CPU", n_devices=n_cpus)


def forecast_plan(plan: Plan, machine: Machine, measured: Mapping[SizeKey, Measured] | None = None) -> Plan:
    """Return the plan with its forecast."""
    runs = {key_of(run): run for run in plan.runs}
    sizes = {key: forecast_size(run, machine, (measured or {}).get(key)) for key, run in runs.items()}
    cells = {run.run_id: forecast_cells(run, sizes[key_of(run)]) for run in plan.runs}
    device_s = {run_id: sum(cell.device_s for cell in found) for run_id, found in cells.items()}
    walls = [device_s[run.run_id] / sizes[key_of(run)].world_size for run in plan.runs]
    n_slots = max(1, machine.n_devices // max(size.world_size for size in sizes.values()))
    hours = sum(device_s.values()) / 3600
    price = machine.price_per_device_hour
    forecast = Forecast(
        basis="probe" if measured else "roofline",
        device=machine.accelerator.name,
        n_devices=machine.n_devices,
        device_hours=hours,
        wall_s=pack_runs(walls, n_slots),
        disk_bytes=estimate_disk(plan, n_slots),
        price=None if price is None else price * hours,
        sizes=tuple(sizes.values()),
        cells=tuple(cell for run in plan.runs for cell in cells[run.run_id]),
    )
    return plan.model_copy(update={"forecast": forecast})


def make_setting(run: RunRecord, machine: Machine) -> Setting:
    """Return how a rank of this run trains, as planned."""
    engine, batch = run.how.engine, run.what.optim.global_batch_size
    world_size = engine.world_size or 1
    micro_batch_size = engine.micro_batch_size or batch // world_size
    return Setting(
        precision=run.what.precision,
        micro_batch_size=micro_batch_size,
        n_micro_steps=batch // (micro_batch_size * world_size),
        kind=engine.kind,
        zero_stage=engine.zero_stage,
        world_size=world_size,
        on_cuda=machine.accelerator.name != "CPU",
        compile=engine.compile,
        activation_checkpointing=engine.activation_checkpointing,
        offload_optimizer=engine.offload_optimizer,
    )


def forecast_size(run: RunRecord, machine: Machine, measured: Measured | None) -> SizeForecast:
    """Forecast a step of one size; where the planned micro-batch does not fit, at the largest that does."""
    model, device = run.what.model, machine.accelerator
    setting = make_setting(run, machine)
    share = setting.micro_batch_size * setting.n_micro_steps
    fits = estimate_memory(model, setting).peak <= USABLE_MEMORY * device.memory_bytes
    largest = setting.micro_batch_size if fits else find_micro_batch(model, setting, device.memory_bytes, share)
    if largest is not None:
        setting = replace(setting, micro_batch_size=largest, n_micro_steps=share // largest)
    step = time_step(run, setting, machine, measured)
    memory = estimate_memory(model, setting)
    return SizeForecast(
        size=run.size,
        n_params=count_params(model).n_params,
        global_batch_size=run.what.optim.global_batch_size,
        world_size=setting.world_size,
        micro_batch_size=setting.micro_batch_size,
        n_micro_steps=setting.n_micro_steps,
        fits=fits,
        memory=asdict(memory) | {"peak": memory.peak},
        compute_s=step.compute_s,
        communication_s=step.communication_s,
        step_s=step.step_s,
        stages=tuple(forecast_stage(run, replace(setting, kind="deepspeed", zero_stage=k), machine, share) for k in ZERO_STAGES),
    )


def time_step(run: RunRecord, setting: Setting, machine: Machine, measured: Measured | None) -> StepTime:
    """Return a step's time: measured where there was a probe, else from the roofline."""
    if measured is None:
        return estimate_step(run.what.model, setting, machine.accelerator, machine.links)
    planned = make_setting(run, machine).micro_batch_size  # the probe's; time goes with the sequences
    micro_s = measured.micro_step_s * setting.micro_batch_size / planned
    compute_s = setting.n_micro_steps * micro_s + measured.update_s
    return add_communication(run.what.model, setting, machine.links, compute_s, micro_s)


def forecast_stage(run: RunRecord, setting: Setting, machine: Machine, share: int) -> StageForecast:
    """Forecast one ZeRO stage at its largest micro-batch, from the roofline."""
    model, device = run.what.model, machine.accelerator
    largest = find_micro_batch(model, setting, device.memory_bytes, share)
    setting = replace(setting, micro_batch_size=largest or 1, n_micro_steps=share // (largest or 1))
    memory = estimate_memory(model, setting)
    step = estimate_step(model, setting, device, machine.links) if largest is not None else None
    return StageForecast(
        zero_stage=setting.zero_stage,
        micro_batch_size=largest,
        state_bytes=memory.state,
        peak_bytes=memory.peak,
        step_s=step.step_s if step else None,
        communication_s=step.communication_s if step else None,
    )


def forecast_cells(run: RunRecord, size: SizeForecast) -> list[CellForecast]:
    """Forecast a run cell by cell: each adds the part of the trunk that only it needs, its cooldown, and evaluations."""
    pass_s = run.data.val_tokens * run.data.seq_len / run.what.eval_stride / run.tokens_per_step * size.compute_s * EVALUATION
    every = run.how.eval.every_tokens
    found, reached = [], 0
    for cell in run.cells:
        added = max(0, cell.branch_step - reached) + cell.n_cooldown_steps
        reached = max(reached, cell.branch_step)
        n_passes = 1 + (added * run.tokens_per_step // every if every else 0)
        seconds = added * size.step_s + n_passes * pass_s
        found.append(CellForecast(cell_id=cell.cell_id, train_s=cell.n_steps * size.step_s, device_s=seconds * size.world_size))
    return found


def pack_runs(seconds: list[float], n_slots: int) -> float:
    """Return the wall time of runs that start longest first, each as soon as a slot is free."""
    slots = [0.0] * n_slots
    for length in sorted(seconds, reverse=True):
        heapq.heapreplace(slots, slots[0] + length)
    return max(slots)


def estimate_disk(plan: Plan, n_slots: int) -> float:
    """Return the most bytes on disk at once: kept checkpoints of every trunk, those on their way, weights of every cell."""
    states = []
    for run in plan.runs:
        n = count_params(run.what.model).n_params
        per_parameter = {"torch": 12, "deepspeed": 16}[run.how.engine.kind] - 2 * (run.what.precision == "bf16_native")
        states.append(float(per_parameter * n))
    weights = sum(4.0 * cell.n_params for cell in plan.cells)
    on_their_way = sum(sorted(states)[-n_slots:]) * (KEEP_LAST + 1)  # of a cooldown, and one being written
    return KEEP_LAST * sum(states) + on_their_way + weights
