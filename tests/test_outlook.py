"""The page of every shipped experiment, held in golden files; what changed since the last plan; the question about cost.

HARNESS_UPDATE_GOLDEN=1 writes the files anew: look at the difference.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_experiment
from fake_experiment import write_experiment

from harness.config import ConfigError, Experiment, load_experiment
from harness.cost import Machine, forecast_plan
from harness.outlook import compare_plan, confirm_cost, print_plan, render_difference
from harness.plan import plan_experiment

SHIPPED = sorted(path.stem for path in (ROOT / "launch/experiments").glob("*.toml"))
# What each prepared directory holds, so that the pages need no text: vocabulary, training and validation tokens.
FACTS = {
    "data/demo": (65, 1_003_854, 111_540),
    "data/shakespeare-char": (65, 1_003_854, 111_540),
    "data/shakespeare-gpt2": (50_257, 301_966, 36_059),
    "data/gutenberg-bpe512": (512, 74_038_886, 4_529_215),
}


MACHINES = {
    "paper_70b": Machine(device="H100", n_devices=1024),
    "paper_175b": Machine(device="H100", n_devices=1024),
    "gpt2_sizes": Machine(device="H100"),
}


def load_on_paper(name: str) -> Experiment:
    """Read a shipped experiment with the figures of its data in place of the directory."""
    experiment = load_experiment(ROOT / f"launch/experiments/{name}.toml")
    if experiment.data.dir is None:
        return experiment
    vocab_size, train, val = FACTS[experiment.data.dir]
    data = experiment.data.model_dump(exclude={"dir", "on_paper"})
    paper = {"vocab_size": vocab_size, "train_tokens": train, "val_tokens": val}
    return Experiment.model_validate(experiment.model_dump() | {"data": data | {"on_paper": paper}})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_plan_cleanly_and_look_as_they_should(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = load_on_paper(name)
    machine = MACHINES.get(name, Machine(device="CPU", n_devices=2))
    plan = forecast_plan(plan_experiment(experiment), machine)
    print_plan(plan, experiment)
    page, golden = capsys.readouterr().out, ROOT / f"tests/golden/plan_{name}.txt"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        golden.write_text(page)
    assert page == golden.read_text()


def test_the_sizes_of_gpt_3_cost_what_was_published() -> None:
    plan = plan_experiment(load_on_paper("paper_175b"))
    largest = plan.cells[-1]
    assert largest.flops_6nd == pytest.approx(3.14e23, rel=0.01)  # Brown et al. 2020, table D.1
    assert largest.n_params == pytest.approx(175e9, rel=0.01)


@pytest.mark.parametrize("name", ["paper_70b", "paper_175b"])
def test_a_ladder_on_a_thousand_gpus_is_planned_in_seconds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "plan", str(ROOT / f"launch/experiments/{name}.toml"), "--device", "H100"]
    best = min(run_timed([*command, "--devices", "1024"], tmp_path) for _ in range(2))
    assert best < 2.0
    assert not list(tmp_path.iterdir()), "on paper, nothing is written"


def run_timed(command: list[str], cwd: Path) -> float:
    """Return the seconds of processor time, so that a busy machine does not matter."""
    started = os.times()
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "forecast (roofline)" in result.stdout
    ended = os.times()
    return ended.children_user + ended.children_system - started.children_user - started.children_system


# Not getrusage: a child's ru_maxrss begins at what its parent, here pytest with all it has loaded, held when it forked.
PLAN_AND_TELL_PEAK = """
import atexit, pathlib, sys
from harness.__main__ import app
def tell():
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    pathlib.Path("peak_kib").write_text(peak)
atexit.register(tell)
app(["plan", sys.argv[1]])
"""


def test_ten_thousand_cells_are_planned_within_five_seconds_and_500_mb(tmp_path: Path) -> None:
    sizes = ", ".join(f"{{ n_layer = {n}, n_head = {n}, d_model = {32 * n} }}" for n in range(2, 7))
    rates = ", ".join(f"{n}e-4" for n in range(1, 11))
    (tmp_path / "big.toml").write_text(
        'name = "big"\nprecision = "fp32"\n'
        "[data]\non_paper = { vocab_size = 512, train_tokens = 100_000_000_000, val_tokens = 1_000_000 }\nseq_len = 256\n"
        '[model]\npreset = "nanogpt"\n[optim]\nlr = 1e-3\nglobal_batch_size = 16\n[schedule]\nkind = "cosine"\n'
        f"[grid]\nsizes = [{sizes}]\nsteps = [400, 800, 1600, 3200, 6400]\nseeds = {list(range(10))}\n"
        f'axes = {{ "optim.lr" = [{rates}], "optim.weight_decay" = [0.0, 0.05, 0.1, 0.2] }}\n'
    )
    command = [sys.executable, "-c", PLAN_AND_TELL_PEAK, str(tmp_path / "big.toml")]
    assert min(run_timed(command, tmp_path) for _ in range(2)) < 5.0
    assert int((tmp_path / "peak_kib").read_text()) < 500 * 1024


def test_an_edited_file_keeps_finished_cells_and_the_difference_says_so(data_dir: Path, tmp_path: Path) -> None:
    experiment_dir = write_experiment(tmp_path, data_dir)
    grid = {
        "sizes": [{"n_layer": 1, "n_head": 2, "d_model": d} for d in (128, 64, 32, 16)],
        "tokens": [128 * 700, 128 * 400, 128 * 100],
    }
    difference = compare_plan(plan_experiment(tiny_experiment(data_dir, name="fake", grid=grid)), experiment_dir)
    assert (len(difference.new), len(difference.kept), len(difference.orphaned)) == (4, 8, 14)
    text = render_difference(difference, experiment_dir)
    assert re.search(r"4 new\n", text)
    assert "8 kept, 8 of them done" in text
    assert "14 orphaned, 14 of them done; no plan asks for them, nothing deletes them" in text
    assert f"- {difference.orphaned[0]} (done)" in text


def test_much_is_not_spent_without_a_yes(data_dir: Path) -> None:
    plan = forecast_plan(plan_experiment(tiny_experiment(data_dir)), Machine())
    assert plan.forecast is not None
    confirm_cost(plan.forecast, 1.0, yes=False)
    dear = plan.forecast.model_copy(update={"device_hours": 101.0})
    confirm_cost(dear, 100.0, yes=True)
    with pytest.raises(ConfigError, match=r"forecast: 101 device-hours, more than the limit of 100; add --yes"):
        confirm_cost(dear, 100.0, yes=False)
