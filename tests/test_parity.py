"""Every engine trains as one torch process does, on real gloo ranks; and the check sees each mistake that is planted."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_experiment
from test_end_to_end import write_toml
from typer.testing import CliRunner

from harness import parity
from harness.__main__ import app
from harness.distributed import Ranks
from harness.parity import Case, compare, find_reference, has_failed, launch, list_cases, plan_case, render_markdown, train_case
from harness.plan import plan_experiment
from harness.runs import write_json

PROGRAM = (str(ROOT / "tests/on_ranks.py"),)
N_STEPS = 10
ALONE = [Case("fp32", "torch", 0, 1, 1), Case("bf16_autocast", "torch", 0, 1, 1), Case("fp32", "torch", 0, 1, 4)]
SOUND = [
    Case("fp32", "torch", 0, 2, 4),
    Case("fp32", "deepspeed", 0, 2, 4),
    Case("fp32", "deepspeed", 1, 2, 1),
    Case("fp32", "deepspeed", 2, 2, 4),
    Case("fp32", "deepspeed", 3, 2, 4),
    Case("bf16_autocast", "deepspeed", 1, 2, 4),
    Case("bf16_native", "deepspeed", 1, 2, 4),
]
TORCH, ZERO = Case("fp32", "torch", 0, 2, 4), Case("fp32", "deepspeed", 1, 2, 4)
PLANTED = [("accumulation", TORCH), ("clipping", TORCH), ("decay", TORCH), ("schedule", TORCH), ("slices", TORCH)]
PLANTED_SLOW = [(mistake, ZERO) for mistake in ("accumulation", "decay", "schedule", "slices")]
ENGINES = [Case("fp32", "deepspeed", 1, 2, 4), Case("bf16_native", "deepspeed", 3, 2, 1)]
ENGINES_SLOW = [
    Case("fp32", "torch", 0, 2, 4),
    Case("fp32", "deepspeed", 0, 2, 4),
    Case("fp32", "deepspeed", 1, 2, 4, offload=True),
    Case("bf16_autocast", "deepspeed", 2, 2, 4),
    Case("bf16_autocast", "deepspeed", 2, 2, 4, offload=True),
    Case("fp32", "deepspeed", 3, 2, 4),
    Case("bf16_native", "deepspeed", 1, 2, 4),
    Case("bf16_native", "deepspeed", 2, 2, 4),
    Case("bf16_native", "deepspeed", 3, 2, 4, offload=True),
]


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one process's cases, here, and return the folder for all."""
    folder = tmp_path_factory.mktemp("parity")
    torch.set_num_threads(1)
    for case in ALONE:
        write_case(folder, data_dir, "none", case)
        train_case(folder / "none" / case.name, Ranks(0, 1, torch.device("cpu")))
    return folder


@pytest.fixture(scope="module")
def trained(data_dir: Path, folder: Path) -> Path:
    return train_on_ranks(data_dir, folder, {"none": SOUND, **{mistake: [case] for mistake, case in PLANTED}, "engine": ENGINES})


@pytest.fixture(scope="module")
def trained_slow(data_dir: Path, folder: Path) -> Path:
    return train_on_ranks(data_dir, folder, {**{mistake: [case] for mistake, case in PLANTED_SLOW}, "engine": ENGINES_SLOW})


def train_on_ranks(data_dir: Path, folder: Path, groups: dict[str, list[Case]]) -> Path:
    """Train groups of cases in one launch on two ranks."""
    names = [write_case(folder, data_dir, group, case) for group, cases in groups.items() for case in cases]
    status = launch(folder, names, 2, PROGRAM)
    assert status == 0, (folder / "ranks-2.log").read_text()[-4000:]
    return folder


def write_case(folder: Path, data_dir: Path, group: str, case: Case) -> str:
    grid = {"sizes": [{"n_layer": 1, "n_head": 2, "d_model": 16}], "steps": [N_STEPS]}
    plan = plan_experiment(tiny_experiment(data_dir, grid=grid, model={"preset": "gpt2"}, eval={"batch_size": 512}))
    write_json(folder / group / case.name / "run.json", plan_case(plan, case, N_STEPS).model_dump(mode="json"))
    return f"{group}/{case.name}"


def judge(folder: Path, case: Case, mistake: str = "none") -> dict[str, object]:
    return compare(case, folder / mistake / case.name, folder / "none" / find_reference(case).name)


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_every_engine_trains_as_one_torch_process(trained: Path, case: Case) -> None:
    row = judge(trained, case)
    assert row["verdict"] == ("measured" if case.precision == "bf16_native" else "holds"), row
    assert row["weights_distance"] < (1e-5 if case.precision == "fp32" else 1e-2)


def test_accumulation_alone_holds_too(folder: Path) -> None:
    assert judge(folder, ALONE[2])["verdict"] == "holds"


@pytest.mark.parametrize(("mistake", "case"), PLANTED, ids=str)
def test_a_planted_mistake_is_seen(trained: Path, mistake: str, case: Case) -> None:
    check_seen(trained, mistake, case)


@pytest.mark.ranks
@pytest.mark.parametrize(("mistake", "case"), PLANTED_SLOW, ids=str)
def test_a_planted_mistake_is_seen_under_zero(trained_slow: Path, mistake: str, case: Case) -> None:
    check_seen(trained_slow, mistake, case)


def check_seen(folder: Path, mistake: str, case: Case) -> None:
    row = judge(folder, case, mistake)
    assert row["verdict"].startswith("FAILS"), row
    assert has_failed([row])
    assert (row["verdict"] == "FAILS: other samples") == (mistake == "slices")


@pytest.mark.parametrize("case", ENGINES, ids=lambda case: case.name)
def test_a_skipped_step_leaves_no_trace_and_state_goes_on_bit_equal(trained: Path, case: Case) -> None:
    check_state(trained, case)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ENGINES_SLOW, ids=lambda case: case.name)
def test_so_it_is_on_every_engine(trained_slow: Path, case: Case) -> None:
    check_state(trained_slow, case)


def check_state(folder: Path, case: Case) -> None:
    seen = json.loads((folder / "engine" / case.name / "seen.json").read_text())
    assert seen["skipped"] == [1, 0]
    assert seen["apart"] == 0.0
    assert seen["first"] == seen["again"] == seen["fresh"]
    assert "latest" not in seen["files"]
    assert not [name for name in seen["files"] if name.endswith(".py")]
    if case.kind == "deepspeed" and case.zero_stage:
        assert len([name for name in seen["files"] if "optim_states" in name]) == 2, "one file a rank"


def test_the_list_covers_what_is_promised() -> None:
    cases = list_cases()
    assert len(set(cases)) == len({case.name for case in cases}) == len(cases)
    for precision in ("fp32", "bf16_autocast", "bf16_native"):
        for stage in range(4):
            shapes = {
                (c.world_size, c.accumulation)
                for c in cases
                if (c.precision, c.zero_stage, c.kind) == (precision, stage, "deepspeed")
            }
            assert shapes == {(1, 1), (1, 4), (2, 1), (2, 4)}


def test_a_case_that_did_not_finish_fails(trained: Path, tmp_path: Path) -> None:
    row = compare(TORCH, tmp_path / "nowhere", trained / "none" / find_reference(TORCH).name)
    assert row["verdict"] == "did not finish"
    assert has_failed([row])
    assert "did not finish" in render_markdown([row])


def test_the_command_tells_and_exits(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on three cheap cases of one rank; and again with nothing trained, where no old result may count."""
    cases = [Case("fp32", "torch", 0, 1, 1), Case("fp32", "deepspeed", 1, 1, 4), Case("bf16_native", "torch", 0, 1, 1)]
    monkeypatch.setattr(parity, "list_cases", lambda: cases)
    monkeypatch.setattr(parity, "WORLD_SIZES", (1,))
    arguments = ["verify", "parallel", str(write_toml(tmp_path, data_dir)), "--steps", "4", "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out/table.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["holds", "holds"], "torch has no bf16_native"
    monkeypatch.setattr(parity, "launch", lambda *_: 1)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert again.stdout.count("did not finish") == 2


@pytest.mark.ranks
def test_the_whole_table_holds(data_dir: Path, tmp_path: Path) -> None:
    rows = parity.verify_parallel(plan_experiment(tiny_experiment(data_dir)), tmp_path, 50)
    assert not has_failed(rows), render_markdown(rows)
    assert len(rows) == 59
