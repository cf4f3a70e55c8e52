"""Text to ids and back. The tokenizer travels inside the data directory as JSON, never as a pickle."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from data_prep.shards import DataError, DType, canonical_json, sync_file

SPEC_FILE = "spec.json"
BLOCK_CHARACTERS = 1 << 20  # encode in blocks: a text needs 4 bytes per character only for one block at a time
MAX_SHOWN = 10

Ids = npt.NDArray[np.unsignedinteger[Any]]


def dtype_for(vocab_size: int) -> DType:
    """Return the narrowest dtype on disk that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character of an alphabet, in code point order: the video's and nanoGPT's character level."""

    chars: tuple[str, ...]

    kind = "char"
    name = "char"
    eot = None
    library = None

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Self:
        """Build the alphabet of all characters that occur."""
        return cls(tuple(sorted(set().union(*texts))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": list(self.chars)}

    @property
    def id(self) -> str:
        return spec_id(self.spec)

    @property
    def files(self) -> dict[str, bytes]:
        return {}

    def encode(self, text: str) -> Ids:
        """Return the id of each character.

        Raises: DataError listing the characters that are not in the alphabet.
        """
        ids = np.empty(len(text), dtype=dtype_for(self.vocab_size))
        for begin in range(0, len(text), BLOCK_CHARACTERS):
            codes = _code_points(text[begin : begin + BLOCK_CHARACTERS])
            found = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
            if (found < 0).any():
                raise DataError(self._unseen(text))
            ids[begin : begin + len(codes)] = found
        return ids

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids.

        Raises: DataError when an id is not in the vocabulary.
        """
        check_ids(ids, self.vocab_size, self.name)
        text: str = self._codes[ids].astype("<u4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")
        return text

    @cached_property
    def _codes(self) -> npt.NDArray[np.uint32]:
        return _code_points("".join(self.chars))

    @cached_property
    def _id_of_code(self) -> npt.NDArray[np.int32]:
        """The id of each code point, -1 where there is none; the last entry stands for all higher ones."""
        table = np.full(int(self._codes.max(initial=0)) + 2, -1, dtype=np.int32)
        table[self._codes] = np.arange(self.vocab_size)
        return table

    def _unseen(self, text: str) -> str:
        unseen = sorted(set(text) - set(self.chars))
        shown = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in unseen[:MAX_SHOWN])
        more = f" and {len(unseen) - MAX_SHOWN} more" if len(unseen) > MAX_SHOWN else ""
        return (
            f"char tokenizer: text holds {shown}{more}, not among its {self.vocab_size} characters; "
            "prepare with a text that has them or use the byte tokenizer"
        )


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per byte of UTF-8: 256 ids, nothing to learn, encodes any text."""

    kind = "byte"
    name = "byte"
    vocab_size = 256
    eot = None
    library = None

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @property
    def id(self) -> str:
        return spec_id(self.spec)

    @property
    def files(self) -> dict[str, bytes]:
        return {}

    def encode(self, text: str) -> Ids:
        """Return the bytes of the text; a lone surrogate, which UTF-8 cannot hold, becomes '?'."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids; a cut multi-byte character becomes U+FFFD.

        Raises: DataError when an id is not in the vocabulary.
        """
        check_ids(ids, self.vocab_size, self.name)
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")


class Tokenizer(Protocol):
    """What char, byte and the encodings of bpe.py have in common."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def spec(self) -> dict[str, Any]: ...
    @property
    def id(self) -> str: ...
    @property
    def files(self) -> dict[str, bytes]:
        """What lies beside spec.json."""
        ...

    @property
    def eot(self) -> int | None:
        """The id that may be put behind each document."""
        ...

    @property
    def library(self) -> str | None:
        """The encoder and its version; in no hash, since it decides nothing."""
        ...

    def encode(self, text: str) -> Ids: ...
    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str: ...


def spec_id(spec: dict[str, Any]) -> str:
    """Return the identity of a tokenizer: SHA-256 of its definition as canonical JSON."""
    return hashlib.sha256(canonical_json(spec)).hexdigest()


def check_ids(ids: npt.NDArray[np.integer[Any]], vocab_size: int, name: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(f"{name} tokenizer: token id {wrong:,}, not in 0..{vocab_size - 1:,}; the ids are of another tokenizer")


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write the definition as JSON that a person can read."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        with (directory / name).open("wb") as file:
            file.write(data)
            sync_file(file)
    with (directory / SPEC_FILE).open("wb") as file:
        file.write(json.dumps(tokenizer.spec, ensure_ascii=True, indent=1).encode("ascii") + b"\n")
        sync_file(file)


def load_tokenizer(directory: Path, backend: str = "tiktoken") -> Tokenizer:
    """Read the tokenizer of a prepared directory, DIR/tokenizer.

    `backend` is the encoder of byte-pair encodings, tiktoken or gigatoken.

    Raises: DataError when it is missing, damaged, or of a kind that this version does not know.
    """
    path = directory / SPEC_FILE
    try:
        spec = json.loads(path.read_bytes())
        kind = spec["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return _char_tokenizer(spec["chars"])
        if kind in ("tiktoken", "tokenizers"):
            return _file_tokenizer(directory, spec, backend)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: missing; run python -m data_prep prepare again or restore the file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tokenizer ({error}); prepare the data again or restore the file") from None
    raise DataError(f"{path}: kind={kind!r}, not known here; use the version that wrote it")


def _char_tokenizer(chars: list[str]) -> CharTokenizer:
    if any(len(char) != 1 for char in chars) or chars != sorted(set(chars)):
        raise ValueError("chars is not a sorted list of different characters")
    return CharTokenizer(tuple(chars))


def _file_tokenizer(directory: Path, spec: dict[str, Any], backend: str) -> Tokenizer:
    from data_prep.bpe import BytePairTokenizer, JsonTokenizer

    path = directory / spec["file"]
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != spec["sha256"]:
        raise DataError(f"{path}: sha256={found[:16]}…, spec.json says {spec['sha256'][:16]}…; restore the file")
    tokenizer: Tokenizer
    if spec["kind"] == "tiktoken":
        tokenizer = BytePairTokenizer(spec["name"], data, backend)
    else:
        tokenizer = JsonTokenizer(spec["name"], data, spec["eot"])
    if tokenizer.spec != spec:
        raise ValueError("it does not describe the file beside it")
    return tokenizer


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32, copy=False)
