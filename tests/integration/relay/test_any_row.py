"""Rows that outboxkit has not written: whatever stands in the table, every good row goes out, in order."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, func, insert, select, text

from outboxkit import dead_letters, migrations, outbox, tables
from outboxkit.brokers import memory, open_publisher
from outboxkit.headers import pack_headers
from outboxkit.outbox import pauses
from outboxkit.policy import Failure, Followers, RetryPolicy, full_jitter
from outboxkit.rows import shard_of
from outboxkit_relay.core.state import RelayConfig
from tests.conftest import PROFILE
from tests.deadlines import DEADLINE
from tests.integration.relay.world import (
    ScriptedPublisher,
    count,
    engine_for,
    message,
    relaying,
    until,
    write,
)
from tests.sqlite_template import copied

HOT, WAITING, LETTERS = tables.outbox_messages, tables.outbox_waiting, tables.dead_letters
QUICK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1))
SKIP = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1), followers=Followers.SKIP)


def _unguarded(engine: Engine) -> None:
    """Takes the constraints away, as in a database that an older version has made."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            found = connection.execute(
                text(
                    "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype = 'c' "
                    "AND conrelid::regclass::text IN ('outbox_messages', 'outbox_waiting', 'outbox_control')"
                )
            ).all()
            for table, name in found:
                connection.execute(text(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"'))
        else:
            connection.execute(text("PRAGMA ignore_check_constraints = ON"))


def _stored(topic: str = "orders", key: bytes | None = b"k", **changes: Any) -> dict[str, Any]:
    """A row as another program writes it."""
    row_id = uuid4()
    return {
        "shard": shard_of(topic, key, row_id, tables.SHARDS),
        "message_id": row_id,
        "topic": topic,
        "key": key,
        "type": "order.placed",
        "kind": "event",
        "payload": b"bad",
        "headers": pack_headers((("ce_id", str(row_id).encode()), ("ce_type", b"order.placed"))),
        "content_type": "application/json",
        "occurred_at": text("CURRENT_TIMESTAMP"),
        **changes,
    }


def _write_bad(engine: Engine, row: dict[str, Any], *, table: Any = HOT, **more: Any) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        connection.execute(insert(table).values(**row, **more))


INSTANTS = ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC", "garbage"]
HEADERS = [b'{"a": 1}', b"\3ce_id\0ce_type\0\0one", b"\3\xff\xff\0\0x", b"\2\0\0\0\x09short", b"\1odd", b"\x07", b"\3"]


def _instants(engine: Engine) -> list[tuple[str, Any]]:
    """Texts that are no instant of the calendar, with their SQL; only a file takes garbage."""
    names = [at for at in INSTANTS if at != "garbage" or engine.dialect.name == "sqlite"]
    return [(at, _instant(engine, at)) for at in names]


def _instant(engine: Engine, at: str) -> Any:
    return text(f"'{at}'::timestamptz" if engine.dialect.name == "postgresql" else f"'{at}'")


def _bad_rows(engine: Engine) -> list[dict[str, Any]]:
    rows = [_stored(key=b"bad %d" % number, headers=packed) for number, packed in enumerate(HEADERS)]
    for column in ("recorded_at", "expires_at"):
        for name, at in _instants(engine):
            rows.append(_stored(key=f"{column} {name}".encode()) | {column: at})
    return [*rows, _stored(topic="", key=b"no topic")]


def test_a_row_that_can_never_be_sent_is_a_dead_letter_and_every_good_one_goes_out(engine: Engine) -> None:
    _unguarded(engine)
    bad, name = _bad_rows(engine), uuid4().hex
    write(engine, *(message(number) for number in range(10)))
    for row in bad:
        _write_bad(engine, row)
    write(engine, *(message(number) for number in range(10, 20)))

    with relaying(engine, open_publisher(f"memory://{name}", {}), RelayConfig(retry=QUICK)):
        until(lambda: _pending(engine) == 0)

    assert [one.payload for one in memory.exchange(name).messages("orders")] == [b"%d" % number for number in range(20)]
    with engine.connect() as connection:
        letters = connection.execute(select(LETTERS.c.key, LETTERS.c.failure, LETTERS.c.payload)).all()
    assert sorted(bytes(key) for key, _, _ in letters) == sorted(row["key"] for row in bad)
    assert {(failure, bytes(payload)) for _, failure, payload in letters} == {("invalid", b"bad")}


@pytest.mark.parametrize("followers", [Followers.PARK, Followers.SKIP])
def test_its_key_is_handled_as_behind_any_dead_head(engine: Engine, followers: Followers) -> None:
    _unguarded(engine)
    write(engine, message(1), message(2))
    _write_bad(engine, _stored(headers=HEADERS[0]))
    write(engine, message(3), message(4), message(5, key="other"))
    publisher = ScriptedPublisher()
    config = RelayConfig(retry=SKIP if followers is Followers.SKIP else QUICK)

    with relaying(engine, publisher, config):
        until(lambda: count(engine, LETTERS) == 1 and count(engine, HOT) == 0)
        if followers is Followers.SKIP:
            until(lambda: len(publisher.accepted) == 5)

    sent = [row.payload for row in publisher.accepted if row.key == b"k"]
    assert sent == [b"1", b"2", *([b"3", b"4"] if followers is Followers.SKIP else [])]
    assert count(engine, WAITING) == (0 if followers is Followers.SKIP else 2)
    assert b"5" in [row.payload for row in publisher.accepted]


def test_a_waiting_row_that_can_never_be_sent_is_a_dead_letter_too(engine: Engine) -> None:
    _unguarded(engine)
    now = text("CURRENT_TIMESTAMP")
    for position, row in enumerate((_stored(key=None, headers=HEADERS[0]), _stored(key=None, headers=HEADERS[1]))):
        _write_bad(engine, row, table=WAITING, reason="retry", due_at=now, position=-position - 1)
    _write_bad(
        engine,
        _stored(key=None, expires_at=_instant(engine, "infinity")),
        table=WAITING,
        reason="retry",
        due_at=now,
        position=-9,
    )
    write(engine, message(1))
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: count(engine, LETTERS, LETTERS.c.failure == "invalid") == 3)
        until(lambda: len(publisher.accepted) == 1)

    assert count(engine, WAITING) == 0


@pytest.mark.parametrize(
    "as_another", ["upper(message_id)", "substr(message_id, 1, 8) || '-' || substr(message_id, 9)"]
)
def test_an_id_that_a_file_holds_in_another_form_is_one(tmp_path: Path, as_another: str) -> None:
    """It went out, and stayed: the next relay sent it again."""
    engine = engine_for(copied(tmp_path / "forms.db", migrations.upgrade))
    write(engine, message(1), message(2))
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE outbox_messages SET message_id = {as_another} WHERE position = 1"))
    publisher = ScriptedPublisher()

    with relaying(engine, publisher):
        until(lambda: count(engine, HOT) == 0)

    engine.dispose()
    assert [row.payload for row in publisher.accepted] == [b"1", b"2"]


def test_an_id_that_is_none_is_told_as_that_wherever_the_row_waits(tmp_path: Path) -> None:
    engine = engine_for(copied(tmp_path / "ids.db", migrations.upgrade))
    write(engine, message(1), message(2, key="other"), message(3, key="third"))
    waits = {"reason": "retry", "due_at": text("CURRENT_TIMESTAMP"), "position": -1}
    _write_bad(engine, _stored(key=None), table=WAITING, **waits)
    with engine.begin() as connection:
        connection.execute(text("UPDATE outbox_messages SET message_id = 'zz' WHERE position = 1"))
        connection.execute(text("UPDATE outbox_waiting SET message_id = 'zz'"))
        connection.execute(text("UPDATE outbox_messages SET message_id = 'zz', shard = 999 WHERE position = 2"))
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: count(engine, LETTERS) == 2 and [row.payload for row in publisher.accepted] == [b"3"])

    with engine.connect() as connection:
        errors = connection.execute(select(LETTERS.c.error)).scalars().all()
    engine.dispose()
    assert all("message_id" in error and "UUID" in error for error in errors), errors


def test_a_scheduled_row_that_the_outbox_does_not_take_is_a_letter_and_holds_up_no_other(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("ALTER TABLE outbox_waiting DROP CONSTRAINT outbox_waiting_expires_at_check"))
    now = text("CURRENT_TIMESTAMP")
    for number in range(5):
        row = _stored(key=b"k", payload=b"%d" % number)
        bad = {"expires_at": _instant(engine, "infinity")} if number in {1, 2} else {}
        _write_bad(engine, row | bad, table=WAITING, reason="scheduled", due_at=now)
    engine.dispose()  # of a file, these connections check nothing
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: count(engine, WAITING) == 0 and len(publisher.accepted) == 3)

    assert [row.payload for row in publisher.accepted] == [b"0", b"3", b"4"]
    with engine.connect() as connection:
        assert sorted(connection.scalars(select(LETTERS.c.payload))) == [b"1", b"2"]


def test_a_retry_without_a_time_and_a_key_that_nobody_stopped_go_out(engine: Engine) -> None:
    """What a person has moved by hand, and would wait for ever while the status says that all is well."""
    _write_bad(engine, _stored(key=None, payload=b"1"), table=WAITING, reason="retry", position=1)
    _write_bad(engine, _stored(key=b"lost", payload=b"2"), table=WAITING, reason="follower", position=2)
    _write_bad(engine, _stored(key=b"soon", payload=b"3"), table=WAITING, reason="scheduled")
    publisher = ScriptedPublisher()

    with relaying(engine, publisher):
        until(lambda: sorted(row.payload for row in publisher.accepted) == [b"1", b"2", b"3"])


def test_a_row_of_no_shard_and_one_below_all_positions_are_not_forgotten(engine: Engine) -> None:
    _unguarded(engine)
    _write_bad(engine, _stored(shard=999))
    _write_bad(engine, _stored(shard=-1))
    publisher = ScriptedPublisher()

    with relaying(engine, publisher):
        until(lambda: count(engine, LETTERS, LETTERS.c.failure == "invalid") == 2)

    assert count(engine, HOT) == 0


def test_a_row_that_the_database_cannot_move_is_buried_and_the_others_are_moved(database_url: str) -> None:
    """An index entry has a size: a key may be sent, and yet be too long to wait."""
    engine = engine_for(database_url)
    _unguarded(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE outbox_waiting ADD CONSTRAINT no_x CHECK (payload <> 'x'::bytea)"))
    _write_bad(engine, _stored(key=b"k", payload=b"x"))
    write(engine, message(1), message(2, key="other"))
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload in {b"x", b"2"} else None

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: [row.payload for row in publisher.accepted] == [b"1"])
        until(lambda: count(engine, LETTERS) == 2)

    with engine.connect() as connection:
        found = dict(connection.execute(select(LETTERS.c.payload, LETTERS.c.failure)).all())
    engine.dispose()
    assert {bytes(payload): failure for payload, failure in found.items()} == {b"x": "invalid", b"2": "rejected"}


def test_a_message_whose_id_is_longer_than_an_index_entry_is_buried_under_its_rows(engine: Engine) -> None:
    name = random.Random(7).randbytes(6_000).hex()
    bad = _stored(headers=pack_headers((("ce_id", name.encode()), ("ce_type", b"order.placed"))))
    _write_bad(engine, bad)
    write(engine, message(1, key="other"))
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.INVALID if row.payload == b"bad" else None

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: count(engine, LETTERS) == 1 and len(publisher.accepted) == 1)

    with engine.connect() as connection:
        (letter,) = dead_letters.find(connection, dead_letters.Filter(message_id=str(bad["message_id"])))
    assert (letter.headers, letter.payload) == (bad["headers"], b"bad")


def test_an_unreadable_pause_is_left_alone_and_the_others_are_obeyed(engine: Engine) -> None:
    _unguarded(engine)
    control = tables.outbox_control
    lasting = _instant(engine, "infinity")
    rows: list[dict[str, Any]] = [
        {"scope": "key", "target": "orders\\xff k", "reason": "r", "set_by": "x"},
        {"scope": "destination", "target": "", "reason": "r", "set_by": "x"},
        {"scope": "destination", "target": "mails", "reason": "r", "set_by": "x", "until": lasting},
        {"scope": "type", "target": "x" * 100_000, "reason": " ", "set_by": "x", "until": lasting},
    ]
    for row in rows:
        with engine.begin() as connection:
            connection.execute(insert(control).values(**row))
    write(engine, message(1), message(2, topic="mails"))
    publisher = ScriptedPublisher()

    with relaying(engine, publisher):
        until(lambda: [row.payload for row in publisher.accepted] == [b"1"])
        with engine.begin() as connection:
            assert [str(one.target) for one in pauses.pauses(connection)] == ["mails"]
            assert pauses.resume(connection, pauses.Target(pauses.Scope.DESTINATION, "mails"), by="x")
        until(lambda: len(publisher.accepted) == 2)


def test_how_far_behind_can_be_asked_whatever_stands_in_the_table(engine: Engine) -> None:
    _unguarded(engine)
    _write_bad(engine, _stored(recorded_at=_instant(engine, "infinity")))

    with engine.connect() as connection:
        assert outbox.lag(connection) == outbox.Lag(oldest=timedelta(0), depth=1)


@pytest.mark.timeout(2_400)  # the large count takes minutes
def test_random_rows_beside_good_ones_hinder_none_of_them(engine: Engine) -> None:
    """Good rows have keys of their own; bad ones draw every column at random."""
    rng, wanted, within = (random.Random(4711), *((100_000, 1_200.0) if PROFILE == "full" else (400, DEADLINE)))
    _unguarded(engine)
    name, good, bad = uuid4().hex, 0, 0
    while bad < wanted:
        with engine.begin() as connection:
            rows = [_random_row(rng, engine) for _ in range(100)]
            for row in rows:
                connection.execute(insert(HOT).values(**row))
            bad += len(rows)
            outbox.write(connection, [message(good + number, key=f"good {number % 5}") for number in range(50)])
            good += 50

    with relaying(engine, open_publisher(f"memory://{name}", {}), RelayConfig(retry=SKIP)):
        until(lambda: len(_good(name)) >= good, within=within)
        until(lambda: _pending(engine) == 0, within=within)

    assert _good(name) == [b"%d" % number for number in range(good)]
    assert len(memory.exchange(name).messages("orders")) + count(engine, LETTERS) + _expired(engine) == good + bad


def _pending(engine: Engine) -> int:
    """Rows that are on their way, counted by one statement: they move between the two tables."""
    hot, waiting = (select(func.count()).select_from(table).scalar_subquery() for table in (HOT, WAITING))
    with engine.connect() as connection:
        return int(connection.execute(select(hot + waiting)).scalar_one())


def _expired(engine: Engine) -> int:
    ledger = tables.outbox_ledger.c
    with engine.connect() as connection:
        return sum(map(len, connection.execute(select(ledger.ids).where(ledger.outcome == "expired")).scalars()))


def _good(name: str) -> list[bytes]:
    found = [one for one in memory.exchange(name).messages("orders") if (one.key or b"").startswith(b"good")]
    return [one.payload or b"" for one in found]


def _random_row(rng: random.Random, engine: Engine) -> dict[str, Any]:
    instants = [at for _, at in _instants(engine)] + [_instant(engine, "1970-01-01 00:00:00.000000")]
    headers = [*HEADERS, b"", rng.randbytes(rng.randrange(200)), b"\3" + rng.randbytes(40), b"\2" + rng.randbytes(40)]
    row = _stored(
        key=rng.choice([None, b"", b"\0", rng.randbytes(rng.randrange(1, 60))]),
        type=rng.choice(["", "t", "\u202e", "x" * 5_000]),
        kind=rng.choice(["event", "command", "nothing"]),
        payload=rng.randbytes(rng.choice([0, 1, 100, 9_000])),
        headers=rng.choice(headers),
    )
    if rng.random() < 0.3:
        row["recorded_at"] = rng.choice(instants)
    if rng.random() < 0.3:
        row["expires_at"] = rng.choice(instants)
    return row
