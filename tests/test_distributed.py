"""Two real gloo ranks train as one process does, and one rank needs no group."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, plan_into, read_summaries

from harness.config import ConfigError, EngineSection
from harness.distributed import Ranks, describe_machine, join_ranks
from harness.runs import iter_metrics
from harness.train import run_attempt


def test_two_ranks_train_as_one(data_dir: Path, tmp_path: Path) -> None:
    """Real gloo ranks under torchrun, accumulation on: receipts equal, losses within 1e-5 relative per step."""
    engine = {"device": "cpu", "micro_batch_size": 2}
    alone, together = plan_into(tmp_path / "1", data_dir), plan_into(tmp_path / "2", data_dir, engine=engine)
    run_attempt(alone, None, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["-m", "harness.train", str(together)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    one, two = ({(r["cell_id"], r["kind"], r["step"]): r for r in iter_metrics(d)} for d in (alone, together))
    assert one.keys() == two.keys()
    for key, row in one.items():
        for name in {"train_loss", "val_loss", "grad_norm"} & row.keys():
            assert two[key][name] == pytest.approx(row[name], rel=1e-5), (key, name)
        assert row.get("receipt") == two[key].get("receipt")
    assert {summary["world_size"] for summary in read_summaries(together)} == {2}
    assert np.allclose([s["val_loss"] for s in read_summaries(alone)], [s["val_loss"] for s in read_summaries(together)])


def test_one_rank_is_alone_and_free() -> None:
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.world_size) == (0, 1)
    values = np.array([1.0, 2.0])
    assert ranks.sum(values) is values
    assert ranks.share("x") == "x"
    ranks.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(ConfigError, match=r'engine\.device="cuda", this machine has no usable CUDA device'):
        join_ranks("cuda")


def test_the_machine_is_described_without_a_host_name() -> None:
    facts = describe_machine(Ranks(0, 1, torch.device("cpu")), EngineSection())
    assert facts["torch_version"] == torch.__version__
    assert facts["n_threads"] == torch.get_num_threads()
    assert os.uname().nodename not in map(str, facts.values())
