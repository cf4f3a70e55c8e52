"""The batch depends on the counter alone, and the receipt notices what the eye cannot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.sampler import WindowSampler
from data_prep.shards import DataError, TokenShards
from harness.batches import EMPTY_RECEIPT, Batches, chain_receipt, digest_sample

SEQ_LEN, BATCH = 16, 8


def open_batches(data_dir: Path, *, micro: int = BATCH, rank: int = 0, world: int = 1, vocab: int = 9, **over) -> Batches:
    shards = over.get("shards") or TokenShards.open(data_dir, "train")
    return Batches(
        shards,
        WindowSampler(shards.n_tokens, SEQ_LEN, seed=over.get("seed", 0)),
        vocab_size=vocab,
        global_batch_size=BATCH,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        device=torch.device("cpu"),
    )


def train_on(data_dir: Path, n_steps: int, *, world: int = 1, micro: int = BATCH, start: int = 0, **over):
    """Return the inputs of each step as all ranks together see them, and the receipt."""
    ranks = [open_batches(data_dir, micro=micro, rank=rank, world=world, **over) for rank in range(world)]
    receipt, steps = EMPTY_RECEIPT, []
    for step in range(start, n_steps):
        steps.append(torch.cat([r.batch(step, m)[0] for r in ranks for m in range(r.n_micro_steps)]))
        receipt = chain_receipt(receipt, step, sum(r.read_digest() for r in ranks))
    return torch.stack(steps), receipt


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_batches_and_receipt_do_not_depend_on_ranks_or_micro_batches(data_dir: Path, world: int, micro: int) -> None:
    expected, receipt = train_on(data_dir, 5)
    seen, other = train_on(data_dir, 5, world=world, micro=micro)
    assert torch.equal(seen, expected)
    assert other == receipt


def test_a_resumed_run_sees_the_windows_of_an_uninterrupted_one(data_dir: Path) -> None:
    whole, _ = train_on(data_dir, 9)
    rest, _ = train_on(data_dir, 9, start=4)
    assert torch.equal(rest, whole[4:])


def test_a_small_budget_is_a_prefix_of_a_larger_one_across_epochs(data_dir: Path) -> None:
    n_windows = open_batches(data_dir).sampler.n_windows
    n_steps = 2 * n_windows // BATCH + 2  # into the third epoch
    longer, _ = train_on(data_dir, n_steps + 3)
    shorter, _ = train_on(data_dir, n_steps)
    assert torch.equal(longer[:n_steps], shorter)


def test_one_epoch_visits_each_window_once(data_dir: Path) -> None:
    batches = open_batches(data_dir)
    n_windows = batches.sampler.n_windows
    starts = np.concatenate([batches.find_starts(first) for first in range(0, n_windows - BATCH + 1, BATCH)])
    assert len(set(starts.tolist())) == len(starts) == n_windows // BATCH * BATCH
    assert set(starts.tolist()) <= {SEQ_LEN * window for window in range(n_windows)}


def test_targets_are_inputs_one_later(data_dir: Path) -> None:
    ids, targets = open_batches(data_dir).batch(3, 0)
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_the_receipt_notices_one_altered_token(data_dir: Path) -> None:
    train = TokenShards.open(data_dir, "train")
    tokens = train.read(0, train.n_tokens)
    altered = tokens.copy()
    start = int(open_batches(data_dir).find_starts(0)[3])
    altered[start + 5] = (altered[start + 5] + 1) % 9
    _, honest = train_on(data_dir, 5, shards=TokenShards([tokens]))
    _, other = train_on(data_dir, 5, shards=TokenShards([altered]))
    assert honest == train_on(data_dir, 5)[1]
    assert other != honest


def test_the_receipt_notices_ranks_that_read_the_same_slice(data_dir: Path) -> None:
    _, honest = train_on(data_dir, 5, world=2, micro=4)
    wrong = [open_batches(data_dir, micro=4, rank=0, world=2) for _ in range(2)]
    receipt = EMPTY_RECEIPT
    for step in range(5):
        for rank in wrong:
            rank.batch(step, 0)
        receipt = chain_receipt(receipt, step, sum(rank.read_digest() for rank in wrong))
    assert receipt != honest


def test_the_digest_binds_a_window_to_its_counter() -> None:
    first, second = np.arange(17, dtype=np.uint16), np.arange(1, 18, dtype=np.uint16)
    assert digest_sample(0, first) + digest_sample(1, second) != digest_sample(1, first) + digest_sample(0, second)


def test_the_receipt_notices_order_and_seed(data_dir: Path) -> None:
    receipts = {train_on(data_dir, 5)[1], train_on(data_dir, 5, seed=1)[1], train_on(data_dir, 6)[1]}
    assert len(receipts) == 3


def test_a_token_outside_the_vocabulary_is_named(data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"token id 8 in samples 0 to 7, is not in the vocabulary of 8"):
        open_batches(data_dir, vocab=8).batch(0, 0)
