"""``outboxkit status``: is anything stuck?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click
from sqlalchemy import exists, func, select, union_all

from outboxkit import dialects, tables
from outboxkit._sql import database_now, microseconds_of
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope
from outboxkit.policy import duration
from outboxkit.rows import UNREADABLE, StopReason, WaitReason, microseconds
from outboxkit_relay.cli import pause
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.observe.sentences import from_text, sentence

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["Report", "command", "look"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_STOPPED: Final = tables.outbox_stopped_keys.c
_RELAYS: Final = tables.outbox_relays.c
_LETTERS: Final = tables.dead_letters.c
_LIMIT: Final = "30s"
_KEYS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """Messages that wait for one destination."""

    topic: str
    pending: int = 0
    oldest_seconds: float = 0.0
    retry: int = 0
    follower: int = 0
    scheduled: int = 0
    stopped_keys: int = 0
    parked_keys: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that `status` tells."""

    topics: list[Topic]
    relays: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    consumers: list[dict[str, Any]]
    parked: list[dict[str, Any]]
    pauses: list[dict[str, Any]]
    problems: list[str]
    schema: str = ""


@click.command()
@click.option("--limit", default=_LIMIT, show_default=True, help="A message that is pending longer is stuck.")
@click.option("--message", "message_id", metavar="ID", help="Where is this message? Exit code 3 when it is nowhere.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; of a message one place a line.")
@click.pass_obj
def command(invocation: Invocation, limit: str, message_id: str | None, *, as_json: bool) -> int:
    """Is anything stuck? Exit code 3 when something is."""
    patience = duration(limit)
    if message_id is not None:
        return _tell_of(invocation, message_id, as_json=as_json)
    with database.reading(invocation) as connection:
        report = look(connection, patience)
    if as_json:
        output.print_json({"verdict": "stuck" if report.problems else "healthy", **asdict(report)})
    else:
        _show(report)
    return Exit.PROBLEMS if report.problems else Exit.OK


def _tell_of(invocation: Invocation, message_id: str, *, as_json: bool) -> int:
    with database.reading(invocation) as connection:
        places = find_message.find(connection, message_id)
    for place in places:
        if as_json:
            output.print_json({"message": message_id, **place})
        else:
            named = [f"{name} {value}" for name, value in place.items() if name != "place" and value not in (None, "")]
            click.echo(output.safe(f"{place['place']}: {', '.join(named)}"))
    if not places:
        click.echo(f"{output.safe(message_id)} is nowhere: it was never committed, or no longer kept", err=True)
    return Exit.OK if places else Exit.PROBLEMS


def look(connection: Connection, patience: timedelta) -> Report:
    """Reads the whole state, by the database's clock.

    Transaction: reads only.
    """
    now = connection.execute(select(database_now())).scalar_one()
    topics, relays, parked = _topics(connection, now), _relays(connection, now), _parked(connection)
    held = pauses.pauses(connection)
    paused = {one.target.name for one in held if one.target.scope is Scope.DESTINATION}
    return Report(
        topics=topics,
        relays=relays,
        schema=dialects.schema_of(connection),
        dead_letters=_dead_letters(connection),
        consumers=_consumers(connection, now),
        parked=parked,
        pauses=[{**pause.shown(one), "seconds": round((now - one.since).total_seconds(), 1)} for one in held],
        problems=_problems([topic for topic in topics if topic.topic not in paused], relays, parked, patience),
    )


def _problems(
    topics: list[Topic],
    relays: list[dict[str, Any]],
    parked: list[dict[str, Any]],
    patience: timedelta,
) -> list[str]:
    alive = [relay for relay in relays if relay["alive"]]
    late = [topic for topic in topics if topic.oldest_seconds > patience.total_seconds()]
    found = [told for relay in alive for told in relay["unavailable"]]
    ended = [relay for relay in relays if relay["ended"] and not alive]
    found += [f"the relay on {relay['host']} does not publish: {relay['ended']}" for relay in ended]
    if not alive and any(topic.pending or topic.retry or topic.scheduled for topic in topics):
        found.append("messages wait, and no relay is alive: start one with `outboxkit relay run`")
    for topic in late:
        age = output.ago(timedelta(seconds=topic.oldest_seconds))
        found.append(f"{topic.topic}: oldest pending {age} (limit {output.ago(patience)}), {topic.pending:,} pending")
    found += [
        f"{key['topic']}: the key {key['key']} is parked behind a dead head, {key['followers']:,} messages wait: "
        "see `outboxkit dlq list --side relay`"
        for key in parked[:_KEYS_SHOWN]
    ]
    if len(parked) > _KEYS_SHOWN:
        found.append(f"{len(parked) - _KEYS_SHOWN:,} more keys are parked")
    return found


# --- reading -----------------------------------------------------------------------------------------------------


def _topics(connection: Connection, now: datetime) -> list[Topic]:
    found: dict[str, dict[str, Any]] = {}
    recorded, until = microseconds_of(_HOT.recorded_at), microseconds(now)
    oldest = func.min(func.nullif(recorded, UNREADABLE), type_=recorded.type)
    pending = select(_HOT.topic, func.count(), oldest).group_by(_HOT.topic)
    for topic, count, since in connection.execute(pending):
        age = max(0.0, (until - since) / 1e6) if since is not None else 0.0
        found.setdefault(topic, {}).update(pending=count, oldest_seconds=age)
    waiting = select(_WAITING.topic, _WAITING.reason, func.count()).group_by(_WAITING.topic, _WAITING.reason)
    for topic, reason, count in connection.execute(waiting):
        found.setdefault(topic, {})[reason] = count
    stopped = select(_STOPPED.topic, _STOPPED.reason, func.count()).group_by(_STOPPED.topic, _STOPPED.reason)
    for topic, reason, count in connection.execute(stopped):
        name = "parked_keys" if reason == StopReason.PARKED else "stopped_keys"
        found.setdefault(topic, {})[name] = count
    return [Topic(topic=topic, **values) for topic, values in sorted(found.items())]


def _relays(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    rows = connection.execute(select(tables.outbox_relays).order_by(_RELAYS.started_at)).mappings()
    owner = tables.outbox_shards.c.owner
    counted = connection.execute(select(owner, func.count().label("total")).group_by(owner))
    shards: dict[UUID | None, int] = {row.owner: row.total for row in counted}
    return [
        {
            "id": str(row["id"]),
            "host": row["host"],
            "version": row["version"],
            "alive": row["expires_at"] > now and row["ended"] is None,
            "ended": row["ended"],
            "unavailable": [sentence(one, now) for one in from_text(row["state"])],
            "shards": shards.get(row["id"], 0),
            "lease_seconds": round((row["expires_at"] - now).total_seconds(), 1),
            "up_seconds": round((now - row["started_at"]).total_seconds(), 1),
        }
        for row in rows
    ]


def _dead_letters(connection: Connection) -> list[dict[str, Any]]:
    grouping = (_LETTERS.side, _LETTERS.consumer, _LETTERS.state)
    rows = connection.execute(select(*grouping, func.count().label("count")).group_by(*grouping).order_by(*grouping))
    return [dict(row) for row in rows.mappings()]


def _consumers(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    marks, waiting, handled = tables.inbox_batches.c, tables.inbox_waiting.c, tables.inbox_messages.c
    names = union_all(select(marks.consumer), select(waiting.consumer), select(handled.consumer)).subquery()
    rows = []
    for (name,) in connection.execute(select(names.c.consumer).distinct().order_by(names.c.consumer)):
        busy = _count(connection, marks.consumer == name, marks.host != "", marks.expires_at > now)
        row = {"consumer": name, "handled": _count(connection, handled.consumer == name, ~_of_a_dead_message())}
        rows.append({**row, "waiting": _count(connection, waiting.consumer == name), "busy": busy})
    return rows


def _of_a_dead_message() -> ColumnElement[bool]:
    """An inbox row that stands for a message which had no effect, so that a redelivery has none either."""
    handled = tables.inbox_messages.c
    same = (_LETTERS.consumer == handled.consumer, _LETTERS.source == handled.source)
    return exists().where(*same, _LETTERS.message_id == handled.message_id, _LETTERS.state.in_(["dead", "discarded"]))


def _parked(connection: Connection) -> list[dict[str, Any]]:
    followers = (
        select(func.count())
        .where(_WAITING.topic == _STOPPED.topic, _WAITING.key == _STOPPED.key, _WAITING.reason == WaitReason.FOLLOWER)
        .scalar_subquery()
    )
    statement = select(_STOPPED.topic, _STOPPED.key, followers).where(_STOPPED.reason == StopReason.PARKED)
    return [
        {"topic": topic, "key": bytes(key).decode("utf-8", "backslashreplace"), "followers": count}
        for topic, key, count in connection.execute(statement.order_by(_STOPPED.topic, _STOPPED.key))
    ]


def _count(connection: Connection, *of: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).where(*of)).scalar_one()


# --- showing -----------------------------------------------------------------------------------------------------


def _show(report: Report) -> None:
    dead = sum(group["count"] for group in report.dead_letters if group["state"] == "dead")
    if report.problems:
        for problem in report.problems:
            output.verdict("STUCK", problem, "red")
    else:
        pending = sum(topic.pending for topic in report.topics)
        oldest = max((topic.oldest_seconds for topic in report.topics), default=0.0)
        state = (
            f"{pending:,} pending, the oldest for {output.ago(timedelta(seconds=oldest))}"
            if pending
            else "nothing is pending"
        )
        output.verdict("Healthy", state, "green")
    for held in report.pauses:
        output.verdict("Paused", _of_pause(held), "yellow")
    if dead:
        click.echo(
            f"{dead:,} dead letter{'s' if dead > 1 else ''} wait{'' if dead > 1 else 's'} for you: outboxkit dlq list"
        )
    _section(
        "TOPIC",
        ["PENDING", "OLDEST", "RETRY", "BEHIND", "SCHEDULED", "STOPPED", "PARKED"],
        [_topic_row(t) for t in report.topics],
    )
    if report.schema:
        click.echo(f"schema {output.safe(report.schema)}")
    _section("RELAY", ["HOST", "SHARDS", "UP", "LEASE"], [_relay_row(relay) for relay in report.relays])
    _section("CONSUMER", ["HANDLED", "WAITING", "BUSY"], [list(row.values()) for row in report.consumers])
    letters = [[row["consumer"] or "(relay)", row["state"], row["count"]] for row in report.dead_letters]
    _section("DEAD LETTERS", ["STATE", "COUNT"], letters)


def _of_pause(pause: dict[str, Any]) -> str:
    name = pause["name"] if pause["key"] is None else f"{pause['name']} {pause['key']}"
    age = output.ago(timedelta(seconds=pause["seconds"]))
    return f"{pause['scope']} {name}, by {pause['by']} {age} ago: {pause['reason']}"


def _section(first: str, others: list[str], rows: list[list[object]]) -> None:
    if rows:
        click.echo()
        output.table([first, *others], rows)


def _topic_row(topic: Topic) -> list[object]:
    oldest = output.ago(timedelta(seconds=topic.oldest_seconds)) if topic.pending else "-"
    counts = (topic.retry, topic.follower, topic.scheduled, topic.stopped_keys, topic.parked_keys)
    return [topic.topic, topic.pending, oldest, *counts]


def _relay_row(relay: dict[str, Any]) -> list[object]:
    up = output.ago(timedelta(seconds=relay["up_seconds"]))
    lease = f"{relay['lease_seconds']}s left" if relay["alive"] else "expired"
    return [relay["id"][:8], relay["host"], relay["shards"], up, lease]
