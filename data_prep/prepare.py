"""Text to a verified data directory: plan -> scan -> tokenizer -> map -> pack -> publish.

Everything is written into a hidden working directory beside the target and renamed at the end, so a data directory is
either absent or complete, an interrupted preparation goes on where it was, and nobody's files are ever deleted.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.corpus import NoTinyShakespeareError, Source, find_tiny_shakespeare, local_files, python_sources, text_file
from data_prep.hub import hub_record, pin_revision
from data_prep.mapping import Job, load_record
from data_prep.meter import Clock, metered
from data_prep.packing import pack
from data_prep.recipe import PRESETS, Recipe, Request, check_request, differing_keys, recipe_of, shakespeare_recipe
from data_prep.shards import (
    DataError,
    Manifest,
    SplitRecord,
    SplitRule,
    TokenizerRecord,
    content_id,
    iter_faults,
    iter_size_faults,
    load_manifest,
    sync_directory,
    write_manifest,
)
from data_prep.stages import plan_job
from data_prep.stop import fault_point, listening
from data_prep.tokenizer import load_tokenizer
from data_prep.workers import run_units
from data_prep.workplace import committed_units, load_plan, locked, planned_source, remove_work, work_path

MIN_SPLIT_TOKENS = 2  # one to read and one to predict


class UselessWorkError(DataError):
    """The recipe cannot give a data directory, so what was done for it is of no use."""


@dataclass(frozen=True)
class Prepared:
    """A complete data directory and what is worth telling about how it came to be."""

    data_dir: Path
    manifest: Manifest
    reused: bool
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage


@dataclass(frozen=True)
class NodeDone:
    """One of several nodes did its share; the directory is not complete yet."""

    data_dir: Path
    n_units: int
    n_left: int  # of all nodes


def prepare(preset: str, data_dir: Path, **choices: Any) -> Prepared:  # noqa: ANN401  # the fields of Request, checked there
    """Prepare a preset in a directory, or reuse the directory when it already holds the same recipe.

    Raises: DataError on bad input and when the directory holds anything else; nothing is overwritten then.
    """
    prepared = prepare_request(Request(preset, data_dir, **choices))
    assert isinstance(prepared, Prepared)
    return prepared


def prepare_request(request: Request) -> Prepared | NodeDone:
    """Do what a request asks for.

    Raises: DataError on bad input; StoppedError after a wish to stop, leaving a state to go on from.
    """
    check_request(request)
    if request.preset == "demo" and request.input is None:
        return _prepare_demo(request)
    if PRESETS[request.preset].is_fixed:
        return _reuse_or_write(request, lambda work: find_shakespeare(request, work), shakespeare_recipe(request.preset))
    return _reuse_or_write(request, lambda work: find_source(request, work), None)


def find_shakespeare(request: Request, work: Path) -> Source:
    return find_tiny_shakespeare(work / "download", request.inputs[0] if request.inputs else None, request.corpora)


def find_source(request: Request, work: Path) -> Source:
    """Return the files or the pinned data set of a request; what an earlier attempt found out is not looked up again."""
    preset = PRESETS[request.preset]
    plan = load_plan(work)
    known = planned_source(plan) if plan else None
    hub = request.hub or preset.hub
    if hub is not None:
        hub = replace(hub, revision=request.revision or hub.revision)
        if hub.revision is None and known is not None and known.hub is not None:
            hub = replace(hub, revision=known.hub.revision)
        hub = pin_revision(hub)
        return Source(hub_record(hub), hub=hub, text_key=request.text_key)
    if request.preset == "text":
        return text_file(request.inputs[0])
    return local_files(request.inputs, request.val, request.text_key, known.files if known else ())


def _prepare_demo(request: Request) -> Prepared | NodeDone:
    """Prepare Tiny Shakespeare, else the text every machine has; keep whichever of the two is already there."""
    existing = _load_existing(request.data_dir)
    fallback = replace(request, preset="text", tokenizer="byte")
    if existing is not None and existing.source.is_fallback:
        note = f"{request.data_dir}: holds the fallback text; remove the directory to look for Tiny Shakespeare again"
        return _reuse_or_write(fallback, lambda work: python_sources(), None, (note,))
    recipe = shakespeare_recipe("demo")
    try:
        return _reuse_or_write(request, lambda work: find_shakespeare(request, work), recipe)
    except NoTinyShakespeareError as error:
        if existing is not None:
            raise
        notes = (f"{error}; going on with {python_sources().record.label}",)
    return _reuse_or_write(fallback, lambda work: python_sources(), None, notes)


def _reuse_or_write(
    request: Request, find: Callable[[Path], Source], recipe: Recipe | None, notes: tuple[str, ...] = ()
) -> Prepared | NodeDone:
    """Reuse, restore or write a directory; without a recipe it follows from the source, which is then looked up first."""
    data_dir, work = request.data_dir, work_path(request.data_dir)
    existing = _load_existing(data_dir)
    if existing is None:
        if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
            raise DataError(f"{data_dir}: not empty and no data directory (no manifest.json); choose another --dir")
        if data_dir.is_dir() and data_dir.stat().st_dev != work.parent.stat().st_dev:
            raise DataError(f"{data_dir}: a mount point, which cannot be put in place by a rename; choose a --dir inside it")
        written = _write(request, find, recipe, _publish)
        return written if isinstance(written, NodeDone) else replace(written, notes=notes)
    if recipe is None:
        request = _with_known_revision(request, existing)
        recipe = recipe_of(request, find(work))
    _check_same_recipe(data_dir, existing, recipe)
    damage = next(iter_cheap_faults(data_dir, existing), None)
    if damage is None:
        remove_work(work)
        return Prepared(data_dir, existing, reused=True, notes=notes)
    try:
        restored = _write(request, find, recipe, _restore)
    except DataError as error:
        raise DataError(f"{damage}; it cannot be written again, since {error}") from None
    if isinstance(restored, NodeDone):
        return restored
    return replace(restored, notes=(*notes, f"{damage}; written again"))


def _with_known_revision(request: Request, existing: Manifest) -> Request:
    """Take the revision of a directory that is there, so that it can be reused without the hub."""
    extra = existing.source.model_extra or {}
    return replace(request, revision=request.revision or extra.get("revision"))


def _load_existing(data_dir: Path) -> Manifest | None:
    return load_manifest(data_dir) if (data_dir / "manifest.json").exists() else None


def _check_same_recipe(data_dir: Path, existing: Manifest, recipe: Recipe) -> None:
    if differences := differing_keys(recipe, dict(existing.recipe)):
        raise DataError(
            f"{data_dir}: holds {existing.source.label} by another recipe ({differences}); "
            "choose another --dir or remove this one"
        )


def _write(
    request: Request,
    find: Callable[[Path], Source],
    recipe: Recipe | None,
    put_in_place: Callable[[Path, Path, Manifest], None],
) -> Prepared | NodeDone:
    """Do the work in the working directory, then put the result in place."""
    clock = Clock()
    work = work_path(request.data_dir)
    try:
        with locked(work, request.node_index), listening() as wish:
            try:
                source = find(work)
                wish.check()
                recipe = recipe or recipe_of(request, source)
                if source.record.sha256 != recipe.source_sha256:
                    raise DataError(
                        f"{request.data_dir}: source_sha256={recipe.source_sha256[:16]}…, the text of {source.record.label} "
                        f"is now {source.record.sha256[:16]}…; choose another --dir or remove this one"
                    )
                job = plan_job(request, work, source, recipe)
                wish.check()
                clock.lap("plan")
                left = _map(request, job)
                if request.is_one_of_several:
                    return NodeDone(request.data_dir, len(job.units), left)
                clock.lap("map")
                manifest = _pack(request, job, recipe)
                put_in_place(work / "out", request.data_dir.resolve(), manifest)
                fault_point("cleanup")
                shutil.rmtree(work)
                clock.lap("pack")
            except BaseException as error:
                if not request.is_one_of_several and (isinstance(error, UselessWorkError) or not _has_work(work)):
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except OSError as error:
        error.filename = error.filename or str(request.data_dir)  # a full disk is reported by write(), which knows no name
        raise
    return Prepared(request.data_dir, manifest, reused=False, seconds=clock.laps)


def _has_work(work: Path) -> bool:
    return any(path.suffix == ".json" and path.stem.isdecimal() for path in (work / "parts").glob("*"))


def _map(request: Request, job: Job) -> int:
    """Map the units that are left, or this node's share of them; return how many are left afterwards, of all nodes."""
    done = committed_units(job.work, job.units, job.recipe_id, clean=not request.is_one_of_several)
    index, n = request.node_index or 0, request.num_nodes
    mine = [number for number in range(len(job.units)) if number % n == index] if n > 1 else range(len(job.units))
    todo = [number for number in mine if number not in done]
    with metered("map", len(mine), len(mine) - len(todo)) as meter:
        run_units("map", job, todo, request.n_workers, meter.advance)
    return len(job.units) - len(done) - len(todo)


def _pack(request: Request, job: Job, recipe: Recipe) -> Manifest:
    """Write the shards and, last, the manifest."""
    out = job.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    counters = _count(request, job)
    with listening() as wish, metered("pack", len(job.units)) as meter:
        splits, counters["documents_duplicate"] = pack(
            job, out, recipe.max_shard_tokens, recipe.dedup is not None, lambda n_ids: meter.advance(0, n_ids, 1), wish
        )
    _check_splits(job, recipe, splits)
    shutil.copytree(job.work / "tokenizer", out / "tokenizer")
    manifest = _manifest(job, recipe, splits, counters)
    fault_point("manifest")
    write_manifest(out, manifest)
    fault_point("publish")
    return manifest


def _count(request: Request, job: Job) -> dict[str, int]:
    """Add up what the units counted.

    Raises: DataError when more documents were skipped than is allowed.
    """
    keys = ("documents_in", "documents_blank", "documents_bad", "documents_repaired", "forced_cuts")
    counters, examples = dict.fromkeys(keys, 0), list[str]()
    for number in range(len(job.units)):
        record = load_record(job.work, number) or {}
        for key in keys:
            counters[key] += record.get(key, 0)
        examples += record.get("bad", [])
    if counters["documents_bad"] > request.max_bad_fraction * counters["documents_in"]:
        raise DataError(
            f"{job.source.record.label}: documents_bad={counters['documents_bad']:,} of {counters['documents_in']:,}, more than "
            f"max_bad_fraction={request.max_bad_fraction}, such as {examples[0]}; mend them or raise --max-bad-fraction"
        )
    return counters


def _check_splits(job: Job, recipe: Recipe, splits: dict[str, SplitRecord]) -> None:
    for split, record in splits.items():
        if record.tokens < MIN_SPLIT_TOKENS:
            rule = "split=files" if recipe.split == "files" else f"val_fraction={recipe.val_fraction}"
            advice = "a hash draws whole documents: use --split tail or --val FILE, " if recipe.split == "hash" else "use "
            raise UselessWorkError(
                f"{job.source.record.label}: {rule}, leaves {record.tokens} tokens "
                f"for {split}; {advice}another fraction or more text"
            )


def _manifest(job: Job, recipe: Recipe, splits: dict[str, SplitRecord], counters: dict[str, int]) -> Manifest:
    tokenizer = load_tokenizer(job.work / "tokenizer", job.backend)
    return Manifest(
        tool_version=_tool_version(),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        content_id=content_id(job.dtype, tokenizer.id, splits),
        recipe_id=recipe.id,
        recipe=asdict(recipe),
        dtype=job.dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind, name=tokenizer.name, id=tokenizer.id, eot=job.eot, library=tokenizer.library
        ),
        source=job.source.record,
        split=SplitRule(mode=recipe.split, val_fraction=recipe.val_fraction),
        splits=splits,
        counters=counters,
    )


def _publish(out: Path, data_dir: Path, manifest: Manifest) -> None:
    """Rename the finished directory to its place, so that no reader ever sees a part of it."""
    out.rename(data_dir)
    sync_directory(data_dir.parent)


def _restore(out: Path, data_dir: Path, manifest: Manifest) -> None:
    """Replace the files of a damaged directory by the same bytes; what else lies there is left alone."""
    damaged = load_manifest(data_dir)
    if manifest.content_id != damaged.content_id:
        raise DataError(
            f"{data_dir}: content_id={damaged.content_id[:16]}…, the same recipe now gives "
            f"{manifest.content_id[:16]}…; choose another --dir or restore the damaged files"
        )
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        target = data_dir / path.relative_to(out)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)


def verify(data_dir: Path, *, deep: bool = True) -> list[str]:
    """List what is wrong with a data directory; empty means sound. Deep reads every byte, else sizes are compared.

    Raises: DataError when there is no manifest to check against.
    """
    manifest = load_manifest(data_dir)
    if not deep:
        return list(iter_cheap_faults(data_dir, manifest))
    return [*_iter_tokenizer_faults(data_dir, manifest), *iter_faults(data_dir, manifest)]


def iter_cheap_faults(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    yield from _iter_tokenizer_faults(data_dir, manifest)
    yield from iter_size_faults(data_dir, manifest)


def _iter_tokenizer_faults(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(data_dir / "tokenizer")
    except DataError as error:
        yield str(error)
        return
    if (tokenizer.id, tokenizer.vocab_size) != (manifest.tokenizer.id, manifest.vocab_size):
        yield f"{data_dir / 'tokenizer'}: not the tokenizer of the manifest ({manifest.tokenizer.id[:16]}…)"


def _tool_version() -> str | None:
    try:
        return version("scaling-harness")
    except PackageNotFoundError:
        return None
