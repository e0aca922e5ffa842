"""PostgreSQL 13 and newer, through psycopg 3."""

from __future__ import annotations

import functools
import operator
import secrets
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.exc import DBAPIError, OperationalError

from outboxkit._sql import MICROSECONDS_POSTGRESQL, array_literal
from outboxkit.dialects import Features, is_unreadable
from outboxkit.errors import ConfigurationError, LeaseLost
from outboxkit.rows import BEFORE_ALL, LARGE, UNREADABLE, Page, Reading, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Table

__all__ = ["dialect", "hidden", "lock_patience", "refusal", "schema_of", "schemas", "takes_no_writes"]

_row: Final = functools.partial(tuple.__new__, Row)  # `Row._make` without its check, for each row of a page

_PING_SECONDS: Final = 3
# No plan is kept: our tables are empty at one moment and hold a million rows at the next, and the numbers of a snapshot
# decide which index serves. Through a pooler nothing is prepared, which does the same.
_NO_KEPT_PLANS: Final = {"plan_cache_mode": "force_custom_plan"}
# For the session that reads, see `_statement`.
_PLANS: Final = text(
    "SELECT set_config('enable_seqscan', 'off', false), set_config('enable_sort', 'off', false), "
    "set_config('max_parallel_workers_per_gather', '0', false), set_config('jit', 'off', false)"
)

_LOCK_TIMEOUT: Final = text("SELECT current_setting('lock_timeout')")
_SET_LOCK_TIMEOUT: Final = text("SELECT set_config('lock_timeout', :time, true)")

# --- reading by snapshot rounds: every fragment is constant, the values are bound ------------------------------------


class _Header(NamedTuple):
    """The first row of a page: facts of the statement, in columns that later rows use as `Row` names them."""

    position: int
    raw_id: None
    snapshot: str
    key: None
    session: str | None


# A header, then rows as `Row` has them; what the driver would make an object of (UUID, time) comes as bytes and number.
# Large payloads are left out, and only their size is told.
_PAGE: Final = f"""
SELECT {BEFORE_ALL} AS position, NULL::bytea, pg_current_snapshot()::text, NULL::bytea,
       current_setting('outboxkit.session', true), NULL, NULL::bytea, NULL::bytea, NULL::bigint, NULL::bigint,
       0, NULL, 0
UNION ALL
(SELECT {{columns}}
 FROM outbox_messages
 WHERE shard = ANY(%(shards)s::smallint[]) AND {{order}} > %(last)s AND ({{parts}}){{rest}}
 ORDER BY {{order}}
 LIMIT %(limit)s)
ORDER BY position
"""
_COLUMNS: Final = f"""
        position, uuid_send(message_id), topic, key, type, kind,
        CASE WHEN octet_length(payload) <= %(large)s THEN payload END, headers,
        {MICROSECONDS_POSTGRESQL.format("recorded_at")}, {MICROSECONDS_POSTGRESQL.format("expires_at")},
        0, NULL, CASE WHEN octet_length(payload) <= %(large)s THEN 0 ELSE octet_length(payload) END"""
_BLIND: Final = f"position, ''::bytea, '', NULL, '', '', ''::bytea, ''::bytea, {UNREADABLE}, NULL, 0, NULL, 0"
_SIZE: Final = operator.attrgetter("size")
_PAYLOADS: Final = "SELECT position, payload FROM outbox_messages WHERE position = ANY(%(positions)s)"
_ALL_BUT: Final = "topic <> ALL(%({part}_topics)s::text[])"
_ONLY: Final = "topic = ANY(%({part}_topics)s::text[])"
# What a snapshot did not see. Not pg_visible_in_snapshot: only this form uses the index, and its complement also finds
# rows with the transaction id of another cluster.
_UNSEEN: Final = "(xid >= %({part}_xmax)s::xid8 OR xid = ANY(%({part}_xip)s::xid8[]))"


@functools.cache
def _statement(shape: tuple[tuple[bool, bool], ...], *, paging: bool, missed: bool, blind: bool) -> str:
    """The SQL for parts of a shape: (only these topics, has a memory) each.

    The table swings between empty and huge, so its statistics are wrong when it matters: the statement leaves the
    planner no choice of the index. A round begins by the index on xid, to which an order that is no column's is no
    temptation. Everything else goes by the primary key: no index can serve a condition IS [NOT] TRUE.
    """
    begins = not paging and not missed and all(remembers for _, remembers in shape)
    parts = []
    for number, (only, remembers) in enumerate(shape):
        conditions = [_ONLY if only else _ALL_BUT]
        if remembers:
            conditions.append(_UNSEEN + ("" if begins else " IS NOT TRUE" if missed else " IS TRUE"))
        parts.append("(" + " AND ".join(conditions).replace("{part}", f"p{number}") + ")")
    rest = f" AND {_UNSEEN} IS NOT TRUE".replace("{part}", "round") if paging else ""
    page = _PAGE.replace("{columns}", _BLIND if blind else _COLUMNS)
    page = page.replace("{order}", "position + 0" if begins else "position").replace("{rest}", rest)
    return page.replace("{parts}", " OR ".join(parts))


def _values(reading: Reading) -> dict[str, Any]:
    values: dict[str, Any] = {"shards": list(reading.shards), "last": reading.last, "limit": reading.limit}
    values["large"] = LARGE
    for number, part in enumerate(reading.parts):
        values[f"p{number}_topics"] = list(part.topics)
        values |= _snapshot(f"p{number}", part.seen)
    return values | _snapshot("round", reading.round)


def _snapshot(name: str, text: str | None) -> dict[str, Any]:
    """A snapshot ``xmin:xmax:xip,…`` as bound values."""
    if text is None:
        return {}
    _, xmax, running = text.split(":")
    return {f"{name}_xmax": xmax, f"{name}_xip": [xid for xid in running.split(",") if xid]}


# The transactional message makes this transaction write WAL, so that its synchronous commit flushes all WAL before it.
_CONFIRM_LEASE: Final = """
SELECT date_part('epoch', expires_at - clock_timestamp()), set_config('synchronous_commit', 'on', true),
       pg_logical_emit_message(true, 'outboxkit', '')
FROM outbox_relays
WHERE id = %s AND expires_at > clock_timestamp()
"""

# The two conditions on the position are one to us; the first one tells the planner that the primary key serves. It is a
# sub-select because for a literal the planner would look up how frequent each of its positions is. IS TRUE keeps the
# second one from becoming a join: with statistics from a moment when all was published the planner takes the table to
# be empty, and would compare each row with each.
_REMOVE: Final = """
WITH acknowledged AS MATERIALIZED (
    SELECT * FROM unnest(%(positions)s::bigint[], %(ids)s::uuid[]) AS pair (position, message_id)
)
DELETE FROM outbox_messages
WHERE position = ANY(ARRAY(SELECT position FROM acknowledged))
  AND ((position, message_id) IN (SELECT position, message_id FROM acknowledged)) IS TRUE
"""


_ROW_SECURITY: Final = text(
    "SELECT name FROM unnest(CAST(:names AS text[])) AS read (name) WHERE row_security_active(name)"
)
_READ_ONLY: Final = text(
    "SELECT CASE WHEN pg_is_in_recovery() THEN 'a standby' "
    "WHEN current_setting('default_transaction_read_only')::bool THEN 'read-only' ELSE '' END"
)
_SCHEMA: Final = text(
    "SELECT coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.oid = to_regclass(:table)), current_schema())"
)
_SCHEMAS: Final = text(
    "SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.relname = :table AND c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_(temp|toast)' ORDER BY 1"
)
_SET_LOCALLY: Final = """
SELECT set_config(name, value, true) FROM unnest(%(names)s::text[], %(values)s::text[]) AS wanted (name, value)
"""


class PostgreSQL:
    """The production database."""

    features = Features(name="postgresql", concurrent_writers=True, notifies=True, arrays=True)

    def engine(self, url: URL, patience: timedelta, *, pooled: bool, schema: str, creates: bool) -> Engine:
        """See `outboxkit.dialects.Dialect.engine`.

        A pooler refuses start-up options, and its sessions are anybody's: there each transaction sets what it needs,
        and nothing is prepared.
        """
        del creates
        if pooled and schema:
            raise ConfigurationError(
                f"database_schema = {schema!r} cannot be set through a pooler, whose sessions are anybody's: "
                "let the login have it, ALTER ROLE … SET search_path = …, and remove the setting"
            )
        settings = _session_settings(int(patience.total_seconds() * 1000))
        path = {"search_path": '"' + schema.replace('"', '""') + '"'} if schema else {}
        own: dict[str, Any] = {"options": _options(url, settings | _NO_KEPT_PLANS | path)}
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            pool_pre_ping=False,  # a lost connection is an event to react to, not to hide
            pool_timeout=patience.total_seconds(),
            connect_args=_connection_settings(url, patience) | ({"prepare_threshold": None} if pooled else own),
        )
        if pooled:
            event.listen(engine, "begin", functools.partial(_set_locally, settings))
        return engine

    def read(self, connection: Connection, reading: Reading) -> Page:
        """See `outboxkit.dialects.Dialect.read`. Reads outbox_messages; locks nothing.

        Index used: ``outbox_messages_xid`` for the first page of a round, the primary key for a scan and later pages.
        """
        shape = tuple((part.only, part.seen is not None) for part in reading.parts)
        sql = _statement(shape, paging=reading.round is not None, missed=reading.missed, blind=reading.blind)
        marker = _session(connection)
        # The driver's own cursor, in binary: what SQLAlchemy adds to each row costs more than the row.
        with _driver(connection) as driver, driver.cursor(binary=True) as cursor:
            first, *found = cursor.execute(sql, _values(reading)).fetchall()
            header = _Header._make(first[: len(_Header._fields)])
            if header.session != marker:
                raise LeaseLost(
                    "the read connection has reached another server session; it must not go through a pooler"
                )
            rows = list(map(_row, found))
            if any(map(_SIZE, rows)):
                return _with_large(cursor, rows, header.snapshot, reading)
            return Page(rows, header.snapshot)

    def confirm_lease(self, connection: Connection, relay: UUID) -> timedelta | None:
        """See `outboxkit.dialects.Dialect.confirm_lease`. Reads outbox_relays, writes one WAL record and no row."""
        severities: list[str] = []

        def note(diagnostic: Any) -> None:
            severities.append(diagnostic.severity_nonlocalized)  # at once: the driver forgets what it was about

        with _driver(connection) as driver:
            driver.add_notice_handler(note)
            try:
                found = driver.execute(_CONFIRM_LEASE, (relay,)).fetchone()
                driver.commit()
            finally:
                driver.remove_notice_handler(note)
        # A cancelled wait for a synchronous standby *succeeds* with a warning: then nothing is durable there.
        if found is None or "WARNING" in severities:
            return None
        return timedelta(seconds=found[0])

    def remove(self, connection: Connection, rows: Sequence[tuple[int, bytes]]) -> int:
        """See `outboxkit.dialects.Dialect.remove`. Writes outbox_messages by its primary key."""
        # Array literals: the driver would adapt each element by itself.
        positions, ids = map(array_literal, zip(*rows, strict=True))
        return connection.exec_driver_sql(_REMOVE, {"positions": positions, "ids": ids}).rowcount

    def insert(self, table: Table) -> Insert:
        """See `outboxkit.dialects.Dialect.insert`."""
        return insert(table)


def _with_large(cursor: Any, rows: list[Row], snapshot: str, reading: Reading) -> Page:
    """The page with its large payloads, up to the first that does not fit; what is gone by now is published."""
    large: dict[int, int] = {}
    end = len(rows)
    for at, row in enumerate(rows):
        if size := row.size:
            if large and sum(large.values()) + size > reading.max_bytes:
                end = at
                break
            large[row.position] = size
    payloads = dict(cursor.execute(_PAYLOADS, {"positions": list(large)}).fetchall())
    whole = [
        row._replace(payload=payloads[row.position]) if row.position in large else row
        for row in rows[:end]
        if row.position not in large or row.position in payloads
    ]
    # A full page that lost a row is no short one: the round goes on.
    return Page(whole, snapshot, large, cut=len(rows) == reading.limit or end < len(rows))


def _options(url: URL, wanted: Mapping[str, str]) -> str:
    """The start-up options of the URL and ours behind them, which win: leases rest on our time-outs.

    Raises:
        ConfigurationError: the URL gives a search path, and so does the setting.
    """
    given = url.query.get("options", "")
    options = " ".join(given) if isinstance(given, tuple) else given
    if "search_path" in wanted and "search_path" in options:
        raise ConfigurationError(
            "the database URL has options with a search_path, and database_schema is set: give one"
        )
    escaped = {name: value.replace("\\", "\\\\").replace(" ", "\\ ") for name, value in wanted.items()}
    return " ".join([*filter(None, [options]), *(f"-c {name}={value}" for name, value in escaped.items())])


def _connection_settings(url: URL, patience: timedelta) -> dict[str, Any]:
    """The settings of the client library; those of the URL win."""
    seconds = max(2, int(patience.total_seconds()))  # libpq takes whole seconds, below 2 means 2
    ours = {
        "application_name": "outboxkit",
        "connect_timeout": seconds,
        "client_encoding": "utf8",  # else a server of SQL_ASCII makes bytes of every text
        # A half-open connection is noticed within about the patience, not after minutes.
        "keepalives": 1,
        "keepalives_idle": seconds,
        "keepalives_interval": 1,
        "keepalives_count": 3,
        "tcp_user_timeout": max(1000, int(patience.total_seconds() * 2000)),
    }
    return {name: value for name, value in ours.items() if name not in url.query}


def _session_settings(milliseconds: int) -> dict[str, str]:
    """Agreement with the server."""
    return {
        "statement_timeout": str(milliseconds),
        "lock_timeout": str(milliseconds),
        "idle_in_transaction_session_timeout": str(milliseconds * 4),
        "timezone": "UTC",
    }


def _set_locally(settings: Mapping[str, str], connection: Connection) -> None:
    """For one transaction, in one statement."""
    connection.exec_driver_sql(_SET_LOCALLY, {"names": list(settings), "values": list(settings.values())})


@contextmanager
def _driver(connection: Connection) -> Iterator[Any]:
    """The driver's connection, for statements that many messages pass through; its errors are SQLAlchemy's outside."""
    driver: Any = connection.connection.driver_connection
    try:
        yield driver
    except (driver.OperationalError, driver.InterfaceError, driver.InternalError, driver.DataError) as error:
        if not is_unreadable(error):
            connection.invalidate(error)
        raise OperationalError("a statement of the relay", None, error) from error


def _session(connection: Connection) -> str:
    """The marker of this server session; set when the connection reads for the first time."""
    if "outboxkit_session" not in connection.info:
        marker = secrets.token_hex(8)
        connection.execute(_PLANS)
        connection.execute(text("SELECT set_config('outboxkit.session', :marker, false)"), {"marker": marker})
        connection.info["outboxkit_session"] = marker
    return str(connection.info["outboxkit_session"])


def dialect() -> PostgreSQL:
    """The plug."""
    return PostgreSQL()


def hidden(connection: Connection, names: Sequence[str]) -> list[str]:
    """See `outboxkit.dialects.hidden`: row-level security is active for this role."""
    return list(connection.scalars(_ROW_SECURITY, {"names": list(names)}))


def takes_no_writes(connection: Connection) -> str:
    """See `outboxkit.dialects.takes_no_writes`."""
    return str(connection.scalar(_READ_ONLY))


def schema_of(connection: Connection) -> str:
    """See `outboxkit.dialects.schema_of`."""
    return connection.scalar(_SCHEMA, {"table": "outbox_version"}) or ""


def schemas(connection: Connection) -> list[str]:
    """See `outboxkit.dialects.schemas`."""
    return list(connection.scalars(_SCHEMAS, {"table": "outbox_version"}))


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
    said = str(error.orig).strip().splitlines()[0].rpartition("failed: ")[2]
    pooler = "startup parameter" in said  # only a pooler has an opinion on those
    hint = "this is a pooler: set database_direct_url, too" if pooler else "check user, password and database name"
    return f"the database refused the login to {url.render_as_string(hide_password=True)}: {said}; {hint}"


@contextmanager
def lock_patience(connection: Connection, time: timedelta) -> Iterator[None]:
    """See `outboxkit.dialects.lock_patience`. The setting ends with the block, or with a transaction that failed."""
    before = connection.scalar(_LOCK_TIMEOUT)
    connection.execute(_SET_LOCK_TIMEOUT, {"time": f"{max(1, int(time.total_seconds() * 1000))}ms"})
    yield
    connection.execute(_SET_LOCK_TIMEOUT, {"time": before})
