"""An application that writes whatever it may, past the library: good traffic goes on, and the status stays true."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Column, Connection, Engine, Table, create_engine, delete, insert, text, update
from sqlalchemy.exc import DBAPIError, StatementError

from outboxkit import outbox, tables
from outboxkit.headers import pack_headers
from outboxkit.migrations.roles import COLUMNS, GRANTS, create_roles
from outboxkit_relay.exit_codes import Exit
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, by_key, first_occurrences, numbers, ordinal
from tests.conftest import PROFILE
from tests.database_roles import drop_roles
from tests.deadlines import DEADLINE
from tests.faults.traffic import LEFT, message, open_destination, with_both_brokers

FULL: Final = PROFILE == "full"
TRIES: Final = 200_000 if FULL else 600
AT_ONCE: Final = 100  # tries in a transaction
GOOD_AT_ONCE: Final = 10
KEYS: Final = 5
GOOD_LEFT: Final = """
    SELECT (SELECT count(*) FROM outbox_messages WHERE substr(key, 1, 4) = 'good'::bytea)
        + (SELECT count(*) FROM outbox_waiting WHERE substr(key, 1, 4) = 'good'::bytea)
"""
WITHIN: Final = 3_600.0 if FULL else DEADLINE
_READY: Final = [pack_headers((("ce_id", b"x"), ("ce_type", b"t"))), pack_headers(()), b"\2\0\0\0\x09short", b"\7"]
_INSTANTS: Final = ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC", "1970-01-01", "2026-01-01 00:00:00+14"]
_TEXTS: Final = ["", " ", "t", "order.placed", "x" * 300, "\u202egpj", "\x1b[2J", "a\nb", "%s", "'; DROP TABLE x; --"]
_NUMBERS: Final = [-1, 0, 1, 7, 63, 64, 2**15 - 1, 2**31 - 1, 2**63 - 1]
#: What is drawn most of the time for a column of this name, so that many a row passes the rules of its table.
_FITTING: Final[dict[str, list[Any]]] = {
    "shard": list(range(64)),
    "kind": ["event", "command"],
    "reason": ["retry", "follower", "scheduled"],
    "role": ["reader", "writer"],
    "headers": _READY[:2],
    "due_at": [None, "now()", "now() + interval '1 year'"],
    "expires_at": [None, None, "now()", "now() + interval '1 year'"],
}


@contextmanager
def _application(database_url: str) -> Iterator[Engine]:
    """Logs in as a role that may do what an application may, and nothing else."""
    owner, prefix = create_engine(database_url), f"any{uuid4().hex[:12]}_"
    with owner.begin() as connection:
        create_roles(connection, prefix)
    engine = create_engine(database_url, connect_args={"options": f"-c role={prefix}app"})
    try:
        yield engine
    finally:
        engine.dispose()
        with owner.begin() as connection:
            drop_roles(connection, prefix)
        owner.dispose()


def _writable() -> dict[tuple[str, str], tuple[str, ...]]:
    """Every table and verb of an application's role, with the columns that it may write."""
    found = dict(COLUMNS["app"])
    for table, verbs in GRANTS["app"].items():
        found |= {(table, verb): tuple(tables.METADATA.tables[table].c.keys()) for verb in verbs.split(", ")}
    return {place: columns for place, columns in found.items() if place[1] != "SELECT"}


def _drawn(rng: random.Random, column: Column[Any], topics: list[str]) -> Any:
    """A value for a column: one that fits, as a rule, or whatever its type takes."""
    fitting = {**_FITTING, "topic": topics}.get(column.name)
    if fitting is not None and rng.random() < 0.8:
        value = rng.choice(fitting)
        return text(value) if column.name.endswith("_at") and value else value
    by_type: dict[type, Callable[[], Any]] = {
        bytes: lambda: rng.choice([b"", b"\0", *_READY, rng.randbytes(rng.randrange(1, 2_000))]),
        int: lambda: rng.choice(_NUMBERS),
        UUID: lambda: UUID(int=rng.getrandbits(128)),
        str: lambda: rng.choice(_TEXTS),
        dict: lambda: rng.choice([[], {}, "text", {"a": [None, 1e300]}]),
        bool: lambda: rng.random() < 0.5,
    }
    if column.nullable and rng.random() < 0.2:
        return None
    try:
        return by_type[column.type.python_type]()
    except KeyError:
        return text(f"'{rng.choice(_INSTANTS)}'::timestamptz")


def _try(rng: random.Random, connection: Connection, topics: list[str], tried: Counter[str]) -> None:
    (name, verb), columns = rng.choice(sorted(_writable().items()))
    table: Table = tables.METADATA.tables[name]
    values = {column: _drawn(rng, table.c[column], topics) for column in columns}
    statement: Any = {"INSERT": insert(table).inline().values(values), "UPDATE": update(table).values(values)}.get(verb)
    if statement is None:
        statement = delete(table)
    tried[f"{verb} {name}"] += 1
    try:
        with connection.begin_nested():
            connection.execute(statement)
    except (DBAPIError, StatementError) as error:
        tried["forbidden"] += "permission denied" in str(error)
    else:
        tried[f"{verb} {name}, taken"] += 1


@pytest.mark.timeout(4_500)  # the large count takes half an hour
def test_whatever_an_application_writes_good_messages_go_out_in_order_and_the_status_is_true(
    database_url: str, kafka: servers.Server, rabbitmq: servers.Server, tmp_path: Path
) -> None:
    world, name = with_both_brokers(database_url, kafka, rabbitmq, tmp_path), uuid4().hex
    readers = {f"a-{name}": open_destination(kafka, f"a-{name}")}
    readers |= {f"bank.{name}": open_destination(rabbitmq, f"bank.{name}")}
    world.environment["OUTBOXKIT_RELAY__ON_DEAD"] = "skip"
    topics = [*readers, f"bank.none-{name}", "impossible name", "x" * 250]
    rng, tried = random.Random(4711), Counter[str]()
    relay = world.start("relay", "run")
    try:
        with _application(database_url) as engine:
            good = _write(rng, engine, topics, tried)
        world.until(lambda: relay.poll() is not None or world.scalar(GOOD_LEFT) == 0, "every good one has left", WITHIN)
        assert relay.poll() is None, world.logs()
        for topic, reader in readers.items():
            seen = first_occurrences([one for one in reader.read() if one.key.startswith("good")])
            assert sorted(numbers(seen)) == list(range(good)), topic
            assert all(places == sorted(places) for places in by_key(seen, ordinal).values()), topic
        world.until(lambda: _told(world) == world.scalar(LEFT), "the status tells what is in the tables")
        world.stop(relay)
    finally:
        world.close()
    assert not tried["forbidden"], tried
    for table, verb in _writable():
        assert tried[f"{verb} {table}"] > TRIES / 20, tried
    assert 0 < tried["INSERT outbox_messages, taken"] < tried["INSERT outbox_messages"], tried


def _write(rng: random.Random, engine: Engine, topics: list[str], tried: Counter[str]) -> int:
    """Good messages beside random statements; returns the number of good ones on each topic."""
    good = 0
    for _ in range(TRIES // AT_ONCE):
        with engine.begin() as connection:
            for number in range(good, good + GOOD_AT_ONCE):
                key, place = f"good {number % KEYS}", number // KEYS
                outbox.write(connection, [message(topic, key, number, place) for topic in topics[:2]])
            good += GOOD_AT_ONCE
            for _ in range(AT_ONCE):
                _try(rng, connection, topics, tried)
    return good


def _told(world: AcceptanceEnvironment) -> int:
    """Messages on their way, as `status` counts them."""
    done = world.run("status", "--json", codes=(Exit.OK, Exit.PROBLEMS))
    counts = ("pending", "retry", "follower", "scheduled")
    return sum(topic[count] for topic in json.loads(done.stdout)["topics"] for count in counts)
