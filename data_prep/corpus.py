"""Where text comes from: Tiny Shakespeare, files of the user, data sets of the hub, or the sources of the running Python.

A source is a list of files, or a data set of the hub, and a record of its origin. Its text is read by documents.py.
"""

import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.documents import HubData, SourceFile
from data_prep.shards import DataError, SourceRecord

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_FILE = "tinyshakespeare/input.txt"  # inside a corpora directory
CORPORA_VARIABLE = "HARNESS_CORPORA"
DOWNLOAD_TIMEOUT_S = 10.0
CHUNK_BYTES = 1 << 20
FORMATS = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gz", ".xz": "xz", ".zst": "zst"}


@dataclass(frozen=True)
class Source:
    """Text on disk or on the hub, and where it came from."""

    record: SourceRecord
    files: tuple[SourceFile, ...] = ()
    hub: HubData | None = None
    text_key: str = "text"


class NoTinyShakespeareError(DataError):
    """None of the places has the text; the message lists where it was looked for."""


def tiny_shakespeare_record() -> SourceRecord:
    """Describe Tiny Shakespeare; its hash is fixed, so this needs no text."""
    return SourceRecord(
        kind="tiny-shakespeare",
        label="Tiny Shakespeare (karpathy/char-rnn)",
        sha256=TINY_SHAKESPEARE_SHA256,
        url=TINY_SHAKESPEARE_URL,
    )


def find_tiny_shakespeare(
    download_dir: Path, input: Path | None = None, corpora: Path | None = None, timeout_s: float = DOWNLOAD_TIMEOUT_S
) -> Source:
    """Find the text: the given file, else the corpora directory (given or HARNESS_CORPORA), else the download.

    Raises: DataError when a file is found that is not Tiny Shakespeare or the given file cannot be read;
    NoTinyShakespeareError when there is no file and the download fails.
    """
    if input is not None:
        return _tiny_shakespeare(input)
    missed = []
    directory = corpora or _corpora_of_environment()
    if directory is None:
        missed.append(f"no --corpora and no {CORPORA_VARIABLE}")
    elif (path := directory / TINY_SHAKESPEARE_FILE).is_file():
        return _tiny_shakespeare(path)
    else:
        missed.append(f"{path} is not there")
    downloaded = download_dir / Path(TINY_SHAKESPEARE_FILE).name
    try:
        data = _download(TINY_SHAKESPEARE_URL, timeout_s)
        _check_tiny_shakespeare(data, TINY_SHAKESPEARE_URL)
    except (OSError, http.client.HTTPException, DataError) as error:
        missed.append(f"download failed ({getattr(error, 'reason', None) or error})")
        raise NoTinyShakespeareError(
            f"Tiny Shakespeare: not found: {'; '.join(missed)}; "
            f"give --input FILE, or --corpora DIR that holds {TINY_SHAKESPEARE_FILE}"
        ) from None
    download_dir.mkdir(parents=True, exist_ok=True)
    downloaded.write_bytes(data)
    return _tiny_shakespeare(downloaded)


def text_file(path: Path) -> Source:
    """Take one plain-text file of the user, whatever its name.

    Raises: DataError when it cannot be read or holds nothing but whitespace.
    """
    file = describe_file(path, format="txt")
    if file.is_blank:
        raise DataError(f"{path}: {file.size} bytes, no text in it; give a file that holds some")
    label = path.name.encode("utf-8", "replace").decode()  # a file name may hold bytes that JSON cannot
    return Source(SourceRecord(kind="text", label=label, sha256=file.sha256), (file,))


def local_files(
    inputs: Sequence[Path], val: Sequence[Path] = (), text_key: str = "text", known: Iterable[SourceFile] = ()
) -> Source:
    """Take files of the user: txt (a document each), jsonl, parquet; txt and jsonl also as gz, xz, zst.

    A directory stands for the files in it, sorted by name. `known` files that did not change are not hashed again.

    Raises: DataError when a file is missing, empty, or of no known kind.
    """
    by_path = {file.path: file for file in known}
    sides = (("val", val), ("train", inputs)) if val else (("", inputs),)
    paths = [(path, side) for side, given in sides for path in _listed(given)]
    files = [_known_file(path, by_path) or describe_file(path) for path, _ in paths]
    files = [file._replace(side=side) for file, (_, side) in zip(files, paths, strict=True)]
    if not any(file.size for file in files):
        raise DataError(f"{', '.join(map(str, inputs))}: 0 bytes, no text in it; give a file that holds some")
    files = _without_copies([file for file in files if file.size])
    listing = "".join(f"{file.sha256}  {file.side or 'all'}\n" for file in files)
    names = [Path(file.path).name.encode("utf-8", "replace").decode() for file in files if file.side != "val"]
    record = SourceRecord(
        kind="files",
        label=" and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more files",
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
    )
    return Source(record, tuple(files), text_key=text_key)


def _without_copies(files: list[SourceFile]) -> list[SourceFile]:
    """Leave out text files that come again byte for byte; copies inside files are found when they are packed."""
    first: dict[tuple[str, str], SourceFile] = {}
    for file in files:
        key = (file.sha256, "") if file.format == "txt" else (file.sha256, file.path)
        first.setdefault(key, file)
    return list(first.values())


def python_sources(directory: Path | None = None) -> Source:
    """Take the running Python's own top-level standard-library modules: text that every machine has.

    Note: the text differs between Python versions and builds; the label says which, the hash is of the files.
    """
    directory = directory or Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(directory.glob("*.py")) if path.is_file() and path.read_bytes().isascii()]
    files = tuple(describe_file(path, format="txt") for path in paths)
    if not files:
        raise DataError(f"{directory}: no ASCII *.py files, so no text to fall back to; give --input FILE")
    listing = "".join(f"{file.sha256}  {Path(file.path).name}\n" for file in files)
    record = SourceRecord(
        kind="python-stdlib",
        label=f"Python {platform.python_version()} standard library sources (fallback)",
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        is_fallback=True,
    )
    return Source(record, files)


def describe_file(path: Path, format: str | None = None) -> SourceFile:
    """Hash a file and say what it is.

    Raises: DataError when it cannot be read or its kind is not known.
    """
    compression = COMPRESSIONS.get(path.suffix, "") if format is None else ""
    kind = format or FORMATS.get(Path(path.stem).suffix if compression else path.suffix)
    try:
        before = path.stat()
        digest, is_blank = _hash_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a directory, not a text file; give one file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if kind is None or (kind == "parquet" and compression):
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: not a kind of file that is known here ({known}, with .gz, .xz or .zst); rename or convert it")
    return SourceFile(str(path.absolute()), kind, compression, before.st_size, before.st_mtime_ns, digest, is_blank=is_blank)


def _hash_file(path: Path) -> tuple[str, bool]:
    digest, is_blank = hashlib.sha256(), True
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            is_blank = is_blank and not chunk.removeprefix(b"\xef\xbb\xbf").strip()
            digest.update(chunk)
    return digest.hexdigest(), is_blank


def _known_file(path: Path, known: dict[str, SourceFile]) -> SourceFile | None:
    """Return what is known of a file whose size and time of change are the same as then."""
    file = known.get(str(path.absolute()))
    if file is None or not path.is_file():
        return None
    now = path.stat()
    return file if (now.st_size, now.st_mtime_ns) == (file.size, file.mtime_ns) else None


def _listed(given: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.is_file() and _is_known(each))
            if not inside:
                raise DataError(
                    f"{path}: no text in this directory ({', '.join(FORMATS)}, with .gz, .xz or .zst); check the path"
                )
            paths += inside
        else:
            paths.append(path)
    return paths


def _is_known(path: Path) -> bool:
    stem = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return stem.suffix in FORMATS


def _tiny_shakespeare(path: Path) -> Source:
    file = describe_file(path, format="txt")
    _check_tiny_shakespeare(file.sha256, str(path))
    return Source(tiny_shakespeare_record(), (file,))


def _check_tiny_shakespeare(data: bytes | str, where: str) -> None:
    found = data if isinstance(data, str) else hashlib.sha256(data).hexdigest()
    if found != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{where}: sha256={found}, not Tiny Shakespeare ({TINY_SHAKESPEARE_SHA256}); "
            "for a text of your own use preset text --input FILE"
        )


def _corpora_of_environment() -> Path | None:
    value = os.environ.get(CORPORA_VARIABLE)
    return Path(value) if value else None


def _download(url: str, timeout_s: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        data: bytes = response.read(TINY_SHAKESPEARE_BYTES + 1)  # a portal's page must not fill the memory
    return data
