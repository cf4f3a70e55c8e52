"""The sample order: checked against a second, scalar implementation written from data_prep/FORMAT.md."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sampler import SAMPLER_VERSION, WindowSampler
from data_prep.shards import DataError

WORD = 2**64 - 1


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def scalar_start(n_tokens: int, seq_len: int, seed: int, counter: int) -> int:
    """FORMAT.md, "The order of samples", one number at a time in Python's unbounded integers."""

    def key(epoch: int, domain: int) -> int:
        return splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ domain)

    n_windows = (n_tokens - seq_len) // seq_len
    epoch, window = divmod(counter, n_windows)
    bits = 0
    while 2**bits < n_windows:
        bits += 1
    half = max(2, bits + bits % 2) // 2
    mask = 2**half - 1
    while True:
        left, right = window >> half, window & mask
        for domain in range(4):
            left, right = right, left ^ (splitmix64(right ^ key(epoch, domain)) & mask)
        window = left << half | right
        if window < n_windows:
            break
    phase = key(epoch, 4) % seq_len if epoch else 0
    return phase + seq_len * window


def sampler_of(n_windows: int, seq_len: int = 1, seed: int = 0, spare: int = 0) -> WindowSampler:
    sampler = WindowSampler((n_windows + 1) * seq_len + spare, seq_len, seed)
    assert sampler.n_windows == n_windows
    return sampler


def chi_square_of_differences(order: np.ndarray) -> float:
    """Compare the differences of neighbours, modulo n and in 256 equal bins, with a flat distribution."""
    differences = np.diff(order.astype(np.int64)) % len(order)
    found = np.bincount(differences * 256 // len(order), minlength=256)
    expected = len(differences) / 256
    return float(((found - expected) ** 2 / expected).sum())


def test_pinned_vectors():
    """Literal numbers: a change of any of them changes the data of every experiment."""
    assert SAMPLER_VERSION == 1
    shakespeare = WindowSampler(1_003_854, 64, 0)
    assert shakespeare.n_windows == 15_684
    assert shakespeare.starts(np.array([0, 1, 2, 3, 15_684])).tolist() == [516_224, 684_416, 589_760, 546_304, 163_178]
    small = WindowSampler(1000, 7, 3).starts(np.array([0, 1, 2, 3, 139, 140, 141, 142, 143, 144, 1000, 123_456_789]))
    assert small.tolist() == [833, 686, 875, 469, 826, 959, 939, 428, 260, 554, 354, 638]
    large = WindowSampler(10**12 + 17, 2048, 2**63 + 5).starts(np.array([0, 1, 2, 10**9, 10**12, 2**62]))
    assert large.tolist() == [
        69_074_649_088,
        229_188_339_712,
        716_578_189_312,
        729_257_620_570,
        936_569_120_255,
        588_485_392_646,
    ]


def test_splitmix64_is_the_published_generator():
    """Vigna's splitmix64.c seeded with 1234567 first returns these numbers (ports test this vector)."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & WORD
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(deadline=None)
@given(
    n_windows=st.integers(1, 2**40),
    seq_len=st.integers(1, 5000),
    seed=st.integers(0, WORD),
    counters=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    spare=st.integers(0, 10_000),
)
def test_equals_the_scalar_implementation(n_windows, seq_len, seed, counters, spare):
    n_tokens = (n_windows + 1) * seq_len + spare % seq_len
    starts = WindowSampler(n_tokens, seq_len, seed).starts(np.array(counters))
    assert starts.tolist() == [scalar_start(n_tokens, seq_len, seed, counter) for counter in counters]


@settings(deadline=None)
@given(n_windows=st.integers(1, 3000), seq_len=st.integers(1, 40), seed=st.integers(0, WORD), epoch=st.integers(0, 99))
def test_an_epoch_visits_each_window_once_at_one_phase(n_windows, seq_len, seed, epoch):
    sampler = sampler_of(n_windows, seq_len, seed)
    starts = sampler.starts(np.arange(epoch * n_windows, (epoch + 1) * n_windows))
    windows, phases = np.divmod(starts, seq_len)
    assert len(set(phases.tolist())) == 1
    assert sorted(windows.tolist()) == list(range(n_windows))
    assert epoch or phases[0] == 0


@pytest.mark.parametrize("n_windows", [2**14 - 1, 2**14, 2**14 + 1, 2**15, 2**16 + 1, 100_003])
def test_bijection_around_powers_of_two(n_windows):
    windows = sampler_of(n_windows, seed=7).starts(np.arange(n_windows))
    assert (np.bincount(windows, minlength=n_windows) == 1).all()


@settings(deadline=None)
@given(
    n_windows=st.integers(1, 500),
    seq_len=st.integers(1, 64),
    spare=st.integers(0, 63),
    seed=st.integers(0, 9),
)
def test_every_read_ends_inside_the_split(n_windows, seq_len, spare, seed):
    n_tokens = (n_windows + 1) * seq_len + spare % seq_len
    starts = WindowSampler(n_tokens, seq_len, seed).starts(np.arange(3 * n_windows + 1))
    assert starts.min() >= 0
    assert starts.max() + seq_len + 1 <= n_tokens


def test_the_last_phase_reaches_the_last_token():
    """The bound above is tight: a larger one would read past the end, a smaller one would never use the last id."""
    n_tokens, seq_len = 640, 8
    starts = WindowSampler(n_tokens, seq_len, 0).starts(np.arange(100_000))
    assert starts.max() + seq_len + 1 == n_tokens


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 5))
def test_small_budget_is_a_prefix_in_any_blocks(first, block, seed):
    """Neither how far a run goes nor how the counters are asked for changes any sample."""
    sampler = sampler_of(97, seq_len=5, seed=seed)
    whole = sampler.starts(np.arange(400))
    assert (sampler.starts(np.arange(first)) == whole[:first]).all()
    blocks = [sampler.starts(np.arange(begin, min(begin + block, 400))) for begin in range(0, 400, block)]
    assert (np.concatenate(blocks) == whole).all()


def test_phase_and_order_change_every_epoch():
    sampler = sampler_of(50, seq_len=1000)
    epochs = sampler.starts(np.arange(40 * 50)).reshape(40, 50)
    phases = (epochs % 1000)[:, 0]
    orders = {tuple(row) for row in (epochs // 1000).tolist()}
    assert len(set(phases.tolist())) >= 38  # 40 draws of 1,000: a repeat or two is chance
    assert len(orders) == 40


def test_seeds_give_different_orders_and_phases():
    counters = np.arange(2000)
    starts = [sampler_of(1000, seq_len=64, seed=seed).starts(counters) for seed in range(20)]
    for i, one in enumerate(starts):
        for other in starts[:i]:
            assert (one // 64 == other // 64).mean() < 0.02  # two unrelated orders of 1,000 agree at 1 in 1,000


def test_serial_differences_look_like_a_shuffle():
    """255 degrees of freedom: mean 255, standard deviation 23; 400 is more than six of them off."""
    n = 1_000_000
    ours = [chi_square_of_differences(sampler_of(n, seed=seed).starts(np.arange(n))) for seed in range(2)]
    numpys = chi_square_of_differences(np.random.default_rng(0).permutation(n))
    assert max(*ours, numpys) < 400
    assert min(*ours, numpys) > 130


def test_the_serial_test_can_fail():
    """An affine permutation, which many loaders call a shuffle, is far out."""
    n = 1_000_003
    assert chi_square_of_differences(np.arange(n) * 654_321 % n) > 100_000


def test_consecutive_windows_are_far_apart_also_in_small_epochs():
    """Mean distance of neighbours in a random order is n/3; a short cycle or near-identity would show here."""
    for n_windows in (64, 100, 1000, 4097):
        windows = sampler_of(n_windows).starts(np.arange(20 * n_windows)).reshape(20, n_windows)
        assert np.abs(np.diff(windows)).mean() == pytest.approx(n_windows / 3, rel=0.1)


def test_order_id_changes_with_everything_that_changes_the_order():
    base = WindowSampler(1000, 8, 0).order_id("c0", "train")
    others = {
        WindowSampler(1001, 8, 0).order_id("c0", "train"),
        WindowSampler(1000, 9, 0).order_id("c0", "train"),
        WindowSampler(1000, 8, 1).order_id("c0", "train"),
        WindowSampler(1000, 8, 0).order_id("c1", "train"),
        WindowSampler(1000, 8, 0).order_id("c0", "val"),
    }
    assert len(others | {base}) == 6
    assert base == hashlib.sha256(b"order\n1\nc0\ntrain\n1000\n8\n0").hexdigest()


def test_epoch_tokens_counts_inputs():
    sampler = WindowSampler(1_003_854, 64, 0)
    assert sampler.epoch_tokens == 15_684 * 64


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32])
def test_counters_of_any_integer_type(dtype):
    sampler = sampler_of(30, seq_len=4)
    assert (sampler.starts(np.arange(9, dtype=dtype)) == sampler.starts(np.arange(9))).all()
    assert sampler.starts(np.arange(0, dtype=dtype)).shape == (0,)
    assert sampler.starts(np.arange(9, dtype=dtype)).dtype == np.int64


def test_negative_counter_is_an_error():
    with pytest.raises(IndexError, match="-1"):
        sampler_of(30).starts(np.array([3, -1]))


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "seed", "named"),
    [(127, 64, 0, "n_tokens=127"), (0, 1, 0, "n_tokens=0"), (100, 0, 0, "seq_len=0"), (100, 8, -1, "seed=-1")],
)
def test_impossible_settings_are_named(n_tokens, seq_len, seed, named):
    with pytest.raises(DataError, match=rf"^window sampler: {named}, .*; use "):
        WindowSampler(n_tokens, seq_len, seed)


def test_two_seq_lens_are_enough():
    assert WindowSampler(128, 64, 0).starts(np.arange(3)).max() + 65 <= 128
