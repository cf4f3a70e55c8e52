"""What the engines can do together, and the one DeepSpeed configuration that follows from a run. No torch, no deepspeed."""

import json
from typing import Any

from harness.config import ConfigError, EngineSection
from harness.records import Plan, What

BUCKET_ELEMENTS = 20_000_000  # DeepSpeed's 5e8 allocates buffers of gigabytes; these models gain nothing from them
NEVER = 2**31 - 1
STATE_BYTES = 16  # a parameter's weight, gradient and two moments, all fp32
FITS_BYTES = 24e9  # of them, beside activations, on one device of 40 GB


def check_engine(what: What, engine: EngineSection) -> None:
    """Refuse a combination that cannot work, before anything is started.

    Raises:
        ConfigError: precision, optimiser or setting do not go with the engine.
    """
    uses_zero = engine.kind == "deepspeed" and engine.zero_stage > 0
    if what.precision == "bf16_native" and not uses_zero:
        where = f"engine.zero_stage={engine.zero_stage}" if engine.kind == "deepspeed" else 'engine.kind="torch"'
        raise ConfigError(
            f'precision="bf16_native", does not go with {where}, which keeps no fp32 weights beside the bf16 ones; '
            'use "bf16_autocast", or engine.kind = "deepspeed" with zero_stage 1, 2 or 3'
        )
    if what.optim.kind == "muon" and engine.kind == "deepspeed":
        raise ConfigError(
            'optim.kind="muon", needs whole matrices and ZeRO cuts them into flat pieces; use engine.kind = "torch", or "adamw"'
        )
    if what.optim.kind == "muon" and what.model.parametrization == "mup":
        raise ConfigError('optim.kind="muon", has no mup factors (they are derived for Adam); use "adamw", or drop mup')
    if engine.offload_optimizer and not uses_zero:
        raise ConfigError(
            'engine.offload_optimizer=true, belongs to ZeRO; use engine.kind = "deepspeed" with zero_stage 1, 2 or 3, or drop it'
        )
    if engine.offload_optimizer and what.precision == "bf16_native" and engine.zero_stage < 3:
        raise ConfigError(
            f"engine.zero_stage={engine.zero_stage}, offloaded in bf16_native DeepSpeed 0.19.8 accumulates micro-steps in bf16, "
            "and does not recover from one gradient that is not finite; use zero_stage = 3, or drop offload_optimizer"
        )


def list_cautions(plan: Plan) -> list[str]:
    """Say what of a plan's engine will work and is likely not meant."""
    engine, cautions = plan.runs[0].how.engine, []
    state_bytes = STATE_BYTES * max(cell.n_params for cell in plan.cells)
    if engine.kind == "deepspeed" and engine.zero_stage == 3 and state_bytes < FITS_BYTES:
        cautions.append(
            f"engine.zero_stage=3, but the largest model's weights, gradients and moments are {state_bytes / 1e9:.2g} GB, which "
            "one device holds; stage 3 gathers every weight twice a micro-step: use 0 or 1"
        )
    dropout = max(run.what.model.dropout for run in plan.runs)
    if dropout and (engine.world_size or 1) > 1:
        cautions.append(
            f"model.dropout={dropout:g}, draws other masks on each rank: losses at another world size agree in distribution only"
        )
    return cautions


def render_zero_config(what: What, engine: EngineSection, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run on so many ranks; there is no other file to keep in step.

    Note: the learning rate, its schedule and the optimiser are ours, so they do not stand here.
    """
    batch = what.optim.global_batch_size
    micro_batch = engine.micro_batch_size or batch // world_size
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": engine.zero_stage >= 2,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch // (micro_batch * world_size),
        "gradient_clipping": (what.optim.grad_clip or 0.0) if engine.zero_stage else 0.0,  # at stage 0 the engine clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW updates offloaded state: nothing to compile
        "bf16": {"enabled": what.precision == "bf16_native"},
        "torch_autocast": {
            "enabled": what.precision == "bf16_autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # by default gradients of linear layers would cross the ranks in bf16
        },
        "data_types": {"grad_accum_dtype": "fp32"},  # DeepSpeed would accumulate in bf16 under bf16_native
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def show_zero_configs(plan: Plan) -> str:
    """Return each run's configuration as JSON, under its id, for the planned ranks or one.

    Raises:
        ConfigError: the engine is torch.
    """
    if plan.runs[0].how.engine.kind != "deepspeed":
        raise ConfigError('engine.kind="torch", has no DeepSpeed configuration; try --set \'engine.kind="deepspeed"\'')
    world_size = plan.runs[0].how.engine.world_size or 1
    configs = {run.run_id: render_zero_config(run.what, run.how.engine, world_size) for run in plan.runs}
    return json.dumps(configs, indent=2)
