"""From a source to a job that any worker can do: the units, the alphabet, the boundary, the tokenizer."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.corpus import Source
from data_prep.documents import iter_pieces
from data_prep.mapping import BATCH_BYTES, Counts, Job, SplitPlan, iter_usable, route, scan_path
from data_prep.meter import metered
from data_prep.recipe import Recipe, Request
from data_prep.shards import DataError
from data_prep.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, dtype_for, load_tokenizer, write_tokenizer
from data_prep.units import MAX_UNIT_BYTES, plan_units
from data_prep.workers import run_units
from data_prep.workplace import check_plan, load_plan, planned_units, planning, write_plan

TRAINING_BYTES = 32 << 20  # of text for a BPE: bounds the parent's memory (DECISIONS.md)
TRAINING_PIECE_CHARS = 1 << 14  # the trainer holds some hundred texts at once
TRAINING_UNITS = 64  # spread evenly over the corpus


def plan_job(request: Request, work: Path, source: Source, recipe: Recipe) -> Job:
    """Plan the units, find out what encoding needs to know, and write it all down; or find it written.

    Raises: DataError when the work of another recipe is there.
    """
    with planning(work):
        plan = load_plan(work)
        if plan is not None:
            check_plan(work, plan, recipe)
            units = planned_units(plan)
        else:
            units = plan_units(source, request.unit_bytes)
            if not units:
                raise DataError(f"{source.record.label}: no documents in it; give a text that holds some")
            write_plan(work, recipe, source, units)
        job = Job(
            source=source,
            units=units,
            work=work,
            recipe_id=recipe.id,
            split=SplitPlan(recipe.split, recipe.val_fraction),
            backend=request.backend,
            skip_bad=request.on_bad == "skip",
            batch_bytes=min(BATCH_BYTES, (request.unit_bytes or MAX_UNIT_BYTES) // 4),
        )
        if recipe.split == "tail" or recipe.tokenizer == "char":
            job = _with_scan(request, job, recipe)
        folder = work / "tokenizer"
        if not (folder / "spec.json").exists():
            write_tokenizer(folder, _make_tokenizer(request, job, recipe))
        tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size < 1:
        raise DataError(f"{source.record.label}: no text in it; give a file that holds some")
    eot = tokenizer.eot if recipe.eot else None
    return replace(job, dtype=dtype_for(tokenizer.vocab_size), eot=eot)


def _with_scan(request: Request, job: Job, recipe: Recipe) -> Job:
    """Count the characters of every unit, for the place of the tail."""
    todo = [number for number in range(len(job.units)) if not scan_path(job.work, number).exists()]
    with metered("scan", len(job.units), len(job.units) - len(todo)) as meter:
        run_units("scan", job, todo, request.n_workers, meter.advance)
    offsets = [0]
    for number in range(len(job.units)):
        offsets.append(offsets[-1] + int(_load_scan(job, number)[1]))
    boundary = int(offsets[-1] * (1 - (recipe.val_fraction or 0.0)))
    return replace(job, split=replace(job.split, boundary=boundary, offsets=tuple(offsets[:-1])))


def _load_scan(job: Job, number: int) -> tuple[str, int]:
    scan = json.loads(scan_path(job.work, number).read_bytes())
    return scan["chars"], scan["n_chars"]


def _make_tokenizer(request: Request, job: Job, recipe: Recipe) -> Tokenizer:
    if recipe.tokenizer == "byte":
        return ByteTokenizer()
    if recipe.tokenizer == "char":
        return CharTokenizer.from_texts(_load_scan(job, number)[0] for number in range(len(job.units)))
    from data_prep.bpe import gpt2_tokenizer, json_tokenizer, train_bpe

    if recipe.tokenizer == "gpt2":
        return gpt2_tokenizer(request.bpe_file)
    if recipe.tokenizer == "json":
        return json_tokenizer(Path(request.tokenizer or ""))
    return train_bpe(iter_training_text(job), recipe.vocab_size or 0)


def iter_training_text(job: Job, limit_bytes: int = TRAINING_BYTES) -> Iterator[str]:
    """Yield the text that a tokenizer is trained on: the beginnings of units spread over the corpus, none that validates."""
    n_chosen = min(len(job.units), TRAINING_UNITS)
    chosen = [place * len(job.units) // n_chosen for place in range(n_chosen)]
    room = limit_bytes
    for place, number in enumerate(chosen):
        share = room // (n_chosen - place)  # what an earlier unit left is for the later ones
        offset = job.split.offsets[number] if job.split.offsets else 0
        for side, item in iter_usable(job, number, Counts()):
            for split, text, _ in route(job.split, side, item, offset):
                if split == "train":
                    yield from (piece for piece, _ in iter_pieces(text, TRAINING_PIECE_CHARS))
                    share -= len(text)
                    room -= len(text)
            offset += len(item.text)
            if share <= 0:
                break
