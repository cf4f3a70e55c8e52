"""Files and hub data sets to documents: one reader per format, none holds more than one document or piece of text.

A reader yields fragments. A record of jsonl or parquet is one fragment; a text file, which is one document of any
length, comes in pieces that are cut where no tokenizer's word goes across.
"""

import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data_prep.shards import DataError

PIECE_CHARS = 1 << 20  # what is encoded at once
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20  # a line is held in memory up to ten times: as bytes, decoded, as a string of 4 bytes a character
PARQUET_ROWS = 64
DIGEST_BYTES = 16
BYTE_ORDER_MARK = "\ufeff"
# Between a visible ASCII character and a blank the word patterns of GPT-2 and its relatives always end a word.
SAFE_CUT = re.compile(r"[!-~](?=[ \n])")
SAFE_CUT_BYTES = re.compile(rb"[!-~](?=[ \n])")
CUT_WINDOW = 1 << 12
DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


class SourceFile(NamedTuple):
    """One file of a source, as it was when the preparation was planned."""

    path: str
    format: str  # txt | jsonl | parquet
    compression: str  # "" | gz | xz | zst
    size: int
    mtime_ns: int
    sha256: str
    side: str = ""  # train | val where the files decide the split
    is_blank: bool = False  # a text file of whitespace


class Span(NamedTuple):
    """A part of a file: bytes, or row groups of parquet, or shards of a hub data set; all of it without a stop."""

    file: int
    start: int = 0
    stop: int | None = None


class Fragment(NamedTuple):
    """A document or the next piece of one."""

    text: str
    digest: bytes | None = None  # of the whole document where it comes in pieces; else taken of the text
    ends: bool = True
    n_forced: int = 0  # cuts inside a word, for want of a blank
    is_part: bool = False  # the document goes on in other units


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, and why: "where: what is wrong"."""

    reason: str


@dataclass(frozen=True)
class HubData:
    """A data set that the `datasets` library streams."""

    path: str  # a repository, or "parquet" or "json" with files of this machine
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()


Item = Fragment | BadDocument


def digest_of(data: bytes) -> bytes:
    """Return the identity of a document's text: the first half of its SHA-256 in UTF-8."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def iter_span(file: SourceFile, span: Span, text_key: str) -> Iterator[Item]:
    """Yield the documents of a part of a file.

    Raises: DataError when a compressed file is damaged, a text column is missing, or the file changed since the plan.
    """
    check_unchanged(file)
    readers = {"txt": _iter_txt, "jsonl": _iter_jsonl, "parquet": _iter_parquet}
    try:
        yield from readers[file.format](file, span, text_key)
    except DAMAGE as error:
        raise DataError(f"{file.path}: {file.compression} data damaged or cut short ({error}); restore the file") from None
    check_unchanged(file)


def check_unchanged(file: SourceFile) -> None:
    """Raises: DataError when a file is not the one that was planned."""
    try:
        now = Path(file.path).stat()
    except OSError as error:
        raise DataError(f"{file.path}: was there when this was planned, now {error.strerror}; restore it") from None
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(
            f"{file.path}: size={now.st_size:,}, changed while it was read (planned: {file.size:,} bytes, "
            "or another time of change); run it again when nothing writes to it"
        )


def open_bytes(file: SourceFile) -> IO[bytes]:
    """Open a file for reading its content, decompressed."""
    if file.compression == "gz":
        return cast("IO[bytes]", gzip.open(file.path))
    if file.compression == "xz":
        return lzma.open(file.path)
    raw = Path(file.path).open("rb")  # noqa: SIM115  # the caller closes it
    return decompressed(raw, "zst") if file.compression == "zst" else raw


def decompressed(raw: IO[bytes], compression: str) -> IO[bytes]:
    """Return the content of an open compressed file."""
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(raw))
    return lzma.open(raw) if compression == "xz" else io.BufferedReader(_ZstdReader(raw), CHUNK_BYTES)


class _ZstdReader(io.RawIOBase):
    """Decompressed zst, any number of frames.

    Note: the library's own stream ends without a word where the file was cut short.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  # any writable buffer, which has no type before Python 3.12
        while not self._ready:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = rest or self._file.read(1 << 17)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


# Text files: one document each


def iter_pieces(text: str, n_chars: int = PIECE_CHARS) -> Iterator[tuple[str, bool]]:
    """Yield a document in the pieces that are encoded at once, and whether a piece was cut inside a word."""
    begin = 0
    while len(text) - begin > n_chars:
        cut, is_forced = _find_last_cut(text, begin, begin + n_chars)
        yield text[begin:cut], is_forced
        begin = cut
    yield text[begin:], False


def _find_last_cut(text: str, begin: int, limit: int) -> tuple[int, bool]:
    """Return the last safe place to cut in text[begin:limit], else the limit itself and True."""
    window = CUT_WINDOW
    while True:
        low = max(begin, limit - window)
        found = [match.end() for match in SAFE_CUT.finditer(text, low, limit)]
        if found:
            return found[-1], False
        if low == begin:
            return limit, True
        window *= 16


def _iter_txt(file: SourceFile, span: Span, text_key: str) -> Iterator[Item]:
    if span.stop is not None and (span.start, span.stop) != (0, file.size):
        yield from _iter_txt_range(file, span)
        return
    digest, is_blank, reason = _scan_txt(file)
    if reason:
        yield BadDocument(f"{file.path}: {reason}")
    elif is_blank:
        yield Fragment("")
    else:
        with open_bytes(file) as opened:
            yield from _iter_text_fragments(_iter_chunks(opened), file.path, 0, digest, ends=True)


def _iter_txt_range(file: SourceFile, span: Span) -> Iterator[Item]:
    """Yield the pieces of one of several parts of a long text; parts meet at safe cuts, which each side finds alone."""
    if file.is_blank:
        yield Fragment("", ends=span.stop == file.size, is_part=True)
        return
    with open_bytes(file) as opened:
        start = _find_cut_after(opened, span.start, file.size)
        stop = _find_cut_after(opened, span.stop or file.size, file.size)
        if start >= stop:
            return
        opened.seek(start)
        digest = bytes.fromhex(file.sha256)[:DIGEST_BYTES]
        chunks = _iter_chunks(opened, stop - start)
        for fragment in _iter_text_fragments(chunks, file.path, start, digest, ends=stop == file.size):
            yield fragment._replace(is_part=True)


def _find_cut_after(file: IO[bytes], place: int, size: int) -> int:
    """Return the first safe cut at or after a byte; where none is near, the next byte that begins a character."""
    if place <= 0 or place >= size:
        return max(0, min(place, size))
    file.seek(place - 1)
    data = file.read(CHUNK_BYTES + 1)
    match = SAFE_CUT_BYTES.search(data)
    if match:
        return place - 1 + match.end()
    if place - 1 + len(data) >= size:
        return size
    offset = 1
    while offset < len(data) - 1 and data[offset] & 0xC0 == 0x80:
        offset += 1
    return place - 1 + offset


def _iter_chunks(file: IO[bytes], n_bytes: int | None = None) -> Iterator[bytes]:
    while n_bytes is None or n_bytes > 0:
        chunk = file.read(CHUNK_BYTES if n_bytes is None else min(CHUNK_BYTES, n_bytes))
        if not chunk:
            return
        n_bytes = None if n_bytes is None else n_bytes - len(chunk)
        yield chunk


def iter_decoded(chunks: Iterator[bytes], where: str, offset: int = 0) -> Iterator[str]:
    """Decode UTF-8 strictly, without a byte order mark at the start of the file.

    Raises: DataError at a byte that is not UTF-8. Replacing it would train on text that nobody wrote.
    """
    pending, place = b"", offset
    for chunk in chain(chunks, (b"",)):
        data = pending + chunk
        try:
            text, used = data.decode("utf-8"), len(data)
        except UnicodeDecodeError as error:
            if not chunk or len(data) - error.start > 3 or error.reason != "unexpected end of data":
                wrong = f"byte {place + error.start:,} is 0x{data[error.start]:02x}, not UTF-8"
                advice = "convert it first, for example with iconv -f latin1 -t utf-8"
                raise DataError(f"{where}: {wrong}; {advice}") from None
            text, used = data[: error.start].decode("utf-8"), error.start
        if place == 0 and used:
            text = text.removeprefix(BYTE_ORDER_MARK)
        pending, place = data[used:], place + used
        if text:
            yield text


def _iter_text_fragments(chunks: Iterator[bytes], where: str, offset: int, digest: bytes, ends: bool) -> Iterator[Fragment]:
    """Yield the text in the same pieces as iter_pieces would, with little of it in memory."""
    buffer = ""
    for text in iter_decoded(chunks, where, offset):
        buffer += text
        while len(buffer) > PIECE_CHARS:
            cut, is_forced = _find_last_cut(buffer, 0, PIECE_CHARS)
            yield Fragment(buffer[:cut], digest, ends=False, n_forced=is_forced)
            buffer = buffer[cut:]
    if buffer or ends:
        yield Fragment(buffer, digest, ends)


def _scan_txt(file: SourceFile) -> tuple[bytes, bool, str]:
    """Read a text once for its identity, whether it is blank, and what is wrong with it."""
    digest, is_blank = hashlib.sha256(), True
    try:
        with open_bytes(file) as opened:
            for text in iter_decoded(_iter_chunks(opened), ""):
                digest.update(text.encode())
                is_blank = is_blank and not text.strip()
    except DataError as error:
        return b"", False, str(error).removeprefix(": ")
    return digest.digest()[:DIGEST_BYTES], is_blank, ""


# Records: one document each


def _iter_jsonl(file: SourceFile, span: Span, text_key: str) -> Iterator[Item]:
    with open_bytes(file) as opened:
        place, number = 0, 1
        if span.start:
            # A line belongs to the part in which it begins.
            opened.seek(span.start - 1)
            place = span.start - 1 + sum(map(len, _iter_long_line(opened)))
        while span.stop is None or place < span.stop:
            line = opened.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            begin, place = place, place + len(line)
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                place += sum(map(len, _iter_long_line(opened)))
                item: Item | None = BadDocument(
                    f"a line of {place - begin:,} bytes, more than {MAX_LINE_BYTES:,}; "
                    "a .txt file, which is read in pieces, may hold a document of any length"
                )
            else:
                item = parse_line(line if begin else line.removeprefix(b"\xef\xbb\xbf"), text_key)
            if isinstance(item, BadDocument):
                line_number = 1 + _count_lines(file, begin) if span.start else number
                item = BadDocument(f"{file.path}:{line_number}: {item.reason}")
            if item is not None:
                yield item
            number += 1


def _iter_long_line(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the rest of a line in bearable parts."""
    while part := file.readline(CHUNK_BYTES):
        yield part
        if part.endswith(b"\n"):
            return


def _count_lines(file: SourceFile, n_bytes: int) -> int:
    """Count the lines before a place of a plain file; lines read from the middle of it do not know their number."""
    with open_bytes(file) as opened:
        return sum(chunk.count(b"\n") for chunk in _iter_chunks(opened, n_bytes))


def parse_line(line: bytes, text_key: str) -> Item | None:
    """Return the document of one line of jsonl; None for a blank line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadDocument(f"byte {error.start:,} of the line is 0x{line[error.start]:02x}, not UTF-8; mend the line")
    except (ValueError, RecursionError) as error:
        return BadDocument(f"not JSON ({error}); mend the line")
    if not isinstance(record, dict):
        return BadDocument(f"a JSON {type(record).__name__}, not an object; mend the line")
    if text_key not in record:
        there = ", ".join(map(str, list(record)[:10])) or "none"
        return BadDocument(f"text_key={text_key}, no such column (there: {there}); give --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        return BadDocument(f"{text_key} is {type(text).__name__}, not a string; mend the line or give --text-key")
    return Fragment(text)


def _iter_parquet(file: SourceFile, span: Span, text_key: str) -> Iterator[Item]:
    with open_parquet(file.path) as opened:
        names = opened.schema_arrow.names
        if text_key not in names:
            raise DataError(f"{file.path}: text_key={text_key}, no such column (there: {', '.join(names[:10])}); give --text-key")
        stop = opened.num_row_groups if span.stop is None else span.stop
        row = sum(opened.metadata.row_group(group).num_rows for group in range(span.start))
        for batch in opened.iter_batches(PARQUET_ROWS, row_groups=list(range(span.start, stop)), columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield checked_text(text, f"{file.path}: row {row:,}", text_key)


def open_parquet(path: str) -> Any:  # noqa: ANN401  # pyarrow has no types
    """Open a parquet file.

    Raises: DataError when it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file, or cut short ({error}); restore the file") from None


def checked_text(text: object, where: str, text_key: str) -> Item:
    if isinstance(text, str):
        return Fragment(text)
    return BadDocument(f"{where}: {text_key} is {type(text).__name__}, not a string; mend the row or give --text-key")
