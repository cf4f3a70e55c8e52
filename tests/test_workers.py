"""Worker processes: the bytes do not depend on them, nor on where they were killed or stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from data_prep.prepare import prepare, verify
from data_prep.shards import DataError
from data_prep.stop import FAULT_VARIABLE
from data_prep.workplace import work_path

N_WORKERS = 2

DRIVER = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
from data_prep.stop import StoppedError
if __name__ == "__main__":
    data, text, unit_bytes, workers = sys.argv[1:5]
    try:
        prepare("files", Path(data), input=Path(text), tokenizer="byte", val_fraction=0.2,
                unit_bytes=int(unit_bytes), workers=int(workers), max_shard_tokens=40_000)
    except StoppedError:
        print("stopped as asked")
"""


def bytes_of(data_dir: Path) -> dict[str, bytes]:
    """Everything of a data directory but the time it was made at."""
    files = {str(path.relative_to(data_dir)): path.read_bytes() for path in sorted(data_dir.rglob("*")) if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["created_utc"]
    return files | {"manifest.json": json.dumps(manifest, sort_keys=True).encode()}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 0.5 MB of jsonl: 1,500 documents of all lengths, every tenth a copy of another."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    with path.open("w") as file:
        for number in range(1500):
            n = (number - 7 if number % 10 == 9 else number) * 7919 % 1009
            file.write(json.dumps({"text": f"document {n} " + "lorem ipsum é " * (n % 50)}) + "\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> dict[str, bytes]:
    data_dir = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare("files", data_dir, input=text, tokenizer="byte", val_fraction=0.2, workers=1, max_shard_tokens=40_000)
    assert verify(data_dir) == []
    return bytes_of(data_dir)


def start(data_dir: Path, text: Path, fault: str | None = None, workers: int = N_WORKERS, unit_bytes: int = 20_000):
    """Start a preparation as the leader of a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({FAULT_VARIABLE: fault} if fault else {})
    driver = data_dir.parent / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, driver, data_dir, text, str(unit_bytes), str(workers)]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def journal(data_dir: Path) -> list[str]:
    path = work_path(data_dir) / "journal"
    return path.read_text().splitlines() if path.exists() else []


def committed(data_dir: Path) -> int:
    return len([path for path in (work_path(data_dir) / "parts").glob("*.json") if not path.name.startswith(".")])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_bytes_do_not_depend_on_workers_nor_on_units(text, undisturbed, tmp_path, workers):
    choices = {"tokenizer": "byte", "val_fraction": 0.2, "max_shard_tokens": 40_000}
    prepare("files", tmp_path / "data", input=text, workers=workers, unit_bytes=60_000, **choices)
    assert bytes_of(tmp_path / "data") == undisturbed
    assert not work_path(tmp_path / "data").exists()


# Twenty kills, one after the other, in one directory: each falls at another place, and the next start goes on.
KILLS = [
    *(f"map@{n}" for n in (0, 0, 1, 1, 2, 2, 3)),
    *(f"commit@{n}" for n in (0, 0, 1, 1, 2)),
    *(f"pack@{n}" for n in (0, 5, 11)),
    *("manifest", "manifest", "publish", "publish", "cleanup"),
]


def test_twenty_kills_change_no_byte_and_redo_at_most_a_unit_per_worker(text, undisturbed, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    assert len(KILLS) == 20
    log: list[str] = []
    for kill in KILLS:
        n_before = committed(data_dir)
        process = start(data_dir, text, fault=kill)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"{kill} did not land: {errors}"
        if kill == "cleanup":
            break
        assert committed(data_dir) >= n_before, "what was committed is kept"
        log = journal(data_dir)
        assert not data_dir.exists(), "absent or complete"
    assert (data_dir / "manifest.json").exists()
    process = start(data_dir, text)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert bytes_of(data_dir) == undisturbed
    assert not work_path(data_dir).exists(), "the leftover of the last kill is cleared"
    begun = [line for line in log if line.startswith("begin")]
    n_units = len(set(begun))
    n_map_kills = sum(kill.startswith(("map", "commit")) for kill in KILLS)
    assert n_units > 20
    assert 0 < len(begun) - n_units <= N_WORKERS * n_map_kills
    done = [line for line in log if line.startswith("commit")]
    assert len(done) - len(set(done)) <= n_map_kills, "only what was committed in the instant of a kill is done again"


def wait_for(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


@pytest.mark.parametrize("n_committed", [1, 9])
@pytest.mark.parametrize("workers", [1, N_WORKERS])
def test_sigterm_leaves_a_state_to_go_on_from(text, undisturbed, tmp_path, n_committed, workers):
    data_dir = tmp_path / "data"
    process = start(data_dir, text, workers=workers, unit_bytes=8_000)
    wait_for(lambda: committed(data_dir) >= n_committed or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "stopped as asked\n"), errors
    assert not data_dir.exists()
    n = committed(data_dir)
    assert n >= n_committed
    assert not list((work_path(data_dir) / "parts").glob(".*")), "no half-written part"
    before = set(journal(data_dir))
    process = start(data_dir, text, workers=workers, unit_bytes=8_000)
    assert process.wait(30) == 0
    process.communicate()
    assert {line for line in before if line.startswith("commit")}, "some units were done before"
    assert bytes_of(data_dir) == undisturbed


def test_killing_one_worker_is_one_line_and_the_rest_is_kept(text, undisturbed, tmp_path):
    data_dir = tmp_path / "data"
    process = start(data_dir, text, unit_bytes=8_000)
    wait_for(lambda: committed(data_dir) >= 3 or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == N_WORKERS
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "died by signal 9 (SIGKILL); if memory ran out use fewer --workers; run it again" in errors
    assert committed(data_dir) >= 3
    process = start(data_dir, text, unit_bytes=8_000)
    assert process.wait(30) == 0
    process.communicate()
    assert bytes_of(data_dir) == undisturbed


def test_workers_end_with_a_parent_that_was_killed(text, tmp_path):
    data_dir = tmp_path / "data"
    process = start(data_dir, text, unit_bytes=2_000)
    wait_for(lambda: committed(data_dir) >= 3)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not group_members(process.pid), timeout_s=10)


def group_members(group: int) -> list[int]:
    members = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(path.name))
    return members


def test_a_second_preparation_in_the_same_directory_is_refused(text, undisturbed, tmp_path):
    data_dir = tmp_path / "data"
    process = start(data_dir, text, unit_bytes=2_000, workers=1)
    wait_for(lambda: committed(data_dir) >= 1)
    with pytest.raises(DataError, match=r"data.work: another preparation is at work here; wait for it, or choose"):
        prepare("files", data_dir, input=text, tokenizer="byte")
    assert process.wait(60) == 0
    process.communicate()
    assert bytes_of(data_dir) == undisturbed


def test_nodes_share_the_work_and_one_packs(text, undisturbed, tmp_path):
    choices = {"input": text, "tokenizer": "byte", "val_fraction": 0.2, "max_shard_tokens": 40_000, "unit_bytes": 20_000}
    from data_prep.prepare import NodeDone, prepare_request
    from data_prep.recipe import Request

    left = []
    for node in (2, 0, 1):
        done = prepare_request(Request("files", tmp_path / "data", node_index=node, num_nodes=3, workers=1, **choices))
        assert isinstance(done, NodeDone)
        left.append(done.n_left)
        assert not (tmp_path / "data").exists()
    assert left[0] > left[1] > left[2] == 0
    begun = [line for line in journal(tmp_path / "data") if line.startswith("begin")]
    assert len(begun) == len(set(begun)) == done.n_units, "no unit is done twice"
    prepare("files", tmp_path / "data", workers=1, **choices)
    assert bytes_of(tmp_path / "data") == undisturbed


def test_nodes_at_the_same_time_do_no_harm(text, undisturbed, tmp_path):
    choices = ["--input", text, "--tokenizer", "byte", "--val-fraction", "0.2", "--dir", tmp_path / "data"]
    command = [sys.executable, "-m", "data_prep", "prepare", "files", *choices, "--workers", "1"]
    nodes = [subprocess.Popen([*command, "--num-nodes", "2", "--node-index", str(n)], stdout=subprocess.PIPE) for n in range(2)]
    for node in nodes:
        node.communicate(timeout=60)
        assert node.returncode == 0
    packed = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "tokens" in packed.stdout
    assert verify(tmp_path / "data") == []
