"""Either way of the loss is timed and its memory told."""

import torch

from harness.bench_loss import measure_loss


def test_both_ways_have_a_row() -> None:
    torch.set_num_threads(1)
    chunks, plain = measure_loss(64, 8, 20_000, torch.device("cpu"))
    assert (chunks["loss"], plain["loss"]) == ("in chunks", "all logits")
    for row in (chunks, plain):
        assert row["seconds"] > 0
        assert row["memory_peak_bytes"] > 2**20
