"""Views: what each page shows, as a frozen value, read in one connection. No view writes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from outboxkit import saga
from outboxkit.dead_letters import Filter, Group
from outboxkit.errors import ConfigurationError
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Pause
from outboxkit.saga import SagaRow, Status
from outboxkit_relay.dashboard import reading
from outboxkit_relay.dashboard.search import STATES, parse
from outboxkit_relay.dashboard.setup import NotFound
from outboxkit_relay.diagnose.steps import steps_of
from outboxkit_relay.diagnose.trace import trace
from outboxkit_relay.observe import situation
from outboxkit_relay.store import stopped_keys
from outboxkit_relay.words import ago

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.message import Message
    from outboxkit_relay.dashboard.reading import ConsumerRow, Found
    from outboxkit_relay.dashboard.setup import Setup
    from outboxkit_relay.diagnose.steps import Step
    from outboxkit_relay.observe.situation import Situation
    from outboxkit_relay.store.stopped_keys import KeyStop

__all__ = [
    "AuditPage",
    "ControlPage",
    "MessagePage",
    "MessagesPage",
    "Overview",
    "QuarantinePage",
    "SagaPage",
    "SagasPage",
    "Signal",
    "TracePage",
    "audit",
    "control",
    "conversation",
    "message",
    "messages",
    "overview",
    "quarantine",
    "saga_instance",
    "sagas",
]

PAGE: Final = 80  # rows of a list
_NEVER: Final = datetime.max.replace(tzinfo=UTC)

Query = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One of the golden signals.

    Attributes:
        title: its name.
        value: now, as people say it.
        note: what the line shows.
        values: for the line, the latest last.
        is_bad: whether it asks for attention.
    """

    title: str
    value: str
    note: str
    values: Sequence[float]
    is_bad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """Is anything stuck?"""

    situation: Situation
    signals: Sequence[Signal]
    letters: int
    groups: Sequence[Group]
    consumers: Sequence[ConsumerRow]


def overview(connection: Connection, setup: Setup, _: Query) -> Overview:
    """Looks whether anything is stuck, in the words of ``outboxkit status``."""
    found = situation.look(connection, setup.patience, handled=False)
    setup.history.add(found.pending, found.oldest.total_seconds())
    sent, deaths = reading.sent(connection, found.now), reading.deaths(connection, found.now)
    letters = reading.open_letters(connection)
    return Overview(
        situation=found,
        signals=(
            Signal(
                title="Oldest pending",
                value=ago(found.oldest) if found.pending else "-",
                note="since this page was opened",
                values=setup.history.oldest,
                is_bad=bool(found.problems) and found.oldest > setup.patience,
            ),
            Signal(
                title="Pending",
                value=f"{found.pending:,}",
                note="since this page was opened",
                values=setup.history.pending,
            ),
            Signal(
                title="Published per minute",
                value=f"{sent[-1]:,.0f}",
                note=f"{sum(sent):,.0f} in {reading.BUCKETS} min",
                values=sent,
            ),
            Signal(
                title=f"Died in {reading.BUCKETS} min",
                value=f"{sum(deaths):,.0f}",
                note=f"{deaths[-1]:,.0f} in the last minute",
                values=deaths,
                is_bad=sum(deaths) > 0,
            ),
        ),
        letters=letters,
        groups=reading.groups(connection, Filter(), limit=5) if letters else (),
        consumers=reading.consumers(connection, found.now),
    )


# --- messages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesPage:
    """Messages that are not published yet, and dead ones."""

    text: str
    fault: str
    states: Sequence[str]
    found: Found | None


def messages(connection: Connection, _: Setup, given: Query) -> MessagesPage:
    """Searches messages."""
    text = given.get("q", "").strip()
    try:
        wanted = parse(text)
    except ConfigurationError as error:
        return MessagesPage(text=text, fault=error.message, states=STATES, found=None)
    return MessagesPage(text=text, fault="", states=STATES, found=reading.find(connection, wanted, limit=PAGE))


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagePage:
    """One message's timeline, the oldest step first; what is so now comes last."""

    id: str
    steps: Sequence[Step]


def message(connection: Connection, _: Setup, given: Query) -> MessagePage:
    """Follows one message through all tables, in the words of ``outboxkit trace``."""
    steps = sorted(steps_of(connection, given["id"]), key=lambda step: (step.at is None, step.at or _NEVER))
    if not steps:
        raise NotFound(f"{given['id']} is nowhere: it was never committed, or no longer kept")
    return MessagePage(id=given["id"], steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePage:
    """A conversation: its messages as causes and effects, and all their steps.

    Attributes:
        flow: messages with their depth: each stands below the one that caused it.
        is_whole: whether no message was left out.
    """

    asked: str
    flow: Sequence[tuple[int, Message]]
    steps: Sequence[Step]
    is_whole: bool


def conversation(connection: Connection, _: Setup, given: Query) -> TracePage:
    """Follows a key, a conversation or a trace, as ``outboxkit trace`` does. Looks through all that is stored."""
    asked = given.get("q", "").strip()
    found = trace(connection, asked)
    return TracePage(asked=asked, flow=[*_flow(found.messages)], steps=found.steps, is_whole=found.is_whole)


def _flow(messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    """Yields each message after the one that caused it, with its depth."""
    ids = {one.id for one in messages}
    below: dict[str, list[Message]] = {}
    for one in messages:
        cause = one.causation_id if one.causation_id in ids and one.causation_id != one.id else ""
        below.setdefault(cause, []).append(one)
    line: list[tuple[int, Message]] = []
    while line or below:
        if not line:  # where causes go in a circle, any of them is the first
            start = "" if "" in below else next(iter(below))
            line = [(0, one) for one in reversed(below.pop(start))]
        depth, one = line.pop()
        yield depth, one
        line += [(depth + 1, child) for child in reversed(below.pop(one.id, []))]


# --- keys, sagas, control ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinePage:
    """Keys whose order is held."""

    stops: Sequence[KeyStop]
    total: int
    now: datetime


def quarantine(connection: Connection, _: Setup, __: Query) -> QuarantinePage:
    """Lists stopped keys."""
    return QuarantinePage(
        stops=stopped_keys.list_stopped(connection, limit=PAGE),
        total=stopped_keys.count_stopped_keys(connection),
        now=reading.now(connection),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SagasPage:
    """Instances of sagas, the one that changed last first."""

    rows: Sequence[SagaRow]
    status: str
    statuses: Sequence[str]
    now: datetime


def sagas(connection: Connection, _: Setup, given: Query) -> SagasPage:
    """Lists instances of sagas, of one status if asked."""
    statuses = [one.value for one in Status]
    status = given.get("status", "") if given.get("status") in statuses else ""
    rows = saga.find(connection, status=Status(status) if status else None, limit=PAGE)
    return SagasPage(rows=rows, status=status, statuses=statuses, now=reading.now(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaPage:
    """One instance; its state is not shown: it may hold what is nobody's business."""

    row: SagaRow
    now: datetime


def saga_instance(connection: Connection, _: Setup, given: Query) -> SagaPage:
    """Shows what happened to one instance."""
    found = saga.get(connection, given.get("saga", ""), given.get("key", ""))
    if found is None:
        raise NotFound(f"there is no instance {given.get('key', '')} of the saga {given.get('saga', '')}")
    return SagaPage(row=found, now=reading.now(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPage:
    """Pauses of operators."""

    pauses: Sequence[Pause]
    now: datetime


def control(connection: Connection, _: Setup, __: Query) -> ControlPage:
    """Lists pauses."""
    return ControlPage(pauses=pauses.pauses(connection), now=reading.now(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """The audit log, the latest entry first."""

    entries: Sequence[Any]


def audit(connection: Connection, _: Setup, __: Query) -> AuditPage:
    """Lists what operators did."""
    return AuditPage(entries=reading.audit_log(connection, limit=PAGE))
