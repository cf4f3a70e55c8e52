"""The order of training samples: sample g is a pure function of (split length, seq_len, seed, g).

Nothing is shuffled in memory and nothing is stored: an epoch is a keyed permutation of window numbers, evaluated
where it is needed. So resuming takes one integer, the world size does not matter, and a small budget is an exact
prefix of a larger one. FORMAT.md holds the definition; a change to any constant is a new SAMPLER_VERSION.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.shards import DataError

SAMPLER_VERSION = 1
N_ROUNDS = 4  # with splitmix64 as the round function 4 are enough for a flat serial test (tests/test_sampler.py)
PHASE_DOMAIN = N_ROUNDS  # rounds use the domains 0..3, the phase of an epoch the next one

Uint64s = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(states: Uint64s) -> Uint64s:
    """Return the output of splitmix64 at each state, all arithmetic modulo 2^64.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (2014); Vigna's splitmix64.c.
    """
    z = states + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def epoch_key(seed: int, epochs: Uint64s, domain: int) -> Uint64s:
    """Return one 64-bit key per epoch: splitmix64 chained over seed, epoch and domain."""
    seeded = splitmix64(np.array([seed], dtype=np.uint64))
    return splitmix64(splitmix64(seeded ^ epochs) ^ np.uint64(domain))


@dataclass(frozen=True)
class WindowSampler:
    """The order in which the windows of one split are visited, for ever."""

    n_tokens: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise DataError(f"window sampler: seq_len={self.seq_len}, not positive; use 1 or more")
        if not 0 <= self.seed < 2**64:
            raise DataError(f"window sampler: seed={self.seed}, not in 0..2^64-1; use another seed")
        if self.n_windows < 1:
            raise DataError(
                f"window sampler: n_tokens={self.n_tokens:,}, a split shorter than 2 x seq_len = {2 * self.seq_len:,} "
                "holds no window at every phase; use a smaller seq_len or more text"
            )

    @property
    def n_windows(self) -> int:
        """Windows in one epoch, the same in each: one seq_len is kept free for the epoch's phase."""
        return (self.n_tokens - self.seq_len) // self.seq_len

    @property
    def epoch_tokens(self) -> int:
        return self.n_windows * self.seq_len

    def starts(self, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return where the windows of the given global sample counters start; each reads seq_len + 1 ids.

        Shapes: counters (n,) -> (n,).
        """
        if counters.size and counters.min() < 0:
            raise IndexError(f"sample counter {counters.min()} is negative")
        epoch_of, index = np.divmod(counters.astype(np.uint64), np.uint64(self.n_windows))
        epochs, which = np.unique(epoch_of, return_inverse=True)
        windows = self._permuted(index, epochs, which)
        starts = self._phases(epochs)[which] + windows * np.uint64(self.seq_len)
        return starts.astype(np.int64)

    def order_id(self, content_id: str, split: str) -> str:
        """Return the identity of the whole order: equal ids mean equal samples at every counter."""
        parts = ("order", SAMPLER_VERSION, content_id, split, self.n_tokens, self.seq_len, self.seed)
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def _phases(self, epochs: Uint64s) -> Uint64s:
        """Return by how many ids the windows of each epoch are shifted; epoch 0 is not."""
        phases = epoch_key(self.seed, epochs, PHASE_DOMAIN) % np.uint64(self.seq_len)
        return np.where(epochs == 0, np.uint64(0), phases)

    def _permuted(self, index: Uint64s, epochs: Uint64s, which: npt.NDArray[np.intp]) -> Uint64s:
        """Return the window number at each place of its epoch: a Feistel network, cycle-walked into 0..n_windows-1."""
        keys = np.stack([epoch_key(self.seed, epochs, domain) for domain in range(N_ROUNDS)])
        windows = self._encrypt(index, keys[:, which])
        outside = np.flatnonzero(windows >= self.n_windows)
        while outside.size:
            walked = self._encrypt(windows[outside], keys[:, which[outside]])
            windows[outside] = walked
            outside = outside[walked >= self.n_windows]
        return windows

    def _encrypt(self, x: Uint64s, keys: Uint64s) -> Uint64s:
        """Apply one balanced Feistel network to each number below 4^half_bits.

        Shapes: x (n,), keys (N_ROUNDS, n).
        """
        half = np.uint64(self._half_bits)
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        return (left << half) | right

    @property
    def _half_bits(self) -> int:
        return max(1, ((self.n_windows - 1).bit_length() + 1) // 2)
