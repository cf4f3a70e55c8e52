"""A data directory in the file formats of other programs."""

from pathlib import Path

import numpy as np

from data_prep.shards import SPLITS, DataError, TokenShards, load_manifest, sync_file

FORMATS = ("llmc",)
LLMC_MAGIC = 20240520
LLMC_VERSION = 1
LLMC_HEADER_INTS = 256
LLMC_MAX_TOKENS = 2**31 - 1  # the count in the header is an int32
CHUNK_IDS = 1 << 22


def export_llmc(data_dir: Path, out: Path) -> list[Path]:
    """Write each split in the format of llm.c and modded-nanogpt: a header of 256 int32, then uint16 ids.

    Source: llm.c, dev/data/data_common.py, write_datafile: magic 20240520, version 1, number of tokens.
    Note: those programs put the end of text before a document, here it stands behind it; the stream is the same but for one id.
    Raises: DataError when ids are wider than uint16 or the target is not empty.
    """
    manifest = load_manifest(data_dir)
    if manifest.dtype != "uint16":
        raise DataError(f"{data_dir}: dtype={manifest.dtype}, llm.c's version 1 holds uint16; prepare with a smaller vocabulary")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for split in SPLITS:
        shards = TokenShards.open(data_dir, split, manifest)
        start = 0
        for number, shard in enumerate(manifest.splits[split].shards):
            path = out / f"{data_dir.resolve().name}_{split}_{number:06d}.bin"
            _write_llmc(path, shards, start, start + shard.tokens)
            start += shard.tokens
            written.append(path)
    return written


def _write_llmc(path: Path, shards: TokenShards, start: int, stop: int) -> None:
    if stop - start > LLMC_MAX_TOKENS:
        raise DataError(f"{path}: {stop - start:,} tokens, its header counts up to {LLMC_MAX_TOKENS:,}; prepare smaller shards")
    header = np.zeros(LLMC_HEADER_INTS, dtype="<i4")
    header[:3] = LLMC_MAGIC, LLMC_VERSION, stop - start
    with path.open("wb") as file:
        file.write(header.tobytes())
        for begin in range(start, stop, CHUNK_IDS):
            file.write(shards.read(begin, min(begin + CHUNK_IDS, stop)).astype("<u2", copy=False).tobytes())
        sync_file(file)
