"""What is queued for a topic, what is in flight, and what of it counts."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from outboxkit.brokers import Receipts, Refusal
from outboxkit.policy import Failure, Order
from outboxkit.rows import Row
from outboxkit_relay.core.destinations import Destination, InFlightBatch

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(position: int, key: bytes | None = b"k", kind: str = "event") -> Row:
    return Row.of(position, UUID(int=position), "orders", key, "t", kind, b"", b"", NOW, None)


def destination(order: Order, *rows: Row) -> Destination:
    found = Destination("orders", order)
    found.add(rows)
    return found


def positions(rows: list[Row]) -> list[int]:
    return [one.position for one in rows]


def receipts(count: int, *refused: int) -> Receipts:
    refusals = tuple(Refusal(index, Failure.REJECTED, "no") for index in refused)
    return Receipts([0] * count, [0] * count, refusals)


def sent(found: Destination, number: int, limit: int) -> None:
    found.sent(InFlightBatch(number, found.take(limit), NOW, NOW))


def test_strict_hands_over_one_row_of_a_key_and_the_next_when_it_is_settled() -> None:
    found = destination(Order.STRICT, row(1), row(2), row(3, b"other"), row(4))

    first = found.take(10)
    assert (positions(first), found.queued) == ([1, 3], 2)

    found.free([first[0]])
    assert positions(found.take(10)) == [2]


def test_a_batch_holds_rows_of_one_kind() -> None:
    found = destination(Order.PIPELINED, row(1), row(2, kind="command"), row(3, kind="command"), row(4))

    assert [positions(found.take(10)) for _ in range(3)] == [[1], [2, 3], [4]]


def test_pipelined_answers_count_in_the_order_of_hand_over() -> None:
    found = destination(Order.PIPELINED, *map(row, (1, 2, 3)))
    for number in (1, 2, 3):
        sent(found, number, 1)

    assert found.acknowledged(2, receipts(1)) == []
    assert [batch.number for batch in found.acknowledged(1, receipts(1))] == [1, 2]
    assert (found.in_flight, list(found.batches)) == (1, [3])


def test_nothing_is_handed_over_behind_a_refusal_that_does_not_count_yet() -> None:
    found = destination(Order.PIPELINED, *map(row, (1, 2, 3)))
    sent(found, 1, 1)
    sent(found, 2, 1)
    assert found.takes_more(given_up=0)

    found.acknowledged(2, receipts(1, 0))

    assert not found.takes_more(given_up=0)
    found.acknowledged(1, receipts(1))
    assert found.takes_more(given_up=0)


def test_nothing_is_handed_over_behind_a_batch_that_a_reset_has_ended() -> None:
    found = destination(Order.PIPELINED, *map(row, (1, 2)))
    sent(found, 7, 1)

    assert not found.takes_more(given_up=7)
    found.acknowledged(7, receipts(1))
    assert found.takes_more(given_up=7)


def test_pulling_a_key_leaves_the_others_in_order() -> None:
    for order in Order:
        found = destination(order, row(1), row(2, b"other"), row(3), row(4, b"other"))

        assert positions(found.pull(("orders", b"k"))) == [1, 3]
        assert (positions(found.take(10))[0], found.queued) in {(2, 0), (2, 1)}


def test_what_is_dropped_leaves_nothing_behind() -> None:
    found = destination(Order.STRICT, row(1), row(2), row(3, None))

    assert sorted(positions(found.drop())) == [1, 2, 3]
    assert (found.queued, found.take(10)) == (0, [])
    found.add([row(2)])
    assert positions(found.take(10)) == [2], "its key is not taken for busy"
