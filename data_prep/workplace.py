"""Where a preparation lives until it is complete: a hidden directory beside the target, locked, resumable.

.DIR.work/lock  plan.json  journal  scan/  tokenizer/  parts/  out/
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from data_prep.corpus import Source
from data_prep.documents import HubData, SourceFile, Span
from data_prep.mapping import load_record, write_json
from data_prep.recipe import Recipe, differing_keys
from data_prep.shards import DataError, SourceRecord
from data_prep.units import Unit

PLAN_FILE = "plan.json"


def work_path(data_dir: Path) -> Path:
    """Return the directory in which a preparation of this data directory works."""
    target = data_dir.resolve()
    return target.parent / f".{target.name}.work"


@contextmanager
def locked(work: Path, node_index: int | None = None) -> Iterator[None]:
    """Hold a working directory: alone, or as one of several nodes, each of which may be held once.

    Raises: DataError when another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if node_index is None:
            _lock(stack, work / "lock", fcntl.LOCK_EX, work)
        else:
            _lock(stack, work / "lock", fcntl.LOCK_SH, work)
            _lock(stack, work / f"lock-{node_index}", fcntl.LOCK_EX, work)
        for folder in ("scan", "parts"):
            (work / folder).mkdir(exist_ok=True)
        yield


@contextmanager
def planning(work: Path) -> Iterator[None]:
    """Let one node plan at a time; the others wait and then find the plan."""
    with (work / "lock-plan").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(stack: ExitStack, path: Path, kind: int, work: Path) -> None:
    file: IO[str] = stack.enter_context(path.open("a"))
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{work}: another preparation is at work here; wait for it, or choose another --dir") from None


def remove_work(work: Path) -> None:
    """Remove a working directory that nobody holds; a leftover of a preparation that was killed at its very end."""
    if work.is_dir():
        try:
            with locked(work):
                shutil.rmtree(work)
        except (DataError, OSError):
            return  # it is at work, or it is not ours to remove; it does no harm


def write_plan(work: Path, recipe: Recipe, source: Source, units: tuple[Unit, ...]) -> None:
    """Keep what was planned, so that a resumed preparation does the same."""
    source_json = {
        "record": source.record.model_dump(),
        "files": [list(file) for file in source.files],
        "hub": asdict(source.hub) if source.hub else None,
        "text_key": source.text_key,
    }
    write_json(work / PLAN_FILE, {"recipe": asdict(recipe), "recipe_id": recipe.id, "source": source_json, "units": units})


def load_plan(work: Path) -> dict[str, Any] | None:
    """Return the plan as JSON, or None when there is none."""
    try:
        plan: dict[str, Any] = json.loads((work / PLAN_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{work / PLAN_FILE}: not readable; remove {work} and prepare again") from None
    return plan


def planned_source(plan: dict[str, Any]) -> Source:
    """Return the source as it was planned."""
    raw = plan["source"]
    hub = HubData(**raw["hub"] | {"data_files": tuple(raw["hub"]["data_files"])}) if raw["hub"] else None
    files = tuple(SourceFile(*file) for file in raw["files"])
    return Source(SourceRecord(**raw["record"]), files, hub, raw["text_key"])


def planned_units(plan: dict[str, Any]) -> tuple[Unit, ...]:
    return tuple(tuple(Span(*span) for span in unit) for unit in plan["units"])


def check_plan(work: Path, plan: dict[str, Any], recipe: Recipe) -> None:
    """Raises: DataError when an interrupted preparation was of another recipe, naming the keys."""
    if differences := differing_keys(recipe, plan["recipe"]):
        raise DataError(
            f"{work}: holds an interrupted preparation by another recipe ({differences}); "
            "run it with the same text and options to go on, or remove the directory to begin anew"
        )


def committed_units(work: Path, units: tuple[Unit, ...], recipe_id: str, *, clean: bool = True) -> set[int]:
    """Return the units whose parts are there in full; what else lies there is removed, unless other nodes write there."""
    done = set()
    for number in range(len(units)):
        record = load_record(work, number)
        if record is not None and record["recipe_id"] == recipe_id:
            done.add(number)
    for path in (work / "parts").iterdir() if clean else ():
        stem = path.name.lstrip(".").split(".")[0]
        if path.name.startswith(".") or not stem.isdecimal() or int(stem) not in done:
            path.unlink(missing_ok=True)
    return done


def free_bytes(path: Path) -> int:
    """Return the free space where a path is or will be."""
    while not path.exists():
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize
