"""What has been read, and what is read next; every interleaving is in tests/property/relay/test_reading_model.py."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from outboxkit.rows import Page, Row
from outboxkit_relay.core.lanes import MAIN, Lane, Lanes

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def page(snapshot: str, *positions: int) -> Page:
    return Page([Row.of(at, UUID(int=at), "a", None, "t", "event", b"", b"", NOW, None) for at in positions], snapshot)


def lanes(**topics: Lane | None) -> Lanes:
    return Lanes(frozenset({0}), Lane(seen="5:5:"), dict(topics))


def test_a_full_page_goes_on_and_a_short_one_ends_the_round_with_its_first_snapshot() -> None:
    found = Lanes(frozenset({0}))

    found.advance(MAIN, page("5:5:", 1, 2), 2)
    assert found.main == Lane(seen=None, round="5:5:", last=2)
    found.advance(MAIN, page("9:9:", 3), 2)
    assert found.main == Lane(seen="5:5:")


def test_new_shards_need_a_scan_and_lost_ones_only_stop_being_read() -> None:
    found = lanes(a=Lane(seen="4:4:"), b=None)

    found.own(frozenset())
    assert (found.main.seen, found.reading(MAIN, 1).shards) == ("5:5:", frozenset())
    found.own(frozenset({1}))
    assert (found.main, found.topics) == (Lane(), {"a": Lane(), "b": None})


def test_a_lane_that_is_through_joins_by_one_round_with_both_memories() -> None:
    found = lanes(a=Lane(seen="4:4:"))

    parts = found.reading(MAIN, 10).parts
    assert [(part.only, part.seen) for part in parts] == [(False, "5:5:"), (True, "4:4:")]
    found.advance(MAIN, page("6:6:"), 10)
    assert (found.topics, found.main) == ({}, Lane(seen="6:6:"))


def test_a_lane_that_still_has_pages_does_not_join() -> None:
    assert len(lanes(a=Lane(seen=None)).reading(MAIN, 10).parts) == 1
    assert len(lanes(a=Lane(seen="4:4:", round="5:5:", last=3)).reading(MAIN, 10).parts) == 1


def test_a_joining_topic_that_is_full_leaves_in_the_middle_of_the_round_with_its_own_memory() -> None:
    found = lanes(a=Lane(seen="4:4:"))
    found.reading(MAIN, 1)
    found.advance(MAIN, page("6:6:", 7), 1)

    found.separate("a")

    assert found.topics == {"a": Lane(seen="4:4:", round="6:6:", last=7)}
    assert len(found.reading(MAIN, 1).parts) == 1


def test_trouble_of_a_joining_topic_takes_it_out_of_the_round() -> None:
    found = lanes(a=Lane(seen="4:4:"))
    found.reading(MAIN, 1)
    found.advance(MAIN, page("6:6:", 7), 1)

    found.stop_reading("a")
    found.advance(MAIN, page("8:8:"), 1)

    assert (found.topics, found.main, found.reads("a")) == ({"a": None}, Lane(seen="6:6:"), False)
    found.resume_reading("a")
    assert found.topics == {"a": Lane()}


def test_a_page_of_a_lane_that_was_forgotten_meanwhile_changes_nothing() -> None:
    found = lanes(a=None)

    found.advance("a", page("6:6:", 7), 1)

    assert found.topics == {"a": None}


def test_a_page_that_was_cut_because_of_its_bytes_does_not_end_the_round() -> None:
    cut = replace(page("5:5:", 1, 2), cut=True)

    assert Lane().after(cut, 10) == Lane(round="5:5:", last=2)
    assert Lane(round="5:5:", last=2).after(Page([], "6:6:", cut=True), 10) == Lane(round="5:5:", last=2)
