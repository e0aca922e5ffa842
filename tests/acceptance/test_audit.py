"""What judges the runs: it must see what is wrong, and nothing else."""

from __future__ import annotations

import json

import pytest

from tests.acceptance.world import Seen, by_key, first_occurrences, ordinal


def seen(*places: int) -> list[Seen]:
    """Messages of one key, by their places in it; equal places are copies."""
    return [Seen(id=f"m{place}", key="k", body=json.dumps({"ordinal": place}).encode()) for place in places]


@pytest.mark.parametrize(
    ("places", "first"),
    [
        ((0, 1, 2), [0, 1, 2]),
        ((0, 1, 2, 0), [0, 1, 2]),  # a late copy reorders nothing
        ((0, 1, 0, 1, 2), [0, 1, 2]),
        ((1, 0, 1), [1, 0]),  # the first copy was too early, whatever comes later
        ((1, 0, 1, 2), [1, 0, 2]),
    ],
)
def test_the_order_is_that_of_the_first_copies(places: tuple[int, ...], first: list[int]) -> None:
    assert by_key(first_occurrences(seen(*places)), ordinal) == {"k": first}
