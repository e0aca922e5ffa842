"""SQLite 3.35 and newer: the embedded default for demo and tests.

One writer at a time, so positions commit in order.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import (
    URL,
    ColumnElement,
    Engine,
    String,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.types import NullType

from outboxkit import tables
from outboxkit._sql import microseconds_of
from outboxkit.dialects import Features
from outboxkit.errors import ConfigurationError
from outboxkit.rows import LARGE, NO_ID, UNREADABLE, NoText, Page, Part, Reading, Row, exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection, Table
    from sqlalchemy.exc import DBAPIError

__all__ = ["dialect", "hidden", "lock_patience", "refusal", "schema_of", "schemas", "takes_no_writes"]

_HOT: Final = tables.outbox_messages.c
_MESSAGE: Final = (_HOT.message_id, _HOT.topic, _HOT.key, _HOT.type, _HOT.kind, _HOT.payload, _HOT.headers)
# As they are stored: a column of a file holds any kind of value, whatever its type says.
_ROW: Final = (
    _HOT.position,
    *(type_coerce(column, NullType()) for column in _MESSAGE),
    microseconds_of(_HOT.recorded_at),
    microseconds_of(_HOT.expires_at),
)
_NOTHING: Final = literal("")
_BLIND: Final = (_HOT.position, *[_NOTHING] * 2, null(), *[_NOTHING] * 4, literal(UNREADABLE), null())

_UNUSABLE: Final = {
    "SQLITE_CANTOPEN": "cannot be opened: does its folder exist, and may this user write there?",
    "SQLITE_NOTADB": "is no SQLite database",
    "SQLITE_PERM": "must not be opened by this user",
    "SQLITE_READONLY": "is read-only for this user",
}

_CONFIRM_LEASE: Final = text(
    """
    SELECT (julianday(expires_at) - julianday('now')) * 86400.0
    FROM outbox_relays
    WHERE id = :relay AND expires_at > strftime('%Y-%m-%d %H:%M:%f', 'now')
    """,
)


class SQLite:
    """The embedded database."""

    features = Features(name="sqlite", concurrent_writers=False, notifies=False)

    def engine(self, url: URL, patience: timedelta, *, pooled: bool, schema: str, creates: bool) -> Engine:
        """See `outboxkit.dialects.Dialect.engine`. There is no pooler for a file."""
        del pooled
        if schema:
            raise ConfigurationError(
                f"database_schema = {schema!r}: a file of SQLite has no schemas; remove the setting"
            )
        engine = create_engine(
            url.set(drivername="sqlite"),
            hide_parameters=True,
            connect_args={"timeout": patience.total_seconds()},
        )
        if not creates:
            event.listen(engine, "do_connect", _take_an_existing_file)
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
        return engine

    def read(self, connection: Connection, reading: Reading) -> Page:
        """See `outboxkit.dialects.Dialect.read`. A snapshot is the highest position: one writer commits in order."""
        wanted = [
            _HOT.shard.in_(sorted(reading.shards)),
            _HOT.position > reading.last,
            or_(*map(_of(reading), reading.parts)),
        ]
        if reading.round is not None:
            wanted.append(_HOT.position <= int(reading.round))
        highest = select(func.coalesce(func.max(_HOT.position), 0)).scalar_subquery()
        columns = _BLIND if reading.blind else _ROW
        statement = select(highest, *columns).where(*wanted).order_by(_HOT.position).limit(reading.limit)
        rows: list[Row] = []
        large: dict[int, int] = {}
        # Without rows the statement tells no snapshot; then what any part has seen is still all there is to see.
        snapshot = max(int(part.seen or 0) for part in reading.parts)
        with connection.execute(statement) as found:  # one after the other: the file is not read into memory
            for told, *values in found:
                snapshot, row = told, _row(*values)
                size = len(row.payload)
                if size > LARGE:
                    if large and sum(large.values()) + size > reading.max_bytes:
                        return Page(rows, str(snapshot), large, cut=True)
                    large[row.position] = size
                rows.append(row)
        return Page(rows, str(snapshot), large)

    def confirm_lease(self, connection: Connection, relay: UUID) -> timedelta | None:
        """See `outboxkit.dialects.Dialect.confirm_lease`. All that can be read is durable here."""
        found = connection.execute(_CONFIRM_LEASE, {"relay": relay.hex}).one_or_none()
        connection.commit()
        return timedelta(seconds=float(found[0])) if found else None

    def remove(self, connection: Connection, rows: Sequence[tuple[int, bytes]]) -> int:
        """See `outboxkit.dialects.Dialect.remove`. An id is one in any form of it that `read` takes for one."""
        id_as_read = func.lower(func.replace(_HOT.message_id, "-", "", type_=String()))
        pair = delete(tables.outbox_messages).where(_HOT.position == bindparam("at"), id_as_read == bindparam("id"))
        return connection.execute(pair, [{"at": position, "id": raw.hex()} for position, raw in rows]).rowcount

    def insert(self, table: Table) -> Insert:
        """See `outboxkit.dialects.Dialect.insert`."""
        return insert(table)


def _row(position: int, message_id: object, *values: Any) -> Row:
    """The row, whatever kinds of values it has; one whose id is none has no time either, so that it is not sent."""
    topic, key, kind_of_event, kind, payload, headers, recorded_us, expires_us = values
    raw_id = _id_of(str(message_id))
    if raw_id is None:
        raw_id, recorded_us = NO_ID, UNREADABLE
    texts = _text(topic), None if key is None else _bytes(key), _text(kind_of_event), _text(kind)
    return Row(position, raw_id, *texts, _bytes(payload), _bytes(headers), recorded_us, expires_us)


def _id_of(text: str) -> bytes | None:
    digits = text.replace("-", "").lower()  # as `remove` does
    try:
        found = UUID(digits)
    except ValueError:
        return None
    return found.bytes if found.hex == digits else None


def _text(value: object) -> str:
    return exact(value) if isinstance(value, str) else str(value)


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else _text(value).encode()


def _of(reading: Reading) -> Callable[[Part], ColumnElement[bool]]:
    def condition(part: Part) -> ColumnElement[bool]:
        topics = sorted(part.topics)
        mine = _HOT.topic.in_(topics) if part.only else _HOT.topic.not_in(topics)
        if part.seen is None:
            return mine
        seen = _HOT.position <= int(part.seen)
        return and_(mine, seen if reading.missed else not_(seen))

    return condition


def _take_an_existing_file(_dialect: object, _record: object, arguments: list[Any], options: dict[str, Any]) -> None:
    """Changes what the driver is called with: by itself it makes an empty file where there is none."""
    path = str(arguments[0])
    if path != ":memory:" and not path.startswith("file:"):
        arguments[0], options["uri"] = f"{Path(path).absolute().as_uri()}?mode=rw", True


def _prepare(connection: Any, _record: object) -> None:
    # The driver must not begin transactions by itself: it would begin them too late and as readers.
    connection.isolation_level = None
    connection.text_factory = _read_text
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _read_text(stored: bytes) -> str:
    """The text; one that is no UTF-8 does not end every read that meets it."""
    try:
        return stored.decode()
    except UnicodeDecodeError as fault:
        return NoText(fault)


def _begin(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once when another one wrote in between: take the
    # writer's place at the beginning, and wait for it there.
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def dialect() -> SQLite:
    """The plug."""
    return SQLite()


def hidden(_connection: Connection, _names: Sequence[str]) -> list[str]:
    """See `outboxkit.dialects.hidden`. A file has no logins."""
    return []


def takes_no_writes(_connection: Connection) -> str:
    """See `outboxkit.dialects.takes_no_writes`. A file that may not be written cannot be opened by a daemon at all."""
    return ""


def schema_of(_connection: Connection) -> str:
    """See `outboxkit.dialects.schema_of`."""
    return ""


def schemas(_connection: Connection) -> list[str]:
    """See `outboxkit.dialects.schemas`."""
    return []


def refusal(url: URL, error: DBAPIError) -> str:
    """See `outboxkit.dialects.refusal`."""
    name = "_".join(getattr(error.orig, "sqlite_errorname", "").split("_")[:2])  # without the extended part
    path = Path(url.database or "")
    if name == "SQLITE_CANTOPEN" and path.parent.is_dir() and not path.exists():
        return f"there is no database file {path}: correct the URL, or let `outboxkit init` make it"
    return f"the database file {url.database} {_UNUSABLE[name]}" if name in _UNUSABLE else ""


@contextmanager
def lock_patience(_connection: Connection, _time: timedelta) -> Iterator[None]:
    """See `outboxkit.dialects.lock_patience`. There is one lock, the writer's: the driver's ``timeout`` bounds it."""
    yield
