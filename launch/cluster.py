"""A cluster is one TOML file of launch/clusters: what there is, and how runs share it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness.config import ConfigError, Section, describe_fault, read_toml
from harness.cost import Machine

CLUSTERS_DIR = Path(__file__).parent / "clusters"


class Cluster(Section):
    """A place where runs can be started."""

    scheduler: Literal["local"]
    slots: Literal["auto"] | int = Field(default="auto")
    threads_per_slot: Literal["all"] | int = Field(default=1)
    machine: Machine | None = None  # for the forecast; None: this machine's cores

    @property
    def n_threads(self) -> int | None:
        """CPU threads of a run, None where it may take every core."""
        return None if self.threads_per_slot == "all" else self.threads_per_slot


def load_cluster(name: str) -> Cluster:
    """Read a cluster by name (a file of launch/clusters) or by the path of a TOML file.

    Raises:
        ConfigError: no such cluster, or a fault in its file.
    """
    path = Path(name) if name.endswith(".toml") else CLUSTERS_DIR / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in CLUSTERS_DIR.glob("*.toml")))
        raise ConfigError(f"--cluster={name}, there is no {path.name}; use one of {known}, or the path of a cluster file")
    try:
        cluster = Cluster.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {describe_fault(error, Cluster)}") from None
    if cluster.slots != "auto" and cluster.slots < 1:
        raise ConfigError(f'{path.name}: slots={cluster.slots}, no run could start; use "auto" or 1 and more')
    if cluster.n_threads is not None and cluster.n_threads < 1:
        raise ConfigError(f'{path.name}: threads_per_slot={cluster.n_threads}, is refused; use "all" or 1 and more')
    return cluster


def list_gpus() -> list[str]:
    """Return the ids of the GPUs that runs may use: CUDA_VISIBLE_DEVICES where set, else what nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return [str(index) for index, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]


def list_slots(cluster: Cluster) -> list[str | None]:
    """Return one entry per run that may run at a time: the GPU it gets, or None for CPU threads."""
    gpus = list_gpus()
    if cluster.slots != "auto":
        return [gpus[index % len(gpus)] if gpus else None for index in range(cluster.slots)]
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return list(gpus) or [None] * max(1, n_cpus // (cluster.n_threads or n_cpus))
