"""Checks for PostgreSQL alone: durability, isolation, rights, poolers, vacuum and what keeps it from working."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from outboxkit import dialects, tables
from outboxkit.findings import Finding, problem, warning
from outboxkit.migrations import roles

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.diagnose.patient import Patient

__all__ = ["CHECKS"]

_OURS: Final = sorted(tables.METADATA.tables)
_OLDEST: Final = 130_000  # the version, as the server numbers itself
_FULL: Final = 0.9  # of the connections that the server takes
_BEHIND_VACUUM: Final = 1_000_000  # transactions
_HOT_OPTIONS: Final = (
    "ALTER TABLE outbox_messages SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)"
)


# --- the server --------------------------------------------------------------------------------------------------

_SERVER: Final = text(
    """
    SELECT current_setting('server_version_num')::int AS version, current_setting('server_version') AS shown,
           pg_is_in_recovery() AS standby, pg_encoding_to_char(d.encoding) AS encoding,
           current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
           current_setting('autovacuum') AS autovacuum, current_setting('track_counts') AS track_counts,
           current_setting('default_transaction_isolation') AS isolation, current_user AS login
    FROM pg_database d WHERE d.datname = current_database()
    """
)


def check_server(patient: Patient) -> Iterator[Finding]:
    """Kind of server: one that can be written, in transactions as relays and inboxes need them."""
    server = patient.connection.execute(_SERVER).one()
    if server.version < _OLDEST:
        yield problem("server-version", f"PostgreSQL {server.shown} is too old", "move to PostgreSQL 13 or newer")
    if server.standby:
        yield problem("standby", "this is a standby: nothing can be written here", "give database_url of the primary")
    if server.encoding != "UTF8":
        seen = f"the database is encoded in {server.encoding}: texts of messages may not fit"
        yield problem("encoding", seen, "make a database with ENCODING 'UTF8' and move the tables")
    if server.isolation != "read committed":
        seen = f"{server.login} begins transactions as {server.isolation}: relays and inboxes count on read committed"
        fix = f"ALTER ROLE \"{server.login}\" SET default_transaction_isolation = 'read committed'"
        yield problem("isolation", seen, fix)


def check_durability(patient: Patient) -> Iterator[Finding]:
    """Whether the server keeps what it has confirmed, and removes what is published."""
    server = patient.connection.execute(_SERVER).one()
    for name in ("fsync", "full_page_writes"):
        if getattr(server, name) == "off":
            seen = f"{name} is off: a crash may lose or damage what was committed"
            yield problem("durability", seen, f"ALTER SYSTEM SET {name} = on; then SELECT pg_reload_conf()")
    for name in ("autovacuum", "track_counts"):
        if getattr(server, name) == "off":
            seen = f"{name} is off: published rows stay, and reading slows down"
            yield problem("autovacuum", seen, f"ALTER SYSTEM SET {name} = on; then SELECT pg_reload_conf()")


_LOGINS: Final = text(
    """
    SELECT coalesce(r.rolname, '(all)') AS login, split_part(one, '=', 1) AS name, split_part(one, '=', 2) AS value
    FROM pg_db_role_setting s
    LEFT JOIN pg_roles r ON r.oid = s.setrole
    LEFT JOIN pg_database d ON d.oid = s.setdatabase
    CROSS JOIN LATERAL unnest(s.setconfig) AS one
    WHERE (d.datname IS NULL OR d.datname = current_database()) AND one = 'synchronous_commit=off'
    ORDER BY 1
    """
)


def check_logins(patient: Patient) -> Iterator[Finding]:
    """Whether a commit of some login may be lost by a crash, together with its events."""
    for row in patient.connection.execute(_LOGINS):
        seen = f"{row.login} commits with {row.name} = {row.value}: a crash of the server loses its latest transactions"
        yield warning("commit-durability", seen, f'ALTER ROLE "{row.login}" RESET synchronous_commit')


def check_clock(patient: Patient) -> Iterator[Finding]:
    """Whether the clocks of this machine and of the database agree; leases use the database's only."""
    before = patient.clock()
    theirs = patient.connection.scalar(text("SELECT clock_timestamp()"))
    ours = before + (patient.clock() - before) / 2
    skew = theirs - ours
    if abs(skew) > patient.thresholds.skew:
        way = "behind" if skew.total_seconds() > 0 else "ahead of"
        seen = f"this machine's clock is {abs(skew.total_seconds()):.1f} s {way} the database's"
        yield warning("clock-skew", f"{seen}: ages and due times of messages are wrong by it", "let both follow NTP")


_CONNECTIONS: Final = text(
    "SELECT count(*) AS taken, current_setting('max_connections')::int - "
    "current_setting('superuser_reserved_connections')::int AS room FROM pg_stat_activity "
    "WHERE backend_type = 'client backend'"
)


def check_connections(patient: Patient) -> Iterator[Finding]:
    """Whether a relay still finds room."""
    row = patient.connection.execute(_CONNECTIONS).one()
    if row.taken >= row.room * _FULL:
        seen = f"{row.taken} of {row.room} connections are taken: a relay that starts may find no room"
        yield warning("connections", seen, "raise max_connections, or let applications take a pooler")


# --- the way to it -----------------------------------------------------------------------------------------------


def check_pooler(patient: Patient) -> Iterator[Finding]:
    """Whether the relay reads on a session of its own: a pooler hands out other keys than the server's."""
    if _is_pooled(patient.direct):
        name = "database_direct_url" if patient.settings.pooled else "database_url"
        seen = f"{name} leads to a pooler: a relay's memory belongs to one server session"
        yield problem("pooler", seen, "set database_direct_url to the database's own address")
        if patient.settings.relay.wake == "notify":
            seen = "relay.wake is notify, and LISTEN does not work through a pooler in transaction mode"
            yield problem("listen", seen, 'set database_direct_url, or relay.wake = "poll"')


def _is_pooled(connection: Connection) -> bool:
    driver = connection.connection.driver_connection
    told = getattr(getattr(driver, "info", None), "backend_pid", None)
    return told is not None and told != connection.scalar(text("SELECT pg_backend_pid()"))


def check_schemas(patient: Patient) -> Iterator[Finding]:
    """Whether the tables are there once: two sets are two outboxes."""
    where = dialects.schema_of(patient.connection)
    others = [one for one in dialects.schemas(patient.connection) if one != where]
    if others:
        seen = f"there are outbox tables in {', '.join(others)}, too; this login finds those in {where}"
        yield warning("schemas", seen, "set database_schema for every login alike, and drop what nobody uses")


# --- rights ------------------------------------------------------------------------------------------------------

_LACKING: Final = text(
    """
    SELECT wanted.relation, wanted.privilege
    FROM unnest(CAST(:relations AS text[]), CAST(:privileges AS text[])) AS wanted (relation, privilege)
    WHERE to_regclass(wanted.relation) IS NOT NULL
      AND NOT has_table_privilege(wanted.relation, wanted.privilege)
      AND NOT (wanted.privilege <> 'DELETE' AND has_any_column_privilege(wanted.relation, wanted.privilege))
    ORDER BY 1, 2
    """
)


def check_grants(patient: Patient) -> Iterator[Finding]:
    """Whether the login may do what its part does, and nobody else may more than was given."""
    wanted = [
        (table, privilege)
        for table, privileges in roles.GRANTS[patient.role].items()
        for privilege in privileges.split(", ")
    ]
    wanted += [place for place in roles.COLUMNS.get(patient.role, {}) if place not in wanted]
    relations, privileges = map(list, zip(*wanted, strict=True))
    for row in patient.connection.execute(_LACKING, {"relations": relations, "privileges": privileges}):
        seen = f"this login may not {row.privilege} on {row.relation}, which a {patient.role} does"
        yield problem("grants", seen, f"GRANT {roles.PREFIX}{patient.role} TO it, or run `outboxkit db roles` first")
    for sentence in roles.foreign_grants(patient.connection):
        seen, _, fix = sentence.partition(": ")
        yield warning("foreign-grants", seen, fix)


_MAY_ASK: Final = text(
    "SELECT has_function_privilege(oid, 'EXECUTE') FROM pg_proc "
    "WHERE proname = 'outboxkit_is_replay' AND pg_function_is_visible(oid)"
)


def check_row_security(patient: Patient) -> Iterator[Finding]:
    """Whether the login sees all messages, and is told of replays that it does not see."""
    has_hidden_letters = dialects.hidden(patient.connection, [tables.dead_letters.name])
    if patient.role == "consumer" and has_hidden_letters and not patient.connection.scalar(_MAY_ASK):
        seen = (
            "dead letters of others are hidden from this login, which may not call outboxkit_is_replay: it cannot tell"
        )
        yield problem("replay-hidden", f"{seen} whom a replay is for, and handles none", "outboxkit db roles")
    for name in dialects.hidden(patient.connection):
        seen = f"row-level security hides rows of {name} from this login: what it does not see is not published"
        yield problem("row-security", seen, f"ALTER TABLE {name} DISABLE ROW LEVEL SECURITY, or GRANT it BYPASSRLS")


# --- the tables --------------------------------------------------------------------------------------------------

_STORAGE: Final = text(
    """
    SELECT c.relname AS name, c.relpersistence AS persistence, coalesce(c.reloptions, '{}') AS options
    FROM pg_class c
    WHERE c.relname = ANY(:tables) AND c.relkind IN ('r', 'p') AND pg_table_is_visible(c.oid) ORDER BY 1
    """
)


def check_storage(patient: Patient) -> Iterator[Finding]:
    """Whether our tables survive a crash, and are vacuumed."""
    for row in patient.connection.execute(_STORAGE, {"tables": _OURS}):
        if row.persistence != "p":
            seen = f"{row.name} is not logged: a crash of the server empties it"
            yield problem("unlogged-table", seen, f"ALTER TABLE {row.name} SET LOGGED")
        if {"autovacuum_enabled=false", "autovacuum_enabled=off"} & set(row.options):
            seen = f"autovacuum is off for {row.name}: dead rows stay, and reading slows down"
            yield problem("autovacuum", seen, f"ALTER TABLE {row.name} RESET (autovacuum_enabled)")
        elif row.name == "outbox_messages" and "autovacuum_vacuum_scale_factor=0" not in row.options:
            seen = "outbox_messages is vacuumed by its size: after a backlog its dead rows stay for long"
            yield warning("autovacuum-scale", seen, _HOT_OPTIONS)


_DEAD_ROWS: Final = text(
    "SELECT relname AS name, n_dead_tup AS dead, n_live_tup AS live, last_autovacuum AS vacuumed "
    "FROM pg_stat_user_tables WHERE relname = ANY(:tables) AND pg_table_is_visible(relid) AND n_dead_tup > :dead"
)


def check_dead_rows(patient: Patient) -> Iterator[Finding]:
    """Whether vacuum keeps up."""
    limits = {"tables": _OURS, "dead": patient.thresholds.dead_rows}
    for row in patient.connection.execute(_DEAD_ROWS, limits):
        if row.dead > row.live:
            at = f"{row.vacuumed:%Y-%m-%d %H:%M} UTC" if row.vacuumed else "never"
            seen = f"{row.name} holds {row.dead:,} dead rows beside {row.live:,} live ones; autovacuum came {at}"
            yield warning("dead-rows", seen, f"VACUUM {row.name}; look for what holds it back among the other findings")


_SEQUENCE: Final = text(
    """
    SELECT s.sequencename AS name, s.cache_size AS cache, s.last_value AS reached,
           (SELECT coalesce(max(position), 0) FROM outbox_messages) AS highest
    FROM pg_sequences s
    WHERE to_regclass(quote_ident(s.schemaname) || '.' || quote_ident(s.sequencename))
          = pg_get_serial_sequence('outbox_messages', 'position')::regclass
    """
)


def check_sequence(patient: Patient) -> Iterator[Finding]:
    """Whether positions follow the order of the inserts."""
    for row in patient.connection.execute(_SEQUENCE):
        if row.cache != 1:
            seen = f"the sequence {row.name} has CACHE {row.cache}: two sessions reverse the order of a key"
            yield problem("sequence-cache", seen, f"ALTER SEQUENCE {row.name} CACHE 1")
        if row.reached is not None and row.highest > row.reached:  # null: it may not be seen
            seen = f"{row.name} is at {row.reached:,}, and outbox_messages has {row.highest:,}: a restore went wrong"
            yield problem("sequence-behind", seen, f"SELECT setval('{row.name}', {row.highest})")


_TRIGGERS: Final = text(
    """
    SELECT c.relname AS relation, t.tgname AS name, t.tgenabled <> 'D' AS enabled
    FROM pg_class c LEFT JOIN pg_trigger t ON c.oid = t.tgrelid AND NOT t.tgisinternal
    WHERE pg_table_is_visible(c.oid) AND c.relkind IN ('r', 'p') AND c.relname = ANY(:tables) ORDER BY 1, 2
    """
)
#: table -> its trigger of ours, and what its absence means.
_OWN_TRIGGERS: Final = {
    "outbox_audit": ("outboxkit_audit", "operators can write any name and time there"),
    "dead_letters": ("outboxkit_closed", "who closes a letter says when, and may have it deleted"),
    "outbox_sagas": ("outboxkit_updated", "who ends a saga says when, and may have it deleted"),
}


def check_triggers(patient: Patient) -> Iterator[Finding]:
    """Whether others have a hand in what is inserted, and ours write down logins and times."""
    asked = {"tables": ["outbox_messages", *_OWN_TRIGGERS]}
    found: dict[str, dict[str, bool]] = {}
    for relation, name, enabled in patient.connection.execute(_TRIGGERS, asked):
        found.setdefault(relation, {})[name] = enabled
    for name in filter(None, found.pop("outbox_messages", {})):
        seen = f"the trigger {name} on outbox_messages may change or swallow messages, and slows each one down"
        yield warning("foreign-trigger", seen, f"DROP TRIGGER {name} ON outbox_messages")
    for relation, triggers in found.items():
        name, means = _OWN_TRIGGERS[relation]
        if triggers.get(name):
            continue
        seen = f"the trigger of {relation} is missing or disabled: {means}"
        fix = f"outboxkit db upgrade, or ALTER TABLE {relation} ENABLE TRIGGER {name}"
        if relation == "outbox_audit":
            yield warning("audit-trigger", seen, fix)
        else:
            yield warning("time-trigger", seen, fix)


# --- what keeps vacuum from working ------------------------------------------------------------------------------

_TRANSACTIONS: Final = text(
    """
    SELECT pid, coalesce(usename, '?') AS login, coalesce(nullif(application_name, ''), '?') AS program,
           coalesce(state, '?') AS state, extract(epoch FROM clock_timestamp() - xact_start) AS age
    FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL)
      AND backend_type = 'client backend' AND xact_start < clock_timestamp() - make_interval(secs => :seconds)
    ORDER BY xact_start LIMIT 5
    """
)
_PREPARED: Final = text(
    "SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared) AS age FROM pg_prepared_xacts "
    "WHERE prepared < clock_timestamp() - make_interval(secs => :seconds) ORDER BY prepared LIMIT 5"
)
_SLOTS: Final = text(
    """
    SELECT slot_name AS name, slot_type AS kind,
           CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) END AS bytes
    FROM pg_replication_slots WHERE NOT active AND restart_lsn IS NOT NULL ORDER BY 1 LIMIT 5
    """
)
_STANDBYS: Final = text(
    "SELECT coalesce(application_name, '?') AS name, age(backend_xmin) AS behind FROM pg_stat_replication "
    "WHERE backend_xmin IS NOT NULL AND age(backend_xmin) > :behind ORDER BY 2 DESC LIMIT 5"
)


def check_transactions(patient: Patient) -> Iterator[Finding]:
    """Whether a transaction that stays open keeps published rows from being removed."""
    seconds = {"seconds": patient.thresholds.transaction.total_seconds()}
    for row in patient.connection.execute(_TRANSACTIONS, seconds):
        seen = f"{row.login} ({row.program}, {row.state}) has a transaction open for {_minutes(row.age)}"
        fix = f"end it: SELECT pg_terminate_backend({row.pid}); set idle_in_transaction_session_timeout for {row.login}"
        yield warning("long-transaction", f"{seen}: vacuum removes nothing that is newer", fix)
    for row in patient.connection.execute(_PREPARED, seconds):
        seen = f"the prepared transaction {row.gid} of {row.owner} waits for {_minutes(row.age)}"
        fix = f"COMMIT PREPARED '{row.gid}' or ROLLBACK PREPARED '{row.gid}', as its coordinator says"
        yield warning("prepared-transaction", f"{seen}: its messages are invisible, and vacuum stands still", fix)


def check_replication(patient: Patient) -> Iterator[Finding]:
    """Whether a slot or a standby keeps published rows, or the log, from being removed."""
    for row in patient.connection.execute(_SLOTS):
        size = f" and holds {row.bytes / 2**20:,.0f} MB of the log" if row.bytes is not None else ""
        seen = f"nobody reads the {row.kind} replication slot {row.name}{size}: the disk fills up"
        yield warning("replication-slot", seen, f"start who reads it, or SELECT pg_drop_replication_slot('{row.name}')")
    for row in patient.connection.execute(_STANDBYS, {"behind": _BEHIND_VACUUM}):
        seen = f"the standby {row.name} holds back vacuum by {row.behind:,} transactions"
        yield warning("standby-feedback", seen, "end its long queries, or set hot_standby_feedback = off there")


def _minutes(seconds: float) -> str:
    return f"{float(seconds) / 60:,.0f} min"


CHECKS: Final = (
    check_server,
    check_durability,
    check_logins,
    check_clock,
    check_connections,
    check_pooler,
    check_schemas,
    check_grants,
    check_row_security,
    check_storage,
    check_dead_rows,
    check_sequence,
    check_triggers,
    check_transactions,
    check_replication,
)
