"""What the engines can do together, and the one DeepSpeed configuration that follows from a run. No torch, no deepspeed."""

from typing import Any

from harness.config import EngineSection
from harness.records import What

BUCKET_ELEMENTS = 20_000_000  # DeepSpeed's 5e8 allocates buffers of gigabytes; these models gain nothing from them
NEVER = 2**31 - 1


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
