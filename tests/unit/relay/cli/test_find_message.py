"""``outboxkit status --message ID`` finds a message wherever it is or was."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine

from outboxkit import dead_letters, outbox, tables
from outboxkit.policy import Failure
from outboxkit.rows import Evidence, Part, Reading, Row
from outboxkit_relay.core.protocol import FailedHead
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.store import stopped_keys
from outboxkit_relay.words import shortened
from tests.integration.relay.world import message
from tests.unit.relay.cli.conftest import Outboxkit


def _rows(connection: Connection) -> list[Row]:
    everything = Part(frozenset(), only=False, seen=None)
    reading = Reading(shards=frozenset(range(tables.SHARDS)), parts=(everything,), limit=100)
    return outbox.read(connection, reading).rows


def _places(outboxkit: Outboxkit, message_id: str) -> list[dict[str, Any]]:
    done = outboxkit("status", "--message", message_id, "--json")
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture
def rows(engine: Engine) -> list[Row]:
    """Three messages in the outbox."""
    with engine.begin() as connection:
        outbox.write(connection, [message(number, key=str(number)) for number in range(3)])
    with engine.connect() as connection:
        return _rows(connection)


def test_what_is_not_published_is_in_the_outbox(outboxkit: Outboxkit, rows: list[Row]) -> None:
    (place,) = _places(outboxkit, str(rows[1].id))

    assert (place["place"], place["topic"], place["type"]) == ("outbox", "orders", "order.placed")
    assert outboxkit("status", "--message", str(rows[1].id)).out.startswith(
        "outbox: topic orders, type order.placed, since "
    )


def test_what_is_published_is_evidenced_with_its_partition_and_offset(
    outboxkit: Outboxkit, engine: Engine, rows: list[Row]
) -> None:
    evidence = Evidence(topic="orders", outcome="published", rows=rows, partitions=[4, 5, 6], offsets=[7, 8, 9])
    with engine.begin() as connection:
        outbox.remove(connection, uuid4(), [evidence])

    (place,) = _places(outboxkit, str(rows[1].id))

    assert (place["place"], place["outcome"], place["partition"], place["offset"]) == ("broker", "published", 5, 8)


def test_a_dead_message_is_named_with_its_letter(outboxkit: Outboxkit, engine: Engine, rows: list[Row]) -> None:
    with engine.begin() as connection:
        dead_letters.bury(connection, dead_letters.of_row(rows[0], Failure.REJECTED, "no", 3))

    places = _places(outboxkit, str(rows[0].id))

    assert [place["place"] for place in places] == ["outbox", "dead letter"]
    assert (places[1]["failure"], places[1]["consumer"], places[1]["state"]) == ("rejected", "(relay)", "dead")


def test_what_waits_tells_why(outboxkit: Outboxkit, engine: Engine, rows: list[Row]) -> None:
    with engine.begin() as connection:
        held = {"failure": "rejected", "text": "no: thanks", "attempts": 2, "delay": timedelta(hours=1)}
        stopped_keys.stop_key(connection, FailedHead(row=rows[0], **held))  # type: ignore[arg-type]

    (place,) = _places(outboxkit, str(rows[0].id))

    assert (place["place"], place["reason"], place["key"], place["attempts"]) == ("waiting", "retry", "retry", 2)
    assert place["error"] == "rejected: no: thanks"


def test_times_are_written_in_one_way(outboxkit: Outboxkit, engine: Engine, rows: list[Row]) -> None:
    with engine.begin() as connection:
        held = {"failure": "rejected", "text": "no", "attempts": 2, "delay": timedelta(hours=1)}
        stopped_keys.stop_key(connection, FailedHead(row=rows[0], **held))  # type: ignore[arg-type]

    texts = [
        outboxkit(*command, str(rows[number].id)).out
        for number in (0, 1)
        for command in (("status", "--message"), ("trace",), ("messages", "show"))
    ]

    for text in (re.sub("ce_time: .*", "", one) for one in texts):  # a header is shown as it is
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)
        assert not re.search(r"\d\dT\d\d|\+00:00", text)


@pytest.mark.parametrize("name", [str(uuid4()), "never seen", "0190163d-8694-739b-aea5-966c26f8ad91"])
def test_what_is_nowhere_is_a_problem(outboxkit: Outboxkit, engine: Engine, name: str) -> None:
    done = outboxkit("status", "--message", name)

    assert (done.code, done.out) == (3, "")
    assert "nowhere" in done.err


def test_an_id_of_version_7_tells_when_its_message_was_made() -> None:
    made = find_message.made_at(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f"))  # the example of RFC 9562

    assert made is not None
    assert made == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
    assert find_message.made_at(uuid4()) is None


IN_ONE_SECOND = [f"0190163d-8694-7{digit}00-8000-000000000001" for digit in "abc"]


@pytest.mark.parametrize("place", ["outbox", "ledger", "letter", "inbox"])
def test_a_message_is_named_by_what_a_list_prints_wherever_it_is(
    outboxkit: Outboxkit, engine: Engine, place: str
) -> None:
    """Ids of one second begin alike: a list prints as much as tells them apart, and that leads to each of them."""
    messages = [message(number, key="7", id=one) for number, one in enumerate(IN_ONE_SECOND)]
    with engine.begin() as connection:
        outbox.write(connection, messages)
        rows = _rows(connection)
        if place == "ledger":
            evidence = Evidence(topic="orders", outcome="published", rows=rows, partitions=[0] * 3, offsets=[1, 2, 3])
            outbox.remove(connection, uuid4(), [evidence])
        if place == "letter":
            for row in rows:
                dead_letters.bury(connection, dead_letters.of_row(row, Failure.REJECTED, "no", 3))
            connection.execute(tables.outbox_messages.delete())
        if place == "inbox":
            connection.execute(tables.outbox_messages.delete())
            for one in IN_ONE_SECOND:
                connection.execute(tables.inbox_messages.insert().values(consumer="billing", message_id=one))
    short = shortened(IN_ONE_SECOND)[IN_ONE_SECOND[1]]
    assert short == "0190163d-8694-7b"

    traced = outboxkit("trace", short, "--json")
    too_short = outboxkit("trace", short[:-1])

    assert {json.loads(line)["message"] for line in traced.out.splitlines()} == {IN_ONE_SECOND[1]}
    assert too_short.code == 1
    assert "names several messages: give more of the id" in too_short.err
    if place != "inbox":
        assert outboxkit("status", "--message", short).out == outboxkit("status", "--message", IN_ONE_SECOND[1]).out
    if place == "outbox":
        assert f"message       {IN_ONE_SECOND[1]}\n" in outboxkit("messages", "show", short).out


def test_a_letters_short_id_leads_to_its_message(outboxkit: Outboxkit, engine: Engine, rows: list[Row]) -> None:
    letter = dead_letters.of_row(rows[0], Failure.REJECTED, "no", 3)
    with engine.begin() as connection:
        dead_letters.bury(connection, letter)

    done = outboxkit("trace", str(letter.id)[:8])

    assert f"letter {str(letter.id)[:8]}" in done.out


def test_a_screen_tells_its_messages_apart(outboxkit: Outboxkit, engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.write(connection, [message(n, key="7", id=one) for n, one in enumerate(IN_ONE_SECOND)])

    done = outboxkit("trace", "7")

    assert all(f"  {one[:16]}  " in done.out for one in IN_ONE_SECOND)
