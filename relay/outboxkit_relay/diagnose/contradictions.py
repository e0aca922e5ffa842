"""Contradictions: states of the tables that no transaction of ours leaves behind, each as one query. Read only.

They come of rows that were edited by hand, of restores, and of defects. What a crash may leave behind is none: the
rules hold at every moment of a run with crashes. An id that was given out twice on purpose (``unique_key``, a replay)
may stand in two places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Select, String, and_, cast, exists, func, literal, not_, or_, select, true, union_all

from outboxkit import tables
from outboxkit._legible import legible
from outboxkit.dead_letters import Side, State
from outboxkit.dialects import dialect_of
from outboxkit.inbox.rows import OURS, REPLAY
from outboxkit.policy import Failure
from outboxkit.rows import Request, StopReason, WaitReason

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

__all__ = ["RULES", "Contradiction", "Rule", "contradictions", "id_text", "ledger_ids"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_STOPPED: Final = tables.outbox_stopped_keys.c
_LEDGER: Final = tables.outbox_ledger.c
_LETTERS: Final = tables.dead_letters.c
_INBOX: Final = tables.inbox_messages.c
_REPLAYS: Final = tables.dead_letter_replays.c
_ITEMS: Final = tables.dead_letter_replay_items.c
_SHOWN: Final = 5
_MAX: Final = 10_000
_DERIVED: Final = "5"  # the version of an id that was made of a name: it may come twice on purpose
_VERSION_AT: Final = 13
_DIGITS: Final = 32  # of a UUID: other ids are foreign

Ids = Select[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One contradiction to look for.

    Attributes:
        name: for machines and the documentation.
        meaning: what contradicts what.
        fix: what to do.
        query: selects the name of each thing that breaks the rule; given the ids of the ledger.
    """

    name: str
    meaning: str
    fix: str
    query: Callable[[Ids], Ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """A rule that is broken.

    Attributes:
        count: how often, at most 10,000.
        examples: names of the first ones: message ids, letters, keys.
    """

    name: str
    meaning: str
    fix: str
    count: int
    examples: tuple[str, ...]


def contradictions(connection: Connection) -> list[Contradiction]:
    """Looks for everything that contradicts itself.

    Transaction: joins the caller's, which should see one snapshot (REPEATABLE READ); reads only. Index used: none.
    """
    found = []
    for rule in RULES:
        (name,) = rule.query(ledger_ids(connection)).limit(_MAX).subquery().c
        names = connection.execute(select(legible(name))).scalars().all()
        if names:
            shown = tuple(_shown(name) for name in names[:_SHOWN])
            told = {"name": rule.name, "meaning": rule.meaning, "fix": rule.fix}
            found.append(Contradiction(**told, count=len(names), examples=shown))
    return found


def ledger_ids(connection: Connection, outcome: str | None = None) -> Ids:
    """Selects every id of the ledger, perhaps of one outcome, as `id_text` writes it."""
    arrays = dialect_of(connection).features.arrays
    each = (func.unnest if arrays else func.json_each)(_LEDGER.ids).table_valued("value", name="each")
    each = each.render_derived() if arrays else each
    wanted = true() if outcome is None else _LEDGER.outcome == outcome
    return select(id_text(each.c.value).label("id")).select_from(tables.outbox_ledger).join(each, true()).where(wanted)


def id_text(column: ColumnElement[Any]) -> ColumnElement[str]:
    """An id as 32 digits, however the column holds it; foreign ids stay what they are."""
    return func.replace(cast(column, String), "-", "", type_=String())


def _shown(name: object) -> str:
    return bytes(name).decode("utf-8", "backslashreplace") if isinstance(name, bytes | memoryview) else str(name)


# --- parts of queries --------------------------------------------------------------------------------------------


def _may_come_twice(name: ColumnElement[str]) -> ColumnElement[bool]:
    replayed = select(id_text(_LETTERS.message_id)).where(_LETTERS.state.in_([State.REPLAYING, State.REPLAYED]))
    return or_(func.substr(name, _VERSION_AT, 1) == _DERIVED, name.in_(replayed))


def _hot_ids() -> Ids:
    return select(id_text(_HOT.message_id).label("id"))


def _waiting_ids() -> Ids:
    return select(id_text(_WAITING.message_id).label("id"))


def _in_both(one: Ids, other: Ids) -> Ids:
    name = one.subquery().c.id
    return select(name).distinct().where(name.in_(other), not_(_may_come_twice(name)))


def _twice(ids: Ids) -> Ids:
    name = ids.subquery().c.id
    return select(name).where(not_(_may_come_twice(name))).group_by(name).having(func.count() > 1)


def _stop_of(topic: ColumnElement[str], key: ColumnElement[Any]) -> ColumnElement[bool]:
    return exists().where(_STOPPED.topic == topic, _STOPPED.key == key)


def _in_line() -> ColumnElement[bool]:
    """A waiting row that stands in the line of its key."""
    return and_(_WAITING.reason != WaitReason.SCHEDULED, _WAITING.key.is_not(None))


def _same_key() -> ColumnElement[bool]:
    return and_(_WAITING.topic == _STOPPED.topic, _WAITING.key == _STOPPED.key)


# --- the rules ---------------------------------------------------------------------------------------------------


def _dead_and_unpublished(_: Ids) -> Ids:
    name = id_text(_LETTERS.message_id)
    is_dead = and_(_LETTERS.side == Side.RELAY, _LETTERS.state.in_([State.DEAD, State.DISCARDED]))
    unpublished = union_all(_hot_ids(), _waiting_ids()).subquery()
    return select(_LETTERS.id).where(is_dead, name.in_(select(unpublished.c.id)), not_(_may_come_twice(name)))


def _stopped_without_head(_: Ids) -> Ids:
    head = exists().where(_same_key(), _WAITING.reason != WaitReason.SCHEDULED)
    return select(_STOPPED.key).where(_STOPPED.reason == StopReason.RETRY, ~head)


def _parked_without_letter(_: Ids) -> Ids:
    letter = exists().where(
        _LETTERS.side == Side.RELAY,
        _LETTERS.topic == _STOPPED.topic,
        _LETTERS.key == _STOPPED.key,
        _LETTERS.source_position == _STOPPED.position,
    )
    return select(_STOPPED.key).where(_STOPPED.reason == StopReason.PARKED, ~letter)


def _ahead_of_head(_: Ids) -> Ids:
    behind = exists().where(_same_key(), _STOPPED.position > _WAITING.position)
    return select(_WAITING.message_id).where(_in_line(), behind)


def _waits_for_nothing(_: Ids) -> Ids:
    alone = or_(_WAITING.reason == WaitReason.SCHEDULED, _WAITING.key.is_(None))
    rows = select(cast(_WAITING.message_id, String).label("name")).where(_WAITING.due_at.is_(None), alone)
    never = and_(_STOPPED.reason == StopReason.RETRY, _STOPPED.due_at.is_(None))
    keys = select(_STOPPED.topic.label("name")).where(never)
    return select(union_all(rows, keys).subquery().c.name)


def _shard_unknown(_: Ids) -> Ids:
    shards = select(tables.outbox_shards.c.shard)
    return select(_HOT.message_id).where(_HOT.shard.not_in(shards), exists(shards))


def _evidence_torn(_: Ids) -> Ids:
    """The arrays of one row belong together; as text they have as many commas, on every database."""

    def commas(column: ColumnElement[Any]) -> ColumnElement[int]:
        text = cast(column, String)
        return func.length(text) - func.length(func.replace(text, ",", ""))

    ids = commas(_LEDGER.ids)
    torn = or_(ids != commas(_LEDGER.partitions), ids != commas(_LEDGER.offsets))
    return select(_LEDGER.id).where(or_(torn, _LEDGER.min_id > _LEDGER.max_id))


def _dead_of(outcome: ColumnElement[bool], *, there: bool) -> Ids:
    """Open letters of consumers by the inbox row that each must have taken."""
    same = (_INBOX.consumer == _LETTERS.consumer, _INBOX.source == _LETTERS.source)
    row = exists().where(*same, _INBOX.message_id == _LETTERS.message_id, outcome)
    takes_one = and_(_LETTERS.message_id != "", _LETTERS.failure != Failure.CONFLICT)
    is_open = and_(_LETTERS.side == Side.CONSUMER, _LETTERS.state == State.DEAD)
    return select(_LETTERS.id).where(is_open, takes_one, row if there else ~row)


def _dead_and_handled(_: Ids) -> Ids:
    is_effect = or_(_INBOX.outcome.is_(None), func.substr(_INBOX.outcome, 1, len(OURS)) != OURS)
    return _dead_of(is_effect, there=True)


def _freed_without_replay(_: Ids) -> Ids:
    replay = exists().where(_LETTERS.message_id == _INBOX.message_id, _LETTERS.state == State.REPLAYING)
    return select(_INBOX.message_id).where(_INBOX.outcome == literal(REPLAY), ~replay)


def _replay_lost(ledger: Ids) -> Ids:
    """Under way, and neither on the way out nor sent since; of what the ledger has forgotten nothing is said."""
    name = id_text(_LETTERS.message_id)
    somewhere = union_all(_hot_ids(), _waiting_ids(), ledger).subquery()
    oldest = select(func.min(_LEDGER.published_at)).scalar_subquery()
    asked = exists().where(
        _STOPPED.topic == _LETTERS.topic, _STOPPED.key == _LETTERS.key, _STOPPED.request == Request.REPAIR
    )
    is_remembered = _LETTERS.replaying_since >= func.coalesce(oldest, _LETTERS.replaying_since)
    return select(_LETTERS.id).where(
        _LETTERS.state == State.REPLAYING,
        func.length(name) == _DIGITS,
        is_remembered,
        name.not_in(select(somewhere.c.id)),
        ~asked,
    )


def _letter_torn(_: Ids) -> Ids:
    is_closed = _LETTERS.state.in_([State.REPLAYED, State.DISCARDED])
    return select(_LETTERS.id).where(
        or_(and_(is_closed, _LETTERS.closed_at.is_(None)), and_(~is_closed, _LETTERS.closed_at.is_not(None)))
    )


def _replay_torn(_: Ids) -> Ids:
    open_items = exists().where(_ITEMS.replay_id == _REPLAYS.id, _ITEMS.outcome == "waiting")
    done = select(cast(_REPLAYS.id, String).label("id")).where(_REPLAYS.state == "done", open_items)
    lost = select(cast(_ITEMS.replay_id, String).label("id")).where(_ITEMS.replay_id.not_in(select(_REPLAYS.id)))
    return select(union_all(done, lost).subquery().c.id).distinct()


_BY_HAND: Final = "somebody wrote past outboxkit, or a restore mixed two times"
_MENDS: Final = "a relay that runs mends it within a minute; if it stays, "

RULES: Final = (
    Rule(
        name="published-and-pending",
        meaning="the ledger has the broker's acknowledgement, and the message is still in the outbox",
        fix=f"{_BY_HAND}: it will be published again, which inboxes absorb; else delete the row",
        query=lambda ledger: _in_both(_hot_ids(), ledger),
    ),
    Rule(
        name="pending-and-waiting",
        meaning="the message is in the outbox and in the waiting room",
        fix=f"{_BY_HAND}: delete one of the two rows",
        query=lambda _: _in_both(_hot_ids(), _waiting_ids()),
    ),
    Rule(
        name="pending-twice",
        meaning="the outbox holds one message twice",
        fix=f"{_BY_HAND}: delete the row with the higher position",
        query=lambda _: _twice(_hot_ids()),
    ),
    Rule(
        name="waiting-twice",
        meaning="the waiting room holds one message twice",
        fix=f"{_BY_HAND}: delete one of the rows",
        query=lambda _: _twice(_waiting_ids()),
    ),
    Rule(
        name="dead-and-unpublished",
        meaning="a message has an open or discarded letter of the relay, and is still to be published",
        fix=f"{_BY_HAND}: delete the row, or discard the letter after it went out",
        query=_dead_and_unpublished,
    ),
    Rule(
        name="stopped-without-head",
        meaning="a key is stopped for a retry, and no message of it waits",
        fix=f"{_MENDS}delete its row of outbox_stopped_keys",
        query=_stopped_without_head,
    ),
    Rule(
        name="parked-without-letter",
        meaning="a key is parked behind a dead head, and there is no letter of that head",
        fix="let the others go on: outboxkit quarantine release TOPIC KEY",
        query=_parked_without_letter,
    ),
    Rule(
        name="follower-without-stop",
        meaning="a message waits in the line of a key that is not stopped",
        fix=f"{_MENDS}give the key a row in outbox_stopped_keys",
        query=lambda _: select(_WAITING.message_id).where(_in_line(), ~_stop_of(_WAITING.topic, _WAITING.key)),
    ),
    Rule(
        name="ahead-of-head",
        meaning="a message waits before the head of its stopped key",
        fix="set the position of its stopped key to the lowest that waits",
        query=_ahead_of_head,
    ),
    Rule(
        name="waits-for-nothing",
        meaning="a message, or the head of a key, waits for no instant and behind nobody",
        fix=f"{_MENDS}set its due_at",
        query=_waits_for_nothing,
    ),
    Rule(
        name="shard-unknown",
        meaning="a message has a shard that no relay reads",
        fix=f"{_MENDS}correct its shard",
        query=_shard_unknown,
    ),
    Rule(
        name="evidence-torn",
        meaning="a row of the ledger has not as many ids as partitions and offsets",
        fix=f"{_BY_HAND}: what it proves is void",
        query=_evidence_torn,
    ),
    Rule(
        name="dead-without-inbox-row",
        meaning="a dead message of a consumer has no inbox row: a redelivery would take effect",
        fix="replay or discard the letter before the topic is rewound",
        query=lambda _: _dead_of(true(), there=False),
    ),
    Rule(
        name="dead-and-handled",
        meaning="a consumer's message is dead, and its effect is committed",
        fix="discard the letter: outboxkit dlq discard ID",
        query=_dead_and_handled,
    ),
    Rule(
        name="freed-without-replay",
        meaning="an inbox row lets a replay in, and no letter of it is being replayed",
        fix="a redelivery would take effect: find out whether it may",
        query=_freed_without_replay,
    ),
    Rule(
        name="replay-lost",
        meaning="a letter is being replayed, and its message is neither on its way nor was it sent",
        fix="replay it again: outboxkit dlq replay ID --force",
        query=_replay_lost,
    ),
    Rule(
        name="letter-torn",
        meaning="a letter is closed without a time, or open with one",
        fix=f"{_BY_HAND}: correct closed_at",
        query=_letter_torn,
    ),
    Rule(
        name="replay-torn",
        meaning="a replay is done while letters of it wait, or has letters and no plan",
        fix="start a new replay of these letters",
        query=_replay_torn,
    ),
)
