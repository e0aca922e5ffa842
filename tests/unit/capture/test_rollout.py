"""A share of the keys: stable, growing only, near its size, and another one for another subject."""

from __future__ import annotations

import pytest

from outboxkit.avro.subjects import SubjectStrategy, subject_for
from outboxkit.capture.rollout import in_share

KEYS = [f"order-{number}".encode() for number in range(20_000)]


def _chosen(share: float, salt: str = "") -> set[bytes]:
    return {key for key in KEYS if in_share(key, share, salt=salt)}


def test_a_share_is_near_its_size_and_the_ends_are_exact() -> None:
    assert _chosen(0.0) == set()
    assert len(_chosen(1.0)) == len(KEYS)
    assert abs(len(_chosen(0.1)) - 2_000) < 200


def test_a_share_that_grows_only_adds_keys() -> None:
    assert _chosen(0.1) < _chosen(0.2) < _chosen(0.7)


def test_other_subjects_begin_with_other_keys() -> None:
    assert len(_chosen(0.1, "a") & _chosen(0.1, "b")) < 400


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_of_zero_and_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        in_share(b"", share)


@pytest.mark.parametrize(
    ("strategy", "subject"),
    [
        (SubjectStrategy.TOPIC, "orders-value"),
        (SubjectStrategy.RECORD, "shop.Order"),
        (SubjectStrategy.TOPIC_RECORD, "orders-shop.Order"),
    ],
)
def test_subjects_are_named_as_confluent_names_them(strategy: SubjectStrategy, subject: str) -> None:
    assert subject_for(strategy, topic="orders", record="shop.Order") == subject
