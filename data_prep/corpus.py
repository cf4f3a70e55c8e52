"""Where text comes from: Tiny Shakespeare, a file of the user, or the sources of the running Python.

A corpus is a tuple of documents and a record of their origin. Only this module reads text or opens the network.
"""

import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import DataError, SourceRecord

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_FILE = "tinyshakespeare/input.txt"  # inside a corpora directory
CORPORA_VARIABLE = "HARNESS_CORPORA"
DOWNLOAD_TIMEOUT_S = 10.0
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Corpus:
    """Text in memory and where it came from."""

    source: SourceRecord
    documents: tuple[str, ...]


class NoTinyShakespeareError(DataError):
    """None of the places has the text; the message lists where it was looked for."""


def tiny_shakespeare_source() -> SourceRecord:
    """Describe Tiny Shakespeare; its hash is fixed, so this needs no text."""
    return SourceRecord(
        kind="tiny-shakespeare",
        label="Tiny Shakespeare (karpathy/char-rnn)",
        sha256=TINY_SHAKESPEARE_SHA256,
        url=TINY_SHAKESPEARE_URL,
    )


def find_tiny_shakespeare(
    input: Path | None = None, corpora: Path | None = None, timeout_s: float = DOWNLOAD_TIMEOUT_S
) -> Corpus:
    """Find the text: the given file, else the corpora directory (given or HARNESS_CORPORA), else the download.

    Raises: DataError when a file is found that is not Tiny Shakespeare or the given file cannot be read;
    NoTinyShakespeareError when there is no file and the download fails.
    """
    if input is not None:
        return _tiny_shakespeare(_read_bytes(input), str(input))
    missed = []
    directory = corpora or _corpora_of_environment()
    if directory is None:
        missed.append(f"no --corpora and no {CORPORA_VARIABLE}")
    elif (path := directory / TINY_SHAKESPEARE_FILE).is_file():
        return _tiny_shakespeare(_read_bytes(path), str(path))
    else:
        missed.append(f"{path} is not there")
    try:
        return _tiny_shakespeare(_download(TINY_SHAKESPEARE_URL, timeout_s), TINY_SHAKESPEARE_URL)
    except (OSError, http.client.HTTPException, DataError) as error:
        missed.append(f"download failed ({getattr(error, 'reason', None) or error})")
    raise NoTinyShakespeareError(
        f"Tiny Shakespeare: not found: {'; '.join(missed)}; "
        f"give --input FILE, or --corpora DIR that holds {TINY_SHAKESPEARE_FILE}"
    )


def text_file(path: Path) -> Corpus:
    """Read a plain-text file of the user.

    Raises: DataError when it cannot be read, is not UTF-8, or holds nothing but whitespace.
    """
    data = _read_bytes(path)
    documents = tuple(iter_documents([(str(path), data)]))
    if not any(document.strip() for document in documents):
        raise DataError(f"{path}: {len(data)} bytes, no text in it; give a file that holds some")
    label = path.name.encode("utf-8", "replace").decode()  # a file name may hold bytes that JSON cannot
    source = SourceRecord(kind="text", label=label, sha256=hashlib.sha256(data).hexdigest())
    return Corpus(source, documents)


def python_sources(directory: Path | None = None) -> Corpus:
    """Read the running Python's own top-level standard-library modules: text that every machine has.

    Note: the text differs between Python versions and builds; the label says which, the hash is of the files.
    """
    directory = directory or Path(sysconfig.get_path("stdlib"))
    files = [(path.name, _read_bytes(path)) for path in sorted(directory.glob("*.py")) if path.is_file()]
    files = [(name, data) for name, data in files if data.isascii()]
    documents = tuple(iter_documents(files))
    if not documents:
        raise DataError(f"{directory}: no ASCII *.py files, so no text to fall back to; give --input FILE")
    listing = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files)
    source = SourceRecord(
        kind="python-stdlib",
        label=f"Python {platform.python_version()} standard library sources (fallback)",
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
        is_fallback=True,
    )
    return Corpus(source, documents)


def iter_documents(files: Sequence[tuple[str, bytes]]) -> Iterator[str]:
    """Yield the documents of plain-text files, one per file, without a byte order mark; newlines stay as they are.

    Raises: DataError at a byte that is not UTF-8. Replacing it would train on text that nobody wrote.
    """
    for name, data in files:
        try:
            yield data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: byte {error.start:,} is 0x{data[error.start]:02x}, not UTF-8; "
                "convert it first, for example with iconv -f latin1 -t utf-8"
            ) from None


def _tiny_shakespeare(data: bytes, where: str) -> Corpus:
    found = hashlib.sha256(data).hexdigest()
    if found != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{where}: sha256={found}, not Tiny Shakespeare ({TINY_SHAKESPEARE_SHA256}); "
            "for a text of your own use preset text --input FILE"
        )
    return Corpus(tiny_shakespeare_source(), tuple(iter_documents([(where, data)])))


def _corpora_of_environment() -> Path | None:
    value = os.environ.get(CORPORA_VARIABLE)
    return Path(value) if value else None


def _download(url: str, timeout_s: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        data: bytes = response.read(TINY_SHAKESPEARE_BYTES + 1)  # a portal's page must not fill the memory
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a directory, not a text file; give one file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
