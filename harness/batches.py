"""The batch is a pure function of (content id, data seed, seq_len, sample counter); ranks take slices of it.

Step s with global batch B trains on the samples s B .. (s+1) B - 1, whatever the world size, micro-batch or
past interruptions. The receipt proves it: a digest of every window that was handed to the model, with its counter.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.sampler import WindowSampler
from data_prep.shards import DataError, TokenShards, load_manifest
from harness.config import ConfigError
from harness.distributed import Ranks
from harness.plan import check_micro_batch
from harness.records import RunRecord

BLOCK_SAMPLES = 8192  # permutation indices are computed in blocks: one call costs the same for 64 as for thousands
N_LIMBS = 4  # a 128-bit sum crosses the ranks as 32-bit limbs, exact in float64
EMPTY_RECEIPT = "0" * 32


class Batches:
    """The training batches of one rank, on its device."""

    def __init__(
        self,
        shards: TokenShards,
        sampler: WindowSampler,
        *,
        vocab_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.shards, self.sampler, self.vocab_size, self.device = shards, sampler, vocab_size, device
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank_share = global_batch_size // world_size
        self.n_micro_steps = self.rank_share // micro_batch_size
        self.rank_offset = rank * self.rank_share
        self.block_start, self.block = 0, np.empty(0, dtype=np.int64)
        self.digest_dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")  # every id below vocab_size, in few bytes to hash
        self.digest_sum = 0  # over the samples since the last read_digest
        self.last_given = time.perf_counter()  # when the newest batch was handed out

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of one micro-step, and add them to the receipt.

        Shapes: (micro_batch_size, seq_len) int64, both; targets are the inputs one position later.
        Raises:
            DataError: a token id that the model does not know.
        """
        first = step * self.global_batch_size + self.rank_offset + micro_step * self.micro_batch_size
        windows = self.shards.gather(self.find_starts(first), self.sampler.seq_len + 1)
        if windows.max() >= self.vocab_size:
            raise DataError(
                f"training shards: token id {windows.max()} in samples {first} to {first + self.micro_batch_size - 1}, is not "
                f"in the vocabulary of {self.vocab_size}; run python -m data_prep verify --deep on the data directory"
            )
        for counter, window in enumerate(windows.astype(self.digest_dtype), start=first):
            self.digest_sum += digest_sample(counter, window)
        self.last_given = time.perf_counter()
        tokens = torch.from_numpy(windows)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def find_starts(self, first: int) -> npt.NDArray[np.int64]:
        """Return where the windows of one micro-batch begin in the token stream."""
        offset = first - self.block_start
        if offset < 0 or offset + self.micro_batch_size > len(self.block):
            size = max(BLOCK_SAMPLES, self.micro_batch_size)
            self.block_start, offset = first, 0
            self.block = self.sampler.starts(np.arange(first, first + size, dtype=np.uint64))
        return self.block[offset : offset + self.micro_batch_size]

    def read_digest(self) -> npt.NDArray[np.float64]:
        """Return this rank's digest sum since the last call, as limbs that may be summed over ranks, and begin anew."""
        total, self.digest_sum = self.digest_sum, 0
        return np.array([(total >> (32 * limb)) & 0xFFFFFFFF for limb in range(N_LIMBS)], dtype=np.float64)


def digest_sample(counter: int, window: npt.NDArray[np.unsignedinteger]) -> int:
    """Return a 128-bit digest of one sample: its counter and the token ids that were handed to the model."""
    digest = hashlib.blake2b(window.data, digest_size=16, key=counter.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def chain_receipt(receipt: str, step: int, limbs: npt.NDArray[np.float64]) -> str:
    """Extend a receipt by one step: a digest of the receipt so far, the step, and the sum over all ranks' samples."""
    total = sum(int(limb) << (32 * index) for index, limb in enumerate(limbs)) % 2**128
    parts = bytes.fromhex(receipt) + step.to_bytes(8, "little") + total.to_bytes(16, "little")
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def open_data(run: RunRecord, ranks: Ranks) -> tuple[TokenShards, Batches]:
    """Open the data that the run was planned for: the validation shards, and this rank's batches.

    Raises:
        ConfigError: the data changed since the plan, or the batch does not divide over the ranks.
        DataError: a shard is missing or truncated.
    """
    data_dir, what = Path(run.how.data_dir), run.what
    manifest = load_manifest(data_dir)
    if manifest.content_id != what.data_content_id:
        raise ConfigError(
            f"{data_dir}: content_id={manifest.content_id[:12]}, the plan was made for {what.data_content_id[:12]}; "
            "restore the data, or plan again"
        )
    train, val = (TokenShards.open(data_dir, split, manifest) for split in ("train", "val"))
    batches = Batches(
        train,
        WindowSampler(train.n_tokens, what.model.seq_len, what.data_seed),
        vocab_size=what.model.vocab_size,
        global_batch_size=what.optim.global_batch_size,
        micro_batch_size=check_micro_batch(what.optim.global_batch_size, run.how.engine.micro_batch_size, ranks.world_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    )
    return val, batches
