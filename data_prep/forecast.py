"""What a preparation will need, before anything runs: tokens, disk, memory, from a sample of the text."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path

from data_prep.bpe import gpt2_tokenizer, json_tokenizer
from data_prep.corpus import NoTinyShakespeareError, Source, python_sources
from data_prep.documents import decompressed, iter_pieces
from data_prep.mapping import Counts, Job, SplitPlan, iter_usable
from data_prep.prepare import find_shakespeare, find_source
from data_prep.recipe import PRESETS, Recipe, Request, check_request, recipe_of
from data_prep.shards import DataError
from data_prep.tokenizer import dtype_for
from data_prep.units import describe, estimate_text_bytes, plan_units
from data_prep.workplace import free_bytes, work_path

SAMPLE_BYTES = 2 << 20
SAMPLE_UNITS = 8
ROW_BYTES = 35 + 8  # a document in a part and in an .idx
WORKER_BYTES = 250 << 20  # the bound that preparations keep to
PARENT_BYTES = 150 << 20
HUB_BYTES = {"openwebtext": 39_800_000_000, "fineweb-edu-10bt": 48_000_000_000}  # of text, from their pages


@dataclass(frozen=True)
class Forecast:
    """Estimates; tokens and disk are good to some percent where the sample is like the rest."""

    label: str
    recipe: Recipe
    units: tuple[str, ...]
    text_bytes: int
    bytes_per_token: float
    documents: int
    dtype: str
    n_workers: int
    free_bytes: int

    @property
    def tokens(self) -> int:
        return round(self.text_bytes / self.bytes_per_token)

    @property
    def shard_bytes(self) -> int:
        return self.tokens * (2 if self.dtype == "uint16" else 4) + 8 * self.documents

    @property
    def peak_disk_bytes(self) -> int:
        """Parts and shards lie beside each other until the end."""
        return 2 * self.shard_bytes + (ROW_BYTES - 8) * self.documents

    @property
    def memory_bytes(self) -> int:
        return PARENT_BYTES + WORKER_BYTES * self.n_workers


def plan_preparation(request: Request) -> Forecast:
    """Estimate what `prepare` with the same request would need; writes nothing.

    Raises: DataError on bad input.
    """
    check_request(request)
    with tempfile.TemporaryDirectory() as folder:
        source = _find(request, Path(folder))
        recipe = recipe_of(request, source)
        units = plan_units(source, request.unit_bytes)
        job = Job(source, units, Path(folder), recipe.id, SplitPlan(recipe.split), skip_bad=True)
        sample = "".join(_iter_sample(job))
        n_documents = max(sum(1 for _ in _iter_sample(job)), 1)
    if not sample:
        raise DataError(f"{source.record.label}: no text in it; give a file that holds some")
    sample_bytes = len(sample.encode("utf-8", "replace"))
    text_bytes = _estimate_text_bytes(request, source)
    vocab_size, bytes_per_token = _estimate_tokens(request, recipe, sample, sample_bytes)
    return Forecast(
        label=source.record.label,
        recipe=recipe,
        units=tuple(describe(source, unit) for unit in units),
        text_bytes=text_bytes,
        bytes_per_token=bytes_per_token,
        documents=max(1, round(text_bytes / sample_bytes * n_documents)),
        dtype=dtype_for(vocab_size),
        n_workers=min(request.n_workers, len(units)),
        free_bytes=free_bytes(work_path(request.data_dir).parent),
    )


def _find(request: Request, folder: Path) -> Source:
    if not PRESETS[request.preset].is_fixed:
        return find_source(request, folder)
    try:
        return find_shakespeare(request, folder)
    except NoTinyShakespeareError:
        if request.preset != "demo":
            raise
        return python_sources()


def _iter_sample(job: Job) -> Iterator[str]:
    """Yield text from the beginnings of a few units."""
    n_chosen = min(SAMPLE_UNITS, len(job.units))
    for place in range(n_chosen):
        room = SAMPLE_BYTES // n_chosen
        for _, item in iter_usable(job, place * len(job.units) // n_chosen, Counts()):
            yield item.text[:room]
            room -= len(item.text)
            if room <= 0:
                break


def _estimate_text_bytes(request: Request, source: Source) -> int:
    if source.hub is not None:
        return HUB_BYTES.get(request.preset, 0)
    return round(sum(estimate_text_bytes(file) * _expansion(source, number) for number, file in enumerate(source.files)))


def _expansion(source: Source, number: int) -> float:
    """Return by how much more a compressed file holds than units assume, from its beginning."""
    file = source.files[number]
    if not file.compression:
        return 1.0
    with Path(file.path).open("rb", buffering=0) as raw, decompressed(raw, file.compression) as opened:
        n_open = len(opened.read(SAMPLE_BYTES))
        n_packed = raw.tell()
    return n_open / n_packed * file.size / estimate_text_bytes(file)


def _estimate_tokens(request: Request, recipe: Recipe, sample: str, sample_bytes: int) -> tuple[int, float]:
    """Return the vocabulary's size and the bytes of text per token; of a BPE not trained yet, a rule of thumb."""
    if recipe.tokenizer == "byte":
        return 256, 1.0
    if recipe.tokenizer == "char":
        return len(set(sample)), sample_bytes / len(sample)
    if recipe.tokenizer == "bpe":
        vocab_size = recipe.vocab_size or 0
        return vocab_size, log2(vocab_size) / 4  # English books: 2.2 at 512, 3.2 at 4,096
    tokenizer = json_tokenizer(Path(request.tokenizer or "")) if recipe.tokenizer == "json" else gpt2_tokenizer(request.bpe_file)
    n_ids = sum(len(tokenizer.encode(piece)) for piece, _ in iter_pieces(sample))
    return tokenizer.vocab_size, sample_bytes / max(n_ids, 1)
