"""Checks of our own tables, on every database: shape, relays, consumers, retention, schemas, what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, inspect, literal, select

from outboxkit import dead_letters, migrations, schema_store, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters import Filter, State, progress
from outboxkit.dialects import dialect_of
from outboxkit.findings import Finding, note, problem, warning
from outboxkit.outbox import pauses
from outboxkit_relay.observe.sentences import from_text, sentence
from outboxkit_relay.store import retention

if TYPE_CHECKING:
    from outboxkit_relay.diagnose.patient import Patient

__all__ = ["CHECKS", "check_tables"]

_HOT: Final = tables.outbox_messages.c
_RELAYS: Final = tables.outbox_relays.c
_LETTERS: Final = tables.dead_letters.c
_SCHEMAS: Final = tables.outbox_schemas.c
_ROOM: Final = tables.inbox_waiting.c
_STARTS: Final = tables.inbox_consumers.c
_ALEMBIC: Final = "alembic_version"


def check_tables(patient: Patient) -> Iterator[Finding]:
    """Whether the tables are those that this outboxkit needs."""
    for sentence_ in migrations.shape(patient.connection):
        seen, _, fix = sentence_.partition(": ")
        yield problem("tables", seen, fix or "outboxkit db upgrade")


def check_alembic(patient: Patient) -> Iterator[Finding]:
    """Whether a revision that Alembic writes would drop our tables."""
    if patient.metadata is None:
        return
    there = set(inspect(patient.connection).get_table_names())
    unknown = sorted((tables.METADATA.tables.keys() & there) - patient.metadata.tables.keys())
    if unknown:
        seen = f"the application's metadata lacks {', '.join(unknown[:3])}{' …' * (len(unknown) > 3)}"  # noqa: PLR2004
        uses = " (it is used here)" if _ALEMBIC in there else ""
        fix = "outboxkit.outbox_tables(Base.metadata) before Alembic's env.py takes it: docs/how-to/alembic.md"
        yield problem("alembic-drops", f"{seen}: alembic revision --autogenerate would drop them{uses}", fix)


# --- relays ------------------------------------------------------------------------------------------------------


def check_relays(patient: Patient) -> Iterator[Finding]:
    """Whether relays run, agree, and reach their destinations."""
    now = patient.connection.execute(select(database_now())).scalar_one()
    rows = patient.connection.execute(select(tables.outbox_relays).order_by(_RELAYS.started_at)).all()
    alive = [row for row in rows if row.ended is None and row.expires_at > now]
    if not alive:
        for row in [row for row in rows if row.ended is not None]:
            yield problem(
                "relay-ended", f"the relay on {row.host} does not publish: {row.ended}", "mend that, start it"
            )
        if patient.connection.execute(select(literal(1)).select_from(tables.outbox_messages).limit(1)).first():
            seen = "messages wait in the outbox, and no relay is alive"
            yield problem("relay-absent", seen, "start one: outboxkit relay run")
    for other in sorted({row.version for row in alive} - {version("outboxkit")}):
        seen = f"a relay of version {other or 'unknown'} runs, this is {version('outboxkit')}"
        yield note("relay-versions", seen, "finish the roll-out: both versions may run together meanwhile")
    for row in alive:
        for one in from_text(row.state):
            seen, _, fix = sentence(one, now).rpartition("; ")
            yield problem("destination-unavailable", seen, fix)


def check_wake(patient: Patient) -> Iterator[Finding]:
    """Whether the database can wake a relay, where that is asked."""
    features = dialect_of(patient.connection).features
    if patient.settings.relay.wake == "notify" and not features.notifies:
        seen = f"relay.wake is notify, and {features.name} cannot notify"
        yield problem("wake", seen, 'set relay.wake = "poll"')


def check_failpoints(patient: Patient) -> Iterator[Finding]:
    """Whether processes are told to crash."""
    if patient.settings.failpoints:
        yield problem("failpoints", "OUTBOXKIT_FAILPOINTS is set: processes end on purpose", "unset it")


# --- people ------------------------------------------------------------------------------------------------------


def check_pauses(patient: Patient) -> Iterator[Finding]:
    """Whether somebody forgot a pause."""
    now = patient.connection.execute(select(database_now())).scalar_one()
    for one in pauses.pauses(patient.connection):
        if one.until is None and now - one.since > patient.thresholds.pause:
            seen = f"{one.target.scope} {one.target} is paused without an end since {one.since:%Y-%m-%d}, by {one.by}"
            yield warning("pause-forgotten", f"{seen}: {one.reason}", f"outboxkit relay resume {one.target.name}")


def check_replays(patient: Patient) -> Iterator[Finding]:
    """Whether a replay never ended."""
    late = and_(_LETTERS.state == State.REPLAYING, _LETTERS.replaying_since < database_now(-patient.thresholds.replay))
    number = patient.connection.execute(select(func.count()).where(late)).scalar_one()
    if number:
        found = dead_letters.find(patient.connection, Filter(state=State.REPLAYING), limit=1)
        why = progress.why_open(patient.connection, found[0]) if found else ""
        minutes = patient.thresholds.replay.total_seconds() / 60
        seen = f"{number:,} letters are being replayed for more than {minutes:,.0f} min ({why})"
        yield warning(
            "replay-late", seen, "start what handles them, or replay again: outboxkit dlq list --state replaying"
        )


# --- consumers ---------------------------------------------------------------------------------------------------


def check_consumers(patient: Patient) -> Iterator[Finding]:
    """Whether messages wait for a consumer that does not run any more: it was renamed, or switched off."""
    lately = select(_STARTS.consumer).where(_STARTS.expires_at > database_now(-patient.thresholds.absence))
    waiting = select(_ROOM.consumer, func.count()).where(_ROOM.consumer.not_in(lately)).group_by(_ROOM.consumer)
    for consumer, number in patient.connection.execute(waiting):
        seen = f"{number:,} deliveries wait for {consumer}, of which no process was seen for days"
        yield warning("consumer-absent", seen, "start it, or follow docs/how-to/rename-consumer.md")


def check_schemas_read(patient: Patient) -> Iterator[Finding]:
    """Whether every consumer can read what is written today."""
    rows = patient.connection.execute(select(tables.outbox_schemas).order_by(_SCHEMAS.seen_at)).all()
    writers = {row.type: row for row in rows if row.role == "writer"}
    readers: dict[tuple[str, str], Any] = {(row.consumer, row.type): row for row in rows if row.role == "reader"}
    for (consumer, type_name), reader in sorted(readers.items()):
        writer = writers.get(type_name)
        faults = schema_store.problems(reader.text, writer.text) if writer else []
        if faults:
            field = f"{faults[0].get('field', '')}: {faults[0]['message']}".lstrip(": ")
            seen = f"{consumer} cannot read {type_name} as it is written now: {field}"
            yield problem("schema-drift", seen, faults[0].get("fix") or "deploy the consumer with a newer reader first")


# --- retention ---------------------------------------------------------------------------------------------------


def check_retention(patient: Patient) -> Iterator[Finding]:
    """Whether what is kept is kept long enough, and no longer."""
    kept = patient.settings.retention
    if kept.inbox < kept.replay_horizon:
        seen = f"retention.inbox is {kept.inbox}, below retention.replay_horizon ({kept.replay_horizon})"
        yield problem("retention-inbox", f"{seen}: what comes again takes effect twice", "raise retention.inbox")
    grace = patient.thresholds.behind
    late = kept.model_copy(
        update={name: getattr(kept, name) + grace for name in ("ledger", "inbox", "dead_letters", "audit")}
    )
    for name, number in retention.prune(patient.connection, late, dry_run=True).items():
        if number and name != "outbox_idempotency":
            oldest = f"{number:,} rows of {name} are older than their retention allows"
            yield warning("retention-behind", oldest, "outboxkit prune, daily, as the owner of the tables")


CHECKS: Final = (
    check_alembic,
    check_relays,
    check_wake,
    check_failpoints,
    check_pauses,
    check_replays,
    check_consumers,
    check_schemas_read,
    check_retention,
)
