"""Making the tables, and deleting what is old."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, func, inspect, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.brokers import memory
from outboxkit_relay.store import retention
from tests.unit.relay.cli.conftest import Outboxkit

OLD, YOUNG = timedelta(days=400), timedelta(hours=1)


def test_init_creates_the_tables_once(outboxkit: Outboxkit, tmp_path: Path) -> None:
    first, second = outboxkit("init"), outboxkit("init")

    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    assert set(inspect(engine).get_table_names()) >= set(tables.METADATA.tables)
    engine.dispose()
    assert first.code == second.code == 0
    assert first.out.count("created table ") == len(tables.METADATA.tables)
    assert "created" not in second.out


@pytest.mark.parametrize(
    "command", ["status", "doctor", "trace 7", "dlq list", "prune", "db check", "relay run --once"]
)
def test_only_what_makes_tables_makes_a_database(outboxkit: Outboxkit, tmp_path: Path, command: str) -> None:
    """A mistyped name is told, and leaves no empty file behind."""
    done = outboxkit(*command.split())

    assert done.code == (3 if command == "doctor" else 2)
    assert f"there is no database file {tmp_path}/app.db: correct the URL" in done.out + done.err
    assert not (tmp_path / "app.db").exists()


def test_before_init_the_doctor_knows_one_cure(outboxkit: Outboxkit, tmp_path: Path) -> None:
    (tmp_path / "app.db").touch()

    done = outboxkit("doctor")

    assert done.code == 3
    assert done.out.splitlines() == [
        "Problem  tables",
        "  seen  the outbox tables are missing in this database",
        "  fix   run `outboxkit init` (or your migration)",
    ]


def test_a_dry_run_of_init_creates_nothing(outboxkit: Outboxkit) -> None:
    done = outboxkit("init", "--dry-run", "--topic", "orders")

    assert done.out.count("would create table ") == len(tables.METADATA.tables)
    assert "would declare orders\n" in done.out
    assert outboxkit("status").code == 2


def test_topology_is_what_the_consumer_reads(
    outboxkit: Outboxkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_app.py").write_text(
        "from outboxkit import Consumer\n"
        "from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import sessionmaker\n"
        "billing = Consumer('billing', sessions=sessionmaker(create_engine('sqlite://')))\n"
        "@billing.on('order.*', topic='orders')\n"
        "def bill(message): ...\n"
    )
    exchange = memory.exchange("unit")
    exchange.missing.update({"orders", "refunds"})
    monkeypatch.syspath_prepend(tmp_path)

    done = outboxkit("init", "--topology", "shop_app:billing", "--topic", "refunds")

    assert done.code == 0, done.err
    assert not exchange.missing


def _fill(engine: Engine) -> None:
    """Two rows of each kind: one that every retention has outlived, and one that none has."""
    ledger = {"relay": uuid4(), "topic": "t", "outcome": "published", "min_id": uuid4(), "max_id": uuid4()}
    arrays: dict[str, list[int]] = {"ids": [], "partitions": [], "offsets": []}
    with engine.begin() as connection:
        for number, age in enumerate((OLD, YOUNG)):
            at = database_now(-age)
            connection.execute(tables.outbox_ledger.insert().values(published_at=at, **ledger, **arrays))
            row = {"consumer": "billing", "source": "", "message_id": str(number), "handled_at": at}
            connection.execute(tables.inbox_messages.insert().values(**row))
            connection.execute(tables.outbox_audit.insert().values(at=at, who="ana", action="x", target="y"))
            _letter(engine, connection, closed_at=at, state="replayed")
            expires = {"scope": "s", "key": str(number), "expires_at": at if age is OLD else database_now(OLD)}
            connection.execute(tables.outbox_idempotency.insert().values(**expires))
            connection.execute(tables.outbox_sagas.insert().values(**_saga(f"{number}", "completed"), updated_at=at))


def _saga(key: str, status: str) -> dict[str, object]:
    return {
        "saga": "checkout", "key": key, "version": 1, "status": status, "step": "", "at": 0, "number": 0, "tries": 0,
        "done": [], "undo": [], "state": b"{}", "history": [],
    }  # fmt: skip


def _letter(engine: Engine, connection: object, **values: object) -> str:
    del engine
    message_id = str(uuid4())
    columns = {
        "id": uuid4(), "side": "consumer", "consumer": "billing", "topic": "t", "message_id": message_id, "type": "x",
        "kind": "event", "headers": b"\0\0", "failure": "poison", "stage": "handler", "error_class": "E", "error": "e",
        "attempts": 1, "group": "f",
    }  # fmt: skip
    connection.execute(tables.dead_letters.insert().values(**columns, **values))  # type: ignore[attr-defined]
    return message_id


def _counts(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            name: connection.execute(select(func.count()).select_from(tables.METADATA.tables[name])).scalar_one()
            for name in retention.PRUNED
        }


def test_prune_deletes_what_is_old_and_nothing_else(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)

    rehearsal = outboxkit("prune", "--dry-run", "--json")
    untouched = _counts(engine)
    done = outboxkit("prune", "--json")

    assert json.loads(rehearsal.out)["deleted"] == json.loads(done.out)["deleted"] == dict.fromkeys(untouched, 1)
    assert set(untouched.values()) == {2}
    assert set(_counts(engine).values()) == {1}
    assert set(json.loads(outboxkit("prune", "--json").out)["deleted"].values()) == {0}


def test_a_saga_that_has_not_ended_outlives_every_retention(outboxkit: Outboxkit, engine: Engine) -> None:
    open_, ended = ["running", "compensating", "stuck"], ["completed", "compensated"]
    with engine.begin() as connection:
        for status in (*open_, *ended):
            values = _saga(status, status) | {"updated_at": database_now(-OLD)}
            connection.execute(tables.outbox_sagas.insert().values(**values))

    outboxkit("prune")

    with engine.connect() as connection:
        assert sorted(connection.execute(select(tables.outbox_sagas.c.status)).scalars()) == sorted(open_)


def test_prune_goes_on_until_nothing_old_is_left(
    outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with engine.begin() as connection:
            at = database_now(-OLD)
            connection.execute(
                tables.outbox_audit.insert(), [{"who": "a", "action": "x", "target": "y"} for _ in range(5)]
            )
            connection.execute(tables.outbox_audit.update().values(at=at))
    monkeypatch.setattr("outboxkit_relay.cli.prune._PORTION", 4)

    done = outboxkit("prune", "--json")

    assert json.loads(done.out)["deleted"]["outbox_audit"] == 15
    assert _counts(engine)["outbox_audit"] == 0


def test_the_inbox_row_of_an_open_dead_letter_outlives_every_retention(outboxkit: Outboxkit, engine: Engine) -> None:
    with engine.begin() as connection:
        opened = _letter(engine, connection)
        closed = _letter(engine, connection, state="discarded", closed_at=database_now())
        for message_id in (opened, closed):
            connection.execute(tables.inbox_messages.insert().values(consumer="billing", message_id=message_id))
        connection.execute(tables.inbox_messages.update().values(handled_at=database_now(-OLD)))

    outboxkit("prune")

    with engine.connect() as connection:
        left = connection.execute(select(tables.inbox_messages.c.message_id)).scalars().all()
    assert left == [opened]
