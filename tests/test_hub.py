"""Data sets of the hub: the streaming path on files of this machine with the hub switched off, and every failure in one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.errors as hub_errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from data_prep import hub as hub_module
from data_prep.documents import BadDocument, HubData, Span
from data_prep.hub import hub_record, iter_hub, one_line_errors, pin_revision
from data_prep.shards import DataError

TEXTS = [f"document {number} " + "words " * (number % 7) for number in range(40)]

PREPARE = """
import sys
from pathlib import Path
from data_prep.documents import HubData
from data_prep.prepare import prepare, verify
if __name__ == "__main__":
    data, kind, workers, *files = sys.argv[1:]
    hub = HubData(kind, data_files=tuple(files))
    made = prepare("fineweb-edu-10bt", Path(data), hub=hub, tokenizer="byte", val_fraction=0.3, workers=int(workers))
    assert verify(Path(data)) == []
    print(made.manifest.content_id, made.manifest.counters["documents_in"], made.manifest.counters["documents_duplicate"])
"""


def write_parquet(folder: Path) -> list[Path]:
    paths = [folder / "a.parquet", folder / "b.parquet"]
    pq.write_table(pa.table({"text": TEXTS[:25], "id": range(25)}), paths[0], row_group_size=10)
    pq.write_table(pa.table({"text": [*TEXTS[25:], TEXTS[0]], "id": range(16)}), paths[1], row_group_size=10)
    return paths


def write_jsonl(folder: Path) -> list[Path]:
    paths = []
    for name, texts in (("a", TEXTS[:25]), ("b", [*TEXTS[25:], TEXTS[0]])):
        path = folder / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
        paths.append(path)
    return paths


def run_offline(folder: Path, data: str, kind: str, workers: int, files: list[Path]) -> list[str]:
    (folder / "driver.py").write_text(PREPARE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, folder / "driver.py", folder / data, kind, str(workers), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_parquet_and_jsonl_stream_to_equal_shards_with_the_hub_switched_off(tmp_path):
    of_parquet = run_offline(tmp_path, "p", "parquet", 2, write_parquet(tmp_path))
    of_jsonl = run_offline(tmp_path, "j", "json", 1, write_jsonl(tmp_path))
    assert of_parquet == of_jsonl
    assert of_parquet[1:] == ["41", "1"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_units_are_row_groups_and_their_order_is_the_files(tmp_path, offline):
    paths = write_parquet(tmp_path)
    hub = HubData("parquet", data_files=tuple(map(str, paths)))
    assert hub_module.count_shards(hub) == 5
    found = [item.text for number in range(5) for item in iter_hub(hub, Span(0, number, number + 1), "text")]
    assert found == [*TEXTS, TEXTS[0]]


def test_a_missing_column_and_a_null_are_told(tmp_path, offline):
    hub = HubData("parquet", data_files=(str(write_parquet(tmp_path)[0]),))
    with pytest.raises(DataError, match=r"parquet: text_key=body, no such column \(there: text, id\); give --text-key"):
        list(iter_hub(hub, Span(0), "body"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "n.parquet")
    _, bad = iter_hub(HubData("parquet", data_files=(str(tmp_path / "n.parquet"),)), Span(0), "text")
    assert isinstance(bad, BadDocument)
    assert "shard 0, row 2: text is NoneType" in bad.reason


def test_the_revision_is_pinned_and_recorded(monkeypatch):
    class Api:
        def dataset_info(self, path, revision):
            assert (path, revision) == ("owner/name", "main")
            return type("Info", (), {"sha": "c0ffee" * 6 + "1234"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    pinned = pin_revision(HubData("owner/name", "config", revision="main"))
    assert pinned == HubData("owner/name", "config", "train", "c0ffee" * 6 + "1234")
    assert pin_revision(pinned) is pinned, "a commit is not looked up again"
    record = hub_record(pinned)
    assert (record.revision, record.label) == (pinned.revision, "owner/name config train at c0ffeec0ffee")
    assert record.sha256 != hub_record(HubData("owner/name", "config", "train", "0" * 40)).sha256


class TransportError(Exception):
    """As the http library under the hub's client names the father of its errors; that library changes."""


class ConnectTimeout(TransportError):  # noqa: N818
    pass


def bare(kind: type[Exception], message: str) -> Exception:
    """Make an error of the hub's client without the http response that it wants."""
    return kind.__new__(kind, message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub cannot be reached (ConnectionError: Couldn't"),
        (ConnectTimeout("timed out"), "the hub cannot be reached (ConnectTimeout: timed out); try again, or prepare local"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE=1 and the data set is not in the cache"),
        (bare(hub_errors.GatedRepoError, "gated"), "gated: its owners must let you in; ask on its page"),
        (bare(hub_errors.RepositoryNotFoundError, "404"), "no data set of that name that you may read; it was renamed"),
        (bare(hub_errors.RevisionNotFoundError, "404"), "no such revision or file in it"),
        (FileNotFoundError("a/b/x.parquet"), "no data files (a/b/x.parquet); it was renamed or moved"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "a data set script, which is no longer"),
    ],
)
def test_every_failure_is_one_line_with_a_way_out(error, message, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(DataError) as caught, one_line_errors(HubData("a/b")):
        raise error
    assert str(caught.value).startswith(f"a/b: {message}")
    assert "\n" not in str(caught.value)


def test_what_is_not_the_hubs_fault_is_not_reworded():
    with pytest.raises(ZeroDivisionError), one_line_errors(HubData("a/b")):
        raise ZeroDivisionError


@pytest.mark.parametrize("preset", ["openwebtext", "fineweb-edu-10bt"])
def test_without_a_hub_a_preset_ends_in_one_line_and_leaves_nothing(preset, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "data_prep", "prepare", preset, "--dir", tmp_path / "data"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "HF_HUB_OFFLINE=1 and the data set is not in the cache of this machine" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob(".data*"))
