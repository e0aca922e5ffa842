"""Dead messages get another content on the command line, in an editor or by a function; it is checked first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from outboxkit import avro, dead_letters, tables
from outboxkit.brokers import Delivery
from outboxkit.codecs import codec_named
from outboxkit.dead_letters import DeadLetter, Filter, Stage, State
from outboxkit.errors import DecodeError
from outboxkit.events import EventType
from outboxkit.headers import from_wire, unpack_headers, wire_headers
from outboxkit.policy import Failure
from tests.consumer_fixture import order
from tests.unit.relay.cli.builders import audit_of, state_of
from tests.unit.relay.cli.conftest import Outboxkit

SCHEMA = {"type": "record", "name": "Order", "fields": [{"name": "number", "type": "int"}]}


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str | None]], None]:
    """Somebody at the editor, who does this with the text."""

    def use(change: Callable[[str], str | None]) -> None:
        monkeypatch.setattr("click.edit", lambda text, **_: change(text))

    return use


def _sent(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(tables.outbox_messages).order_by("position")))


def test_what_is_saved_in_the_editor_goes_out_under_a_new_id(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None]
) -> None:
    letter = _json(engine, b'{"card":"4711","n":1}')
    editor(lambda text: text.replace('"n": 1', '"n": 2'))

    done = outboxkit("dlq", "edit", str(letter.id), "--yes", "--why", "OPS-7")

    assert done.code == 0
    assert '-  "n": 1' in done.err
    assert '+  "n": 2' in done.err
    (row,) = _sent(engine)
    assert (row.payload, row.key) == (b'{"card":"4711","n":2}', b"7")
    assert str(row.message_id) != letter.message_id
    with engine.connect() as connection:
        found = {one.id: one for one in dead_letters.find(connection, Filter(state=None))}
    parent = found.pop(letter.id)
    (child,) = found.values()
    assert (parent.payload, parent.state, child.parent_id) == (b'{"card":"4711","n":1}', State.REPLAYED, letter.id)
    assert [action for action, _ in audit_of(engine)] == ["dlq.reveal", "dlq.repair"]


@pytest.mark.parametrize("saved", ["not json at all", "{,}", ""])
def test_what_is_no_json_is_refused(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None], saved: str
) -> None:
    letter = _json(engine, b"{}")
    editor(lambda _: saved)

    done = outboxkit("dlq", "edit", str(letter.id), "--yes")

    assert done.code == 1
    assert "the edited text is not JSON at line 1, column" in done.err
    assert state_of(engine, letter) == "dead"
    assert _sent(engine) == []


@pytest.mark.parametrize("saved", [lambda _: None, lambda text: text], ids=["left", "saved as it was"])
def test_leaving_the_editor_changes_nothing(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None], saved: Callable[[str], str | None]
) -> None:
    letter = _json(engine, b'{"n":1}')
    editor(saved)

    done = outboxkit("dlq", "edit", str(letter.id), "--yes")

    assert (done.code, done.err) == (0, "nothing was changed\n")
    assert state_of(engine, letter) == "dead"


def test_a_payload_that_is_no_json_yet_can_be_repaired(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None]
) -> None:
    letter = _json(engine, b'{"n": 1')
    editor(lambda text: text + "}")

    assert outboxkit("dlq", "edit", str(letter.id), "--yes").code == 0

    assert _sent(engine)[0].payload == b'{"n":1}'


def test_avro_is_edited_as_json_and_written_with_its_schema(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None]
) -> None:
    letter = _avro(engine, 5)
    editor(lambda text: json.dumps({"number": json.loads(text)["number"] + 1}))

    done = outboxkit("dlq", "edit", str(letter.id), "--yes")

    assert done.code == 0, done.err
    (row,) = _sent(engine)
    message = from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)
    contract = EventType(name="order.placed", codec="avro")
    assert codec_named("avro").decode(message, contract, lambda _: json.dumps(SCHEMA)) == {"number": 6}


def test_avro_that_its_schema_does_not_take_is_refused_with_the_field(
    outboxkit: Outboxkit, engine: Engine, editor: Callable[..., None]
) -> None:
    letter = _avro(engine, 5)
    editor(lambda _: '{"number": "five"}')

    done = outboxkit("dlq", "edit", str(letter.id), "--yes")

    assert done.code == 1
    assert "number" in done.err
    assert state_of(engine, letter) == "dead"


def test_a_function_repairs_many_and_says_which_it_cannot(outboxkit: Outboxkit, engine: Engine) -> None:
    good, odd, broken = (
        _json(engine, payload, key) for payload, key in ((b'{"n":1}', b"1"), (b"{}", b"2"), (b"x", b"3"))
    )
    Path("many_repairs.py").write_text(
        "import json\n"
        "def add(message):\n"
        "    content = json.loads(message.payload)\n"
        "    return {**content, 'currency': 'EUR'} if 'n' in content else None\n"
    )

    dry = outboxkit("dlq", "repair", "--all", "--with", "many_repairs:add", "--dry-run")
    assert _sent(engine) == []
    done = outboxkit("dlq", "repair", "--all", "--with", "many_repairs:add", "--yes", "--why", "OPS-8")

    assert (dry.code, done.code) == (4, 4)
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert lines[str(good.id)[:8]] == "queued"
    assert lines[str(odd.id)[:8]] == "refused: the function leaves it alone"
    assert lines[str(broken.id)[:8]].startswith("refused: JSONDecodeError at")
    assert [row.payload for row in _sent(engine)] == [b'{"n":1,"currency":"EUR"}']
    assert [state_of(engine, one) for one in (good, odd, broken)] == ["replayed", "dead", "dead"]
    assert audit_of(engine) == [("dlq.repair", "OPS-8")]


@pytest.mark.parametrize(
    ("function", "told"),
    [("nowhere", "expected module:function"), ("json:nothing", "has no"), ("json:codecs", "not a")],
)
def test_a_function_that_is_none_is_one_line(outboxkit: Outboxkit, engine: Engine, function: str, told: str) -> None:
    done = outboxkit("dlq", "repair", "--all", "--with", function)

    assert done.code == 2
    assert told in done.err


def _json(engine: Engine, payload: bytes, key: bytes = b"7") -> DeadLetter:
    return _store(engine, order(1, payload=payload, key=key.decode()))


def _avro(engine: Engine, number: int) -> DeadLetter:
    contract = EventType(name="order.placed", schema=SCHEMA, codec="avro")
    found = codec_named("avro").encode({"number": number}, contract)
    values: dict[str, Any] = {"payload": found.payload, "content_type": found.content_type, "schema": found.schema}
    fingerprint = avro.fingerprint(avro.parse(SCHEMA)).hex()
    row = {"fingerprint": fingerprint, "role": "writer", "consumer": "", "type": "order.placed"}
    with engine.begin() as connection:
        connection.execute(tables.outbox_schemas.insert().values(**row, text=json.dumps(SCHEMA)))
    return _store(engine, order(number, **values))


def _store(engine: Engine, sent: Any) -> DeadLetter:
    delivery = Delivery(topic="orders", key=sent.key, headers=wire_headers(sent), payload=sent.payload, origin="o")
    letter = dead_letters.of_delivery(
        delivery, sent, consumer="billing", kind="event", failure=Failure.POISON, stage=Stage.DECODE,
        error=DecodeError("it is wrong"), attempts=1,
    )  # fmt: skip
    with engine.begin() as connection:
        dead_letters.bury(connection, letter)
    return letter
