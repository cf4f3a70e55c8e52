"""Ids are hashes of meaning: order, spacing and absent values do not count, everything else does."""

from harness.records import hash_record


def test_ids_are_pinned() -> None:
    """The definition of an id is final: this value may never change."""
    assert hash_record({"b": [1, None], "a": {"x": 0.1, "y": None}, "c": None})[:10] == "613afbf10b"


def test_a_hash_ignores_key_order_and_null_but_not_values() -> None:
    base = {"a": 1.0, "b": {"c": [1, 2]}}
    assert hash_record({"b": {"c": [1, 2], "later": None}, "a": 1.0}) == hash_record(base)
    others = [{"a": 1.5, "b": {"c": [1, 2]}}, {"a": 1.0, "b": {"c": [2, 1]}}, {"a": 1.0, "b": {"c": [1, 2], "d": False}}]
    assert len({hash_record(record) for record in [base, *others]}) == 4
