"""Export to llm.c, read back by a reader written from the published layout."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.export import export_llmc
from data_prep.prepare import prepare
from data_prep.shards import DataError, TokenShards


def read_llmc(path: Path) -> list[int]:
    """llm.c, llmc/dataloader.h: 256 int32, magic 20240520, version 1, token count; then that many uint16."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    ids = struct.unpack(f"<{header[2]}H", data[1024:])
    return list(ids)


@pytest.mark.parametrize("max_shard_tokens", [500, 100_000])
def test_the_exported_stream_is_the_stream(tmp_path, max_shard_tokens):
    (tmp_path / "a.txt").write_text("Now is the winter of our discontent. " * 60)
    choices = {"tokenizer": "gpt2", "split": "tail", "max_shard_tokens": max_shard_tokens}
    prepare("files", tmp_path / "data", input=tmp_path / "a.txt", val_fraction=0.2, **choices)
    written = export_llmc(tmp_path / "data", tmp_path / "out")
    for split in ("train", "val"):
        files = [path for path in written if path.name.startswith(f"data_{split}_")]
        shards = TokenShards.open(tmp_path / "data", split)
        assert [token for path in files for token in read_llmc(path)] == shards.read(0, shards.n_tokens).tolist()
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    assert (tmp_path / "out/data_val_000000.bin").exists()
    with pytest.raises(DataError, match=r"out: not empty; choose another --out"):
        export_llmc(tmp_path / "data", tmp_path / "out")


def test_wide_ids_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc " * 60)
    monkeypatch.setattr("data_prep.stages.dtype_for", lambda vocab_size: "uint32")
    prepare("text", tmp_path / "data", input=tmp_path / "a.txt")
    assert TokenShards.open(tmp_path / "data", "val").dtype == np.uint32
    with pytest.raises(DataError, match=r"data: dtype=uint32, llm.c's version 1 holds uint16"):
        export_llmc(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
