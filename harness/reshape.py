"""ZeRO's parts for another number of ranks: DeepSpeed's universal checkpoint, converted beside the original and read once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness.config import ConfigError
from harness.deepspeed_engine import TAG, DeepSpeedEngine
from harness.distributed import Ranks
from harness.engine import Engine

CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def read_reshaped(engine: Engine, ranks: Ranks, checkpoint: Path, scratch: Path, n_updates: int) -> None:
    """Take over a checkpoint that another number of ranks wrote; `scratch` holds the converted copy meanwhile.

    Raises:
        ConfigError: DeepSpeed cannot convert it.
    """
    assert isinstance(engine, DeepSpeedEngine), "other engines read their own checkpoints at any world size"
    try:
        ranks.decide(lambda: convert(checkpoint, scratch))
        engine.read_universal(scratch, n_updates)
    finally:
        ranks.decide(lambda: shutil.rmtree(scratch, ignore_errors=True))


def convert(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint in a process of its own, since the converter is a program that starts workers."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(checkpoint / TAG), "--output_folder", str(target / TAG)]
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        words = result.stderr.strip().splitlines()[-1:] or ["no output"]
        raise ConfigError(f"{checkpoint}: cannot be converted for another number of ranks ({words[0]}); start it as it was")
