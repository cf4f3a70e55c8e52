"""Data sets of the Hugging Face hub, streamed by `datasets`: the revision pinned first, every failure one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from data_prep.documents import HubData, Item, Span, checked_text
from data_prep.shards import DataError, SourceRecord

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"


def pin_revision(hub: HubData) -> HubData:
    """Resolve a branch to the commit that it names now, so that every later read sees the same data.

    Raises: DataError when the hub cannot be reached or does not give the data set.
    """
    if hub.data_files or (hub.revision is not None and len(hub.revision) == 40):
        return hub
    from huggingface_hub import HfApi

    with one_line_errors(hub):
        info = HfApi().dataset_info(hub.path, revision=hub.revision)
    return HubData(hub.path, hub.config, hub.split, info.sha)


def count_shards(hub: HubData) -> int:
    """Return into how many parts the data set can be read: row groups of parquet, files of other formats."""
    with one_line_errors(hub):
        return int(_load(hub).num_shards)


def iter_hub(hub: HubData, span: Span, text_key: str) -> Iterator[Item]:
    """Yield the documents of some shards, in order."""
    with one_line_errors(hub):
        data = _load(hub)
        n_shards, stop = data.num_shards, span.stop if span.stop is not None else data.num_shards
        for number in range(span.start, stop):
            rows = data.shard(num_shards=n_shards, index=number)
            for row, record in enumerate(rows, start=1):
                if text_key not in record:
                    there = ", ".join(map(str, list(record)[:10]))
                    raise DataError(f"{hub.path}: text_key={text_key}, no such column (there: {there}); give --text-key")
                yield checked_text(record[text_key], f"{hub.path}: shard {number}, row {row:,}", text_key)


def hub_record(hub: HubData) -> SourceRecord:
    """Describe a pinned data set; the revision stands for its content."""
    import hashlib

    lines = ("hub", hub.path, hub.config or "", hub.split, hub.revision or "", *hub.data_files)
    name = " ".join(filter(None, (hub.path, hub.config, hub.split)))
    return SourceRecord(
        kind="hub",
        label=f"{name} at {hub.revision[:12]}" if hub.revision else name,
        sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        url=None if hub.data_files else f"https://huggingface.co/datasets/{hub.path}",
        revision=hub.revision,
    )


@lru_cache(maxsize=1)  # each time costs some questions to the hub, which counts them
def _load(hub: HubData) -> Any:  # noqa: ANN401  # datasets has no types of use
    import datasets

    datasets.disable_progress_bars()
    files = list(hub.data_files) or None
    data = datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision, data_files=files, streaming=True)
    return data.reshard()  # parquet by row group, finer than a file


@contextmanager
def one_line_errors(hub: HubData) -> Iterator[None]:
    """Turn what the libraries raise into one line that names the cause and the way out."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the libraries below raise classes of five packages, which differ between versions
        cause = _explain(error)
        if cause is None:
            raise
        raise DataError(f"{hub.path}: {cause}") from error


def _explain(error: BaseException) -> str | None:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    first = " ".join(str(error).split())[:160]
    if "OfflineModeIsEnabled" in names or (os.environ.get(OFFLINE_VARIABLE) == "1" and names & UNREACHABLE):
        return (
            f"{OFFLINE_VARIABLE}=1 and the data set is not in the cache of this machine; unset it where there is "
            "internet, or give local copies: prepare files --input FILE ..."
        )
    if "GatedRepoError" in names:
        return "gated: its owners must let you in; ask on its page, then run hf auth login"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return "no data set of that name that you may read; it was renamed or removed, or needs hf auth login"
    if names & {"RevisionNotFoundError", "EntryNotFoundError"}:
        return f"no such revision or file in it ({first}); leave out --revision, or look at its page"
    if "DataFilesNotFoundError" in names or isinstance(error, FileNotFoundError):
        return f"no data files ({first}); it was renamed or moved: look at its page"
    if names & UNREACHABLE:
        return (
            f"the hub cannot be reached ({type(error).__name__}: {first}); try again, or prepare local copies: "
            "prepare files --input FILE ..."
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in first:
        return "a data set script, which is no longer supported; use a copy in parquet"
    return None


UNREACHABLE = {
    "ConnectionError", "Timeout", "TimeoutException", "TransportError", "ConnectError", "LocalEntryNotFoundError",
    "HfHubHTTPError", "HTTPError", "ClientError", "gaierror",
}  # fmt: skip
