"""Letters leave as JSON lines and come back byte for byte; messages that other tools gave up become letters."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from sqlalchemy import Engine, select

from outboxkit import dead_letters, tables
from outboxkit.dead_letters import Filter
from tests.unit.relay.cli.builders import audit_of, bury
from tests.unit.relay.cli.conftest import Outboxkit


def test_what_is_exported_is_imported_as_it_was(outboxkit: Outboxkit, engine: Engine) -> None:
    letters = [bury(engine, key=b"1"), bury(engine, "shipping", key=b"\xff")]
    with engine.connect() as connection:
        before = {one.id: one for one in dead_letters.find(connection, Filter())}
    exported = outboxkit("dlq", "export", "--all", "--why", "moving")
    assert len(exported.out.splitlines()) == len(letters)
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.delete())
        connection.execute(tables.inbox_messages.delete())
    Path("letters.jsonl").write_text(exported.out)

    done = outboxkit("dlq", "import", "letters.jsonl", "--yes", "--why", "moved")
    again = outboxkit("dlq", "import", "letters.jsonl", "--yes")

    assert (done.code, again.code) == (0, 1)
    assert "it is there already" in again.out
    with engine.connect() as connection:
        assert {one.id: one for one in dead_letters.find(connection, Filter())} == before
        assert len(connection.execute(select(tables.inbox_messages)).all()) == 2, "a redelivery has no effect"
    assert [action for action, _ in audit_of(engine)] == ["dlq.export", "dlq.import"]


def test_a_dry_run_imports_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine)
    lines = outboxkit("dlq", "export", "--all", "--why", "x").out
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.delete())
    Path("letters.jsonl").write_text(lines)

    done = outboxkit("dlq", "import", "letters.jsonl", "--dry-run")

    assert done.code == 0
    assert "would import" in done.out
    assert outboxkit("dlq", "list").out == ""


def test_messages_of_another_tools_dead_letter_topic_can_be_replayed(outboxkit: Outboxkit, engine: Engine) -> None:
    headers = {"ce_id": b"7", "ce_type": b"order.placed", "content-type": b"application/json"}
    headers |= {"kafka_dlt-original-topic": b"orders", "kafka_dlt-original-consumer-group": b"billing"}
    record = {
        "topic": "orders-dlt", "key": _b64(b"k"), "payload": _b64(b"{}"), "partition": 0, "offset": 3,
        "headers": [[name, _b64(value)] for name, value in headers.items()],
    }  # fmt: skip
    Path("foreign.jsonl").write_text(json.dumps(record) + "\n")

    assert outboxkit("dlq", "import", "foreign.jsonl", "--yes").code == 0
    assert outboxkit("dlq", "replay", "--consumer", "billing", "--yes").code == 0

    with engine.connect() as connection:
        (row,) = connection.execute(select(tables.outbox_messages)).all()
    assert (row.topic, bytes(row.key), row.payload) == ("orders", b"k", b"{}")


def test_a_line_that_is_no_letter_is_named_and_nothing_is_imported(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine)
    good = outboxkit("dlq", "export", "--all", "--why", "x").out
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.delete())
    for bad, told in (
        ("{}", "line 2: this is no letter: it has no"),
        ("not json", "line 2: JSONDecodeError"),
        ('{"topic": "t", "headers": []}', "line 2: no header says"),
        ("[1]", "line 2: it is no object"),
    ):
        Path("letters.jsonl").write_text(good + bad + "\n")

        done = outboxkit("dlq", "import", "letters.jsonl", "--yes")

        assert done.code == 1
        assert told in done.err
        assert outboxkit("dlq", "list").out == ""


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
