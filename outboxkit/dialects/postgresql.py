"""PostgreSQL 13 and newer, through psycopg 3."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, URL, BigInteger, Engine, Uuid, bindparam, create_engine, text
from sqlalchemy.dialects.postgresql import Insert, insert

from outboxkit.dialects import Features, Reading
from outboxkit.message import Row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Table
    from sqlalchemy.exc import DBAPIError

__all__ = ["dialect", "refusal"]

_PING_SECONDS: Final = 3

_READ: Final = text(
    """
    SELECT position, message_id, topic, key, type, kind, payload, headers, recorded_at, expires_at
    FROM outbox_messages
    WHERE shard = ANY(:shards) AND topic <> ALL(:without)
    ORDER BY position
    LIMIT :limit
    """,
)

# The transactional message makes this transaction write WAL, so that its synchronous commit flushes all WAL before it.
_CLAIM: Final = text(
    """
    SELECT extract(epoch FROM expires_at - clock_timestamp()), pg_logical_emit_message(true, 'outboxkit', '')
    FROM outbox_relays
    WHERE id = :relay AND expires_at > clock_timestamp()
    """,
)

_REMOVE: Final = text(
    """
    DELETE FROM outbox_messages AS row
    USING unnest(:positions, :ids) AS acknowledged (position, message_id)
    WHERE row.position = acknowledged.position AND row.message_id = acknowledged.message_id
    """,
).bindparams(bindparam("positions", type_=ARRAY(BigInteger)), bindparam("ids", type_=ARRAY(Uuid)))


class PostgreSQL:
    """The production database."""

    features = Features(name="postgresql", concurrent_writers=True, notifies=True)

    def engine(self, url: URL, patience: timedelta) -> Engine:
        """See `outboxkit.dialects.Dialect.engine`."""
        milliseconds = int(patience.total_seconds() * 1000)
        seconds = max(2, int(patience.total_seconds()))  # libpq takes whole seconds, below 2 means 2
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            pool_pre_ping=False,  # a lost connection is an event to react to, not to hide
            pool_timeout=patience.total_seconds(),
            connect_args={
                "application_name": "outboxkit",
                "connect_timeout": seconds,
                # A half-open connection is noticed within about the patience, not after minutes.
                "keepalives": 1,
                "keepalives_idle": seconds,
                "keepalives_interval": 1,
                "keepalives_count": 3,
                "tcp_user_timeout": max(1000, milliseconds * 2),
                "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} "
                f"-c idle_in_transaction_session_timeout={milliseconds * 4} -c timezone=UTC",
            },
        )

    def read(self, connection: Connection, reading: Reading) -> list[Row]:
        """See `outboxkit.dialects.Dialect.read`. Reads outbox_messages by its primary key; locks nothing."""
        found = connection.execute(
            _READ,
            {"shards": sorted(reading.shards), "without": sorted(reading.without), "limit": reading.limit},
        )
        return [Row._make((*row, 0, None)) for row in found]

    def claim(self, connection: Connection, relay: UUID) -> timedelta | None:
        """See `outboxkit.dialects.Dialect.claim`. Reads outbox_relays, writes one WAL record and no row."""
        warnings: list[Any] = []
        driver: Any = connection.connection.driver_connection
        driver.add_notice_handler(warnings.append)
        try:
            connection.execute(text("SET LOCAL synchronous_commit = on"))
            found = connection.execute(_CLAIM, {"relay": relay}).one_or_none()
            connection.commit()
        finally:
            driver.remove_notice_handler(warnings.append)
        # A cancelled wait for a synchronous standby *succeeds* with a warning: then nothing is durable there.
        if found is None or any(notice.severity_nonlocalized == "WARNING" for notice in warnings):
            return None
        return timedelta(seconds=float(found[0]))

    def remove(self, connection: Connection, rows: Sequence[tuple[int, UUID]]) -> int:
        """See `outboxkit.dialects.Dialect.remove`. Writes outbox_messages by its primary key."""
        positions, ids = [row[0] for row in rows], [row[1] for row in rows]
        return connection.execute(_REMOVE, {"positions": positions, "ids": ids}).rowcount

    def insert(self, table: Table) -> Insert:
        """See `outboxkit.dialects.Dialect.insert`."""
        return insert(table)


def dialect() -> PostgreSQL:
    """The plug."""
    return PostgreSQL()


def refusal(url: URL, error: DBAPIError) -> str:
    """See `outboxkit.dialects.refusal`.

    A failed connection has no SQLSTATE. What tells a refusal from an outage is whether the server takes connections at
    all: libpq's ping asks that without a login.
    """
    # Here, not above: without the extra this module must still be importable, to say what is missing.
    import psycopg  # noqa: PLC0415

    if (
        not isinstance(error.orig, psycopg.OperationalError)
        or error.orig.sqlstate is not None
        or error.orig.pgconn is None
    ):
        return ""
    query = {**url.query, "connect_timeout": str(_PING_SECONDS)}
    address = url.set(drivername="postgresql", query=query).render_as_string(hide_password=False)
    if psycopg.pq.PGconn.ping(address.encode()) != psycopg.pq.Ping.OK:
        return ""
    where = url.render_as_string(hide_password=True)
    said = str(error.orig).strip().splitlines()[0].rpartition("failed: ")[2]
    return f"the database refused the login to {where}: {said}; check user, password and database name"
