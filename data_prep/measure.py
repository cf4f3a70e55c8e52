"""python -m data_prep bench: preparation and batches side by side with nanoGPT's idioms, on this machine, in one run.

Every preparation is a process of its own on a fresh directory, so nothing is warm but the page cache; contenders take turns.
"""

import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_prep.bpe import BytePairTokenizer, gpt2_tokenizer
from data_prep.corpus import local_files
from data_prep.documents import Fragment, iter_span
from data_prep.meter import Clock
from data_prep.prepare import prepare, verify
from data_prep.sampler import WindowSampler
from data_prep.shards import DataError, TokenShards
from data_prep.units import plan_units

CONTENDERS = ("nanogpt", "tiktoken", "gigatoken")
N_WRITE_BATCHES = 1024  # as nanoGPT writes its memmap
BATCH_SHAPES = ((12, 64), (12, 1024), (64, 1024), (256, 256))
SAMPLE_BYTES = 24 << 20  # for the encoders alone
BLOCK_SAMPLES = 8192  # permutation indices at once, as harness/batches.py computes them
LIBRARIES = ("numpy", "datasets", "tiktoken", "gigatoken", "pyarrow", "torch")


def run_bench(inputs: list[Path], workers: int, repeats: int, tell: Callable[[str], None]) -> None:
    """Measure every part and tell each as it is known.

    Raises: DataError when there is no text.
    """
    tell(f"machine   {_processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}; {_versions()}")
    with tempfile.TemporaryDirectory() as folder:
        text = unpack(inputs, Path(folder) / "text.jsonl")
        (Path(folder) / "val.jsonl").write_text(json.dumps({"text": "A line that validates, for the split must not be empty."}))
        tell(f"text      {text.stat().st_size / 1e6:,.1f} MB of plain jsonl from {len(inputs)} files, {workers} processes each")
        data_dir = bench_preparation(text, workers, repeats, tell)
        bench_encoders(text, tell)
        bench_batches(data_dir, tell)


def unpack(inputs: list[Path], target: Path) -> Path:
    """Write the documents of some files as one plain jsonl file, each once."""
    source = local_files(inputs)
    with target.open("w") as file:
        for unit in plan_units(source):
            for span in unit:
                for item in iter_span(source.files[span.file], span, "text"):
                    if isinstance(item, Fragment):
                        file.write(json.dumps({"text": item.text}) + "\n")
    return target


# Preparation


def bench_preparation(text: Path, workers: int, repeats: int, tell: Callable[[str], None]) -> Path:
    """Prepare the text by each contender in turns; return our data directory."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if name != "gigatoken" or has_gigatoken()}
    if "gigatoken" not in found:
        tell("gigatoken is not installed: pip install gigatoken")
    for repeat in range(repeats):
        for name in found:
            out = text.parent / name
            shutil.rmtree(out, ignore_errors=True)
            found[name].append(_run_contender(name, text, out, workers))
            tell(f"run {repeat + 1}     {_told(name, found[name][-1])}")
    streams = {result["sha256"] for results in found.values() for result in results}
    if len(streams) != 1:
        raise DataError(f"bench: {len(streams)} different token streams; the contenders do not do the same work")
    tell(f"prepare   all token streams are identical: sha256 {streams.pop()[:16]}")
    rates = {name: median(result["tokens"] / result["wall_s"] for result in results) for name, results in found.items()}
    for name, rate in rates.items():
        turns = list(zip(found[name], found["nanogpt"], strict=True))
        ratio = median(theirs["wall_s"] / ours["wall_s"] for ours, theirs in turns)
        whole = median(theirs["process_s"] / ours["process_s"] for ours, theirs in turns)
        peak = max(result["peak_mib"] for result in found[name])
        cpu = median(result["tokens"] / result["cpu_s"] for result in found[name])
        tell(
            f"prepare   {name:<10} median {rate / 1e6:6.2f} M tokens/s, {ratio:5.2f} x nanogpt in the median turn "
            f"({whole:.2f} x from start to end of the process); "
            f"{cpu / 1e6:.2f} M tokens per CPU second; peak {peak:,.0f} MiB in the largest process"
        )
    return text.parent / "tiktoken"


def has_gigatoken() -> bool:
    return importlib.util.find_spec("gigatoken") is not None


def _run_contender(name: str, text: Path, out: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "data_prep.measure", name, str(text), str(out), str(workers)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - begun
    if done.returncode:
        raise DataError(f"bench: {name}, failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["process_s"] = elapsed
    # Ours is the whole process, from its start to the verified directory; nanoGPT's is without start and loading.
    result["wall_s"] = result["parts_s"]["map"] + result["parts_s"]["write"] if name == "nanogpt" else elapsed
    return result


def _told(name: str, result: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in result["parts_s"].items())
    return f"{name:<10} {result['wall_s']:6.2f} s counted ({parts}), {result['tokens'] / result['wall_s'] / 1e6:.2f} M tokens/s"


def prepare_as_nanogpt(text: Path, out: Path, workers: int) -> dict[str, Any]:
    """Do what nanoGPT's data/openwebtext/prepare.py does: a parallel map to lists of ids, then one process fills a memmap.

    Source: nanoGPT, data/openwebtext/prepare.py; written anew. Its split and its download are left out.
    """
    import datasets
    import tiktoken

    out.mkdir(parents=True)
    clock = Clock()
    data = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(out / "cache"))
    clock.lap("load")
    gpt2 = gpt2_tokenizer()
    encoding = gpt2._tiktoken
    assert isinstance(encoding, tiktoken.Encoding)

    def encode(example: dict[str, str]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(gpt2.eot)
        return {"ids": ids, "len": len(ids)}

    encoded = data.map(encode, remove_columns=["text"], num_proc=workers)
    clock.lap("map")
    n_ids = int(np.sum(encoded["len"], dtype=np.uint64))
    array = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(n_ids,))
    place = 0
    n_batches = min(N_WRITE_BATCHES, len(encoded))
    for number in range(n_batches):
        batch = encoded.shard(num_shards=n_batches, index=number, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        array[place : place + len(ids)] = ids
        place += len(ids)
    array.flush()
    clock.lap("write")
    return {"tokens": n_ids, "sha256": _sha256(out / "train.bin"), "parts_s": clock.laps}


def prepare_ours(text: Path, out: Path, workers: int, backend: str) -> dict[str, Any]:
    """Prepare a verified data directory."""
    clock = Clock()
    val = text.parent / "val.jsonl"
    made = prepare("files", out, input=text, val=[val], backend=backend, workers=workers)
    clock.lap("prepare")
    if faults := verify(out):
        raise DataError(faults[0])
    clock.lap("verify")
    return {
        "tokens": made.manifest.splits["train"].tokens,
        "sha256": _sha256(*sorted((out / "train").glob("*.bin"))),
        "parts_s": made.seconds | {"verify": clock.laps["verify"]},
    }


# Encoders alone


def bench_encoders(text: Path, tell: Callable[[str], None]) -> None:
    """Encode the same documents with each encoder in this process, twice: the second pass is warm."""
    documents = list(_iter_texts(text, SAMPLE_BYTES))
    n_bytes = sum(len(document.encode()) for document in documents)
    ranks = gpt2_tokenizer().ranks
    expected: list[int] | None = None
    for backend in ("tiktoken", *(["gigatoken"] if has_gigatoken() else [])):
        tokenizer = BytePairTokenizer("gpt2", ranks, backend)
        tokenizer.encode("warm the loader, not the cache of words")
        passes, lengths = [], []
        for _ in range(2):
            begun = time.perf_counter()
            lengths = [len(tokenizer.encode(document)) for document in documents]
            passes.append(n_bytes / (time.perf_counter() - begun) / 1e6)
        if expected is not None and lengths != expected:
            raise DataError(f"bench: {backend}, other ids than tiktoken")
        expected = lengths
        tell(f"encode    {backend:<10} one process: {passes[0]:7.1f} MB/s first pass, {passes[1]:7.1f} MB/s second")


def _iter_texts(text: Path, limit: int) -> Iterator[str]:
    with text.open() as file:
        for line in file:
            document: str = json.loads(line)["text"]
            yield document
            limit -= len(document)
            if limit <= 0:
                return


# Batches


def bench_batches(data_dir: Path, tell: Callable[[str], None]) -> None:
    """Time one batch: nanoGPT's get_batch, our gather alone, and index, gather and receipt together."""
    torch = importlib.import_module("torch")  # nanoGPT's idiom is of torch; nothing else in this package is
    shards = TokenShards.open(data_dir, "train")
    path = next(iter(sorted((data_dir / "train").glob("*.bin"))))
    for rows, seq_len in BATCH_SHAPES:
        sampler = WindowSampler(shards.n_tokens, seq_len, 0)
        idiom, gather, whole = _batch_functions(torch, shards, sampler, path, rows, seq_len)
        times = _time_in_turns([idiom, gather, whole])
        tell(
            f"batch     ({rows}, {seq_len}): nanogpt {times[0]:.1f} us; gather {times[1]:.1f} us, {times[0] / times[1]:.1f} x; "
            f"index + gather + receipt {times[2]:.1f} us, {times[0] / times[2]:.1f} x"
        )


def _batch_functions(
    torch: Any,  # noqa: ANN401
    shards: TokenShards,
    sampler: WindowSampler,
    path: Path,
    rows: int,
    seq_len: int,
) -> list[Callable[[int], object]]:
    """Return three functions of the batch number that make a batch."""
    out = np.empty((rows, seq_len + 1), dtype=np.int64)
    block = sampler.starts(np.arange(BLOCK_SAMPLES, dtype=np.uint64))
    state: dict[str, Any] = {"number": -1, "starts": block}

    def idiom(number: int) -> object:
        """Source: nanoGPT, train.py, get_batch; written anew."""
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - seq_len, (rows,))
        x = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in places])
        return x, y

    def gather(number: int) -> object:
        begin = number * rows % (BLOCK_SAMPLES - rows)
        tokens = torch.from_numpy(shards.gather(block[begin : begin + rows], seq_len + 1, out))
        return tokens[:, :-1], tokens[:, 1:]

    def whole(number: int) -> object:
        per_block = BLOCK_SAMPLES // rows
        if number // per_block != state["number"]:
            state["number"] = number // per_block
            first = state["number"] * per_block * rows
            state["starts"] = sampler.starts(np.arange(first, first + BLOCK_SAMPLES, dtype=np.uint64))
        begin = number % per_block * rows
        windows = shards.gather(state["starts"][begin : begin + rows], seq_len + 1, out)
        total = 0
        for counter, window in enumerate(windows.astype("<u2"), start=number * rows):  # as the trainer does
            key = counter.to_bytes(8, "little")
            total += int.from_bytes(hashlib.blake2b(window.data, digest_size=16, key=key).digest(), "little")
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1], tokens[:, 1:], total

    return [idiom, gather, whole]


def _time_in_turns(functions: list[Callable[[int], object]], rounds: int = 15, calls: int = 60) -> list[float]:
    """Return the median over rounds of each function's microseconds per call; in each round all take their turn."""
    found: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, times in zip(functions, found, strict=True):
            begun = time.perf_counter()
            for number in range(turn * calls, (turn + 1) * calls):
                function(number)
            if turn:  # the first round warms the caches
                times.append((time.perf_counter() - begun) / calls * 1e6)
    return [median(times) for times in found]


# The machine


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(islice(names, 1), platform.processor() or "unknown processor")


def _versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def main(name: str, text: str, out: str, workers: str) -> None:
    """Run one contender and print what was measured as JSON."""
    if name == "nanogpt":
        result = prepare_as_nanogpt(Path(text), Path(out), int(workers))
    else:
        result = prepare_ours(Path(text), Path(out), int(workers), name)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(json.dumps(result | {"peak_mib": max(usage.ru_maxrss for usage in usages) / 1024, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main(*sys.argv[1:])
