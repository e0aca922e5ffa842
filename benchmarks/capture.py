"""What capture costs: an ORM insert alone, with an event through outboxkit, and with events written by hand.

    scripts/bench capture [--quick] [--json FILE]

Every variant runs in the same process, in turns, on the same server (fsync on), and stores the same bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy import event as listeners
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from uuid_utils.compat import uuid7

from outboxkit import Outbox, OutboxMixin, event, migrations, tables
from outboxkit.headers import unpack_headers
from outboxkit.rows import shard_of

HEADER_NAMES = b"\3ce_specversion\0ce_id\0ce_type\0ce_source\0ce_dataschema\0content-type\0ce_time\0ce_partitionkey\0\0"


class Base(DeclarativeBase):
    pass


@event("order.placed")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    total: int
    status: str


class Order(OutboxMixin, Base):
    __tablename__ = "bench_orders"
    __outbox__ = Outbox(topic="orders", key="id")

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]
    status: Mapped[str] = mapped_column(default="new")


class Row(Base):
    """The same table as ours, written by hand as an ORM object."""

    __table__ = tables.outbox_messages.to_metadata(Base.metadata)


def values(order: Order) -> dict[str, object]:
    """The same row, as somebody would write it who knows the format and nothing else."""
    message_id, now, key = uuid7(), datetime.now(UTC), str(order.id)
    payload = {"order_id": order.id, "total": order.total, "status": order.status}
    sent = f"1.0\0{message_id}\0order.placed\0outboxkit\0urn:outboxkit:order.placed:1\0application/json\0"
    return {
        "shard": shard_of("orders", key.encode(), message_id, 64),
        "message_id": message_id,
        "topic": "orders",
        "key": key.encode(),
        "type": "order.placed",
        "kind": "event",
        "payload": json.dumps(payload, separators=(",", ":")).encode(),
        "headers": HEADER_NAMES + f"{sent}{now.isoformat()[:-6]}Z\0{key}".encode(),
        "content_type": "application/json",
        "schema_fingerprint": None,
        "occurred_at": now,
        "expires_at": None,
    }


COLUMNS = tuple(values(Order(id=1, total=1, status="new")))
BY_DRIVER = f"INSERT INTO outbox_messages ({', '.join(COLUMNS)}) VALUES ({', '.join('%s' for _ in COLUMNS)})"


def domain_only(session: Session, orders: list[Order]) -> None:
    session.add_all(orders)


def through_outboxkit(session: Session, orders: list[Order]) -> None:
    for order in orders:
        order.emit(lambda order=order: OrderPlaced(order.id, order.total, order.status))
    session.add_all(orders)


def orm_row_by_hand(session: Session, orders: list[Order]) -> None:
    session.add_all(orders)
    session.flush()
    session.add_all([Row(**values(order)) for order in orders])


def core_insert_by_hand(session: Session, orders: list[Order]) -> None:
    session.add_all(orders)
    session.flush()
    session.execute(tables.outbox_messages.insert().inline(), [values(order) for order in orders])


def driver_insert_by_hand(session: Session, orders: list[Order]) -> None:
    """The least that one more statement can cost: psycopg alone, behind SQLAlchemy's back."""
    session.add_all(orders)
    session.flush()
    rows = [tuple(values(order).values()) for order in orders]
    with session.connection().connection.cursor() as cursor:
        if len(rows) == 1:
            cursor.execute(BY_DRIVER, rows[0])
        else:
            cursor.executemany(BY_DRIVER, rows)


VARIANTS: list[Callable[[Session, list[Order]], None]] = [
    domain_only,
    through_outboxkit,
    orm_row_by_hand,
    core_insert_by_hand,
    driver_insert_by_hand,
]


def transaction(engine: Engine, variant: Callable[[Session, list[Order]], None], size: int) -> None:
    with Session(engine) as session, session.begin():
        variant(session, [Order(total=at) for at in range(size)])


def check_same_bytes(engine: Engine) -> None:
    """The comparison is fair: every variant stores the same row, its id and its times apart."""
    hot, found = tables.outbox_messages.c, {}
    own = {"xid", "position", "message_id", "occurred_at", "recorded_at", "headers"}
    for variant in VARIANTS[1:]:
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE outbox_messages; TRUNCATE bench_orders RESTART IDENTITY"))
        transaction(engine, variant, 3)
        with engine.connect() as connection:
            rows = connection.execute(select(tables.outbox_messages).order_by(hot.position)).mappings().all()
        found[variant.__name__] = [
            (
                {name: value for name, value in row.items() if name not in own},
                [(n, v if n not in {"ce_id", "ce_time"} else len(v)) for n, v in unpack_headers(row["headers"])],
            )
            for row in rows
        ]
    first = next(iter(found.values()))
    for name, rows in found.items():
        if rows != first:
            raise SystemExit(f"{name} stores other rows: {rows} instead of {first}")


def rate(
    engine: Engine, variant: Callable[[Session, list[Order]], None], *, size: int, writers: int, seconds: float
) -> float:
    """Domain rows per second."""
    done = [0] * writers
    start = threading.Barrier(writers + 1)

    def write(which: int) -> None:
        start.wait()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            transaction(engine, variant, size)
            done[which] += size

    threads = [threading.Thread(target=write, args=(which,)) for which in range(writers)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


def statements(engine: Engine, variant: Callable[[Session, list[Order]], None], size: int) -> int:
    seen: list[str] = []

    def listen(_c: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    listeners.listen(engine, "before_cursor_execute", listen)
    transaction(engine, variant, size)
    listeners.remove(engine, "before_cursor_execute", listen)
    return len(seen)


def allocated(engine: Engine, variant: Callable[[Session, list[Order]], None], size: int) -> int:
    """Peak bytes of one transaction."""
    tracemalloc.start()
    transaction(engine, variant, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measured(engine: Engine, *, size: int, writers: int, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Ratios are of rates in one round, so that a slow minute of the machine spoils no comparison."""
    rates: dict[str, list[float]] = {variant.__name__: [] for variant in VARIANTS}
    spent: dict[str, list[float]] = {variant.__name__: [] for variant in VARIANTS}
    for turn in range(rounds):
        start = turn % len(VARIANTS)
        for variant in VARIANTS[start:] + VARIANTS[:start]:
            with engine.begin() as connection:
                connection.execute(text("TRUNCATE outbox_messages, bench_orders"))
            cpu, began = time.process_time(), time.perf_counter()
            found = rate(engine, variant, size=size, writers=writers, seconds=seconds)
            rows = found * (time.perf_counter() - began)
            rates[variant.__name__].append(found)
            spent[variant.__name__].append((time.process_time() - cpu) / rows * 1e6)
    return [
        {
            "rows per transaction": size,
            "writers": writers,
            "variant": variant.__name__,
            "rows/s": round(statistics.median(rates[variant.__name__])),
            "over domain %": more(rates["domain_only"], rates[variant.__name__]),
            "over core %": more(rates["core_insert_by_hand"], rates[variant.__name__]),
            "client CPU us": round(statistics.median(spent[variant.__name__]), 1),
            "statements": statements(engine, variant, size),
            "peak KiB": allocated(engine, variant, size) // 1024,
        }
        for variant in VARIANTS
    ]


def more(base: list[float], rates: list[float]) -> float:
    """How much longer a row takes, in percent: the median of the rounds."""
    ratios = [one / other for one, other in zip(base, rates, strict=True)]
    return round(100 * (statistics.median(ratios) - 1), 1)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="short rounds: a look, not a measurement")
    arguments.add_argument("--json", type=Path, help="write the figures to this file")
    given = arguments.parse_args()
    from tests import servers
    from tests.servers.postgres import create_database, drop_database

    url = create_database(servers.find("postgres").url)
    engine = create_engine(url, pool_size=8)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        migrations.upgrade(connection)
        fsync = connection.scalar(text("SHOW fsync"))
        version = connection.scalar(text("SHOW server_version"))
    check_same_bytes(engine)
    rounds, seconds = (7, 0.4) if given.quick else (15, 1.0)
    results = [
        one
        for size in (1, 100)
        for writers in (1, 8)
        for one in measured(engine, size=size, writers=writers, rounds=rounds, seconds=seconds)
    ]
    found = {"postgresql": version, "fsync": fsync, "python": sys.version.split()[0], "results": results}
    print(json.dumps(found, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    engine.dispose()
    drop_database(url)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
