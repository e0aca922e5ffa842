"""Rows that outboxkit has not written stop no command: all others are listed and changed, the bad ones are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, text
from starlette.testclient import TestClient

from outboxkit import outbox, tables
from outboxkit_relay.dashboard import dashboard
from tests.consumer_fixture import order
from tests.unit.relay.cli.conftest import Outboxkit
from tests.unit.relay.dashboard.world import HERE, waiting

#: SQL of a value that is none of its column's kind -> what is said about it
BAD = {
    "message_id": ("'zz'", "message_id is no UUID of 32 digits"),
    "topic": ("CAST(x'6f7264ff' AS TEXT)", "topic is no text"),
    "type": ("CAST(x'6f7264ff' AS TEXT)", "type is no text"),
    "recorded_at": ("'garbage'", "recorded_at is no instant between the years 1 and 9999"),
}
PLACES = ("position 3 of outbox_messages", "id 1 of outbox_waiting")
HOT, WAITING = tables.outbox_messages, tables.outbox_waiting


@pytest.fixture(params=BAD)
def column(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def good(engine: Engine, column: str) -> list[str]:
    """Ids of two good messages beside a bad row in each table."""
    messages = [order(number, key="k") for number in range(2)]
    with engine.begin() as connection:
        outbox.write(connection, messages)
        connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        connection.execute(insert(HOT).values(**waiting(key=b"k", payload=b"bad")))
        scheduled = {"reason": "scheduled", "due_at": func.strftime("%Y-%m-%d", "now", "+1 day")}
        connection.execute(insert(WAITING).values(**waiting(key=b"k", payload=b"bad"), **scheduled))
        for table in (HOT, WAITING):
            connection.exec_driver_sql(f"UPDATE {table.name} SET {column} = {BAD[column][0]} WHERE payload = x'626164'")
        connection.execute(text("PRAGMA ignore_check_constraints = OFF"))
    return [message.id for message in messages]


def test_a_list_shows_what_can_be_read_and_tells_where_the_bad_rows_stand(
    outboxkit: Outboxkit, column: str, good: list[str]
) -> None:
    done = outboxkit("messages", "list", "--json")

    rows = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0, done.err
    assert {row["message_id"] for row in rows if not row["error"]} == set(good)
    assert {row["error"] for row in rows if row["error"]} == {f"{place}: {BAD[column][1]}" for place in PLACES}
    assert {row["key"] for row in rows} == {"k"}
    table = outboxkit("messages", "list")
    assert table.code == 0
    assert all(one in table.out for one in good)
    assert f"{PLACES[0]}: {BAD[column][1]}" in " ".join(table.out.split())


@pytest.mark.parametrize("verb", [["discard"], ["redirect", "--to", "elsewhere"]])
def test_good_messages_of_its_destination_are_changed_and_a_bad_row_is_left_with_the_reason(
    outboxkit: Outboxkit, engine: Engine, column: str, good: list[str], *, verb: list[str]
) -> None:
    done = outboxkit("messages", *verb, "--topic", "orders", "--why", "x", "--yes", "--json")

    results = [json.loads(line) for line in done.out.splitlines()]
    assert {one["id"] for one in results if one["outcome"] != "refused"} == set(good)
    reasons = [one["reason"] for one in results if one["outcome"] == "refused"]
    assert len(reasons) == (0 if column == "topic" else 2)
    assert all(BAD[column][1] in reason and reason.startswith(PLACES) for reason in reasons)
    with engine.connect() as connection:
        left = connection.execute(select(HOT.c.payload).where(HOT.c.topic != "elsewhere")).scalars().all()
    assert left == [b"bad"]


@pytest.mark.parametrize(
    "command",
    ["messages show GOOD", "status", "status --json", "status --message GOOD", "trace k", "trace GOOD", "audit"],
)
def test_no_command_that_looks_dies_of_a_bad_row(outboxkit: Outboxkit, good: list[str], command: str) -> None:
    done = outboxkit(*command.replace("GOOD", good[0]).split())

    assert done.code in (0, 3)
    assert "unexpected" not in done.err
    assert good[0][:8] in done.out or "status" in command or command == "audit"


def test_a_bad_row_that_is_named_by_its_id_is_shown_as_far_as_it_can_be_read(
    outboxkit: Outboxkit, engine: Engine, column: str, good: list[str]
) -> None:
    if column == "message_id":
        assert outboxkit("messages", "show", "zz").code == 3
        return
    with engine.connect() as connection:
        bad = str(connection.execute(select(HOT.c.message_id).where(HOT.c.payload == b"bad")).scalar_one())

    for command in (["messages", "show", bad], ["status", "--message", bad], ["trace", bad]):
        done = outboxkit(*command)
        assert done.code == 0, done.err
        assert done.out
    shown = outboxkit("messages", "show", bad, "--json")
    assert json.loads(shown.out)["message"] == bad


def test_the_page_lists_them_too_over_an_engine_of_the_application(
    engine: Engine, column: str, good: list[str]
) -> None:
    plain = create_engine(engine.url)
    client: Any = TestClient(dashboard(plain), base_url=HERE, client=("127.0.0.1", 1))

    answers = {path: client.get(path) for path in ("/", "/messages", "/trace?q=k", f"/messages/{good[0]}")}

    plain.dispose()
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(answers, 200)
    page = answers["/messages"].text
    assert all(one[:8] in page for one in good)
    assert all(f"{place}: {BAD[column][1]}" in page for place in PLACES)
    assert ("(no id)" in page) == (column == "message_id")


def test_a_key_that_is_stored_as_text_is_bytes(outboxkit: Outboxkit, engine: Engine) -> None:
    """As a script writes it into a file that asks for no kinds."""
    with engine.begin() as connection:
        outbox.write(connection, [order(1, key="k")])
        connection.execute(text("UPDATE outbox_messages SET key = 'k', payload = 'text'"))

    (row,) = map(json.loads, outboxkit("messages", "list", "--json").out.splitlines())
    assert row["key"] == "k"
    assert "4 bytes" in outboxkit("messages", "show", row["message_id"]).out
    assert outboxkit("messages", "redirect", row["message_id"], "--to", "mails", "--why", "x", "--yes").code == 0
    assert outboxkit("messages", "discard", row["message_id"], "--why", "x", "--yes").code == 0
