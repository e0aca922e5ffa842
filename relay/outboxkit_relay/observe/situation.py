"""Situation: what goes on in an outbox, and whether anything is stuck; for ``outboxkit status`` and the page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import func, select

from outboxkit import dialects, tables
from outboxkit._legible import legible
from outboxkit._sql import database_now, microseconds_of
from outboxkit.inbox import held
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Pause, Scope
from outboxkit.rows import UNREADABLE, StopReason, WaitReason, microseconds
from outboxkit_relay.observe import runs
from outboxkit_relay.observe.sentences import from_text, sentence
from outboxkit_relay.words import ago, text_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.observe.runs import ConsumerStatus

__all__ = ["Situation", "Topic", "look"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_STOPPED: Final = tables.outbox_stopped_keys.c
_RELAYS: Final = tables.outbox_relays.c
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
class Situation:
    """An outbox at one moment.

    Attributes:
        now: that moment, by the database's clock.
        topics: destinations with messages that wait.
        relays: what each tells of itself.
        parked: keys behind dead heads.
        consumers: how each stands, with its runs.
        parked_at_consumers: keys of consumers behind dead heads.
        pauses: those in force.
        problems: a sentence each; none when nothing is stuck.
    """

    now: datetime
    topics: list[Topic]
    relays: list[dict[str, Any]]
    parked: list[dict[str, Any]]
    consumers: list[ConsumerStatus]
    parked_at_consumers: list[dict[str, Any]]
    pauses: list[Pause]
    problems: list[str]

    @property
    def pending(self) -> int:
        """Number of messages that are not published yet."""
        return sum(topic.pending for topic in self.topics)

    @property
    def oldest(self) -> timedelta:
        """Age of the oldest of them."""
        return timedelta(seconds=max((topic.oldest_seconds for topic in self.topics), default=0.0))

    @property
    def summary(self) -> str:
        """One line about what is pending."""
        return f"{self.pending:,} pending, the oldest for {ago(self.oldest)}" if self.pending else "nothing is pending"


def look(connection: Connection, patience: timedelta, *, handled: bool = True) -> Situation:
    """Reads what is pending, who publishes and handles, and what is held back; what takes longer is stuck.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        patience: what takes longer is stuck.
        handled: also count what inboxes remember, which reads all of them; no problem depends on it.
    """
    now = connection.execute(select(database_now())).scalar_one()
    topics, relays, parked = _topics(connection, now), _relays(connection, now), _parked(connection)
    in_force, consumers = pauses.pauses(connection), runs.consumers(connection, now, handled=handled)
    inside = _parked_at_consumers(connection) if any(one.parked for one in consumers) else []
    paused = {one.target.name for one in in_force if one.target.scope is Scope.DESTINATION}
    going = [topic for topic in topics if topic.topic not in paused]
    problems = _problems(going, relays, patience)
    return Situation(
        now=now,
        topics=topics,
        relays=relays,
        parked=parked,
        consumers=consumers,
        parked_at_consumers=inside,
        pauses=in_force,
        problems=[
            *_of_database(connection),
            *problems,
            *runs.problems(consumers, patience),
            *_of_keys([*parked, *inside]),
        ],
    )


def _of_database(connection: Connection) -> list[str]:
    """Says that nothing can be published here, whatever runs."""
    found = dialects.takes_no_writes(connection)
    mend = "let database_url lead to the primary (host=a,b&target_session_attrs=read-write finds it by itself)"
    return [f"the database is {found} and takes no writes: nothing is published from here; {mend}"] if found else []


def _problems(
    topics: list[Topic],
    relays: list[dict[str, Any]],
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
        age = ago(timedelta(seconds=topic.oldest_seconds))
        found.append(f"{topic.topic}: oldest pending {age} (limit {ago(patience)}), {topic.pending:,} pending")
    return found


def _of_keys(parked: list[dict[str, Any]]) -> list[str]:
    """Says which keys wait behind a dead head, of relays and of consumers."""
    found = [
        f"{key['topic']}: the key {key['key']} {_of_consumer(key)}is parked behind a dead head, "
        f"{key['followers']:,} messages wait: see `outboxkit dlq list {_side(key)}`"
        for key in parked[:_KEYS_SHOWN]
    ]
    if len(parked) > _KEYS_SHOWN:
        found.append(f"{len(parked) - _KEYS_SHOWN:,} more keys are parked")
    return found


def _of_consumer(key: dict[str, Any]) -> str:
    return f"of {key['consumer']} " if "consumer" in key else ""


def _side(key: dict[str, Any]) -> str:
    return f"--consumer {key['consumer']}" if "consumer" in key else "--side relay"


def _topics(connection: Connection, now: datetime) -> list[Topic]:
    found: dict[str, dict[str, Any]] = {}
    recorded, until = microseconds_of(_HOT.recorded_at), microseconds(now)
    oldest = func.min(func.nullif(recorded, UNREADABLE), type_=recorded.type)
    pending = select(legible(_HOT.topic), func.count(), oldest).group_by(_HOT.topic)
    for topic, count, since in connection.execute(pending):
        age = max(0.0, (until - since) / 1e6) if since is not None else 0.0
        found.setdefault(topic, {}).update(pending=count, oldest_seconds=age)
    waiting = select(legible(_WAITING.topic), _WAITING.reason, func.count()).group_by(_WAITING.topic, _WAITING.reason)
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


def _parked_at_consumers(connection: Connection) -> list[dict[str, Any]]:
    found = held.held(connection, reason=WaitReason.PARKED)
    names = ("consumer", "topic", "followers")
    return [{**{name: getattr(one, name) for name in names}, "key": text_of(one.key)} for one in found]
