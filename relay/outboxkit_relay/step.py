"""The relay's core: what to do next, as a pure function of what is known. No clock, no I/O, no threads.

``step(state, event, now, rng) -> (state, commands)``. The shell (`outboxkit_relay.relay`) carries the commands out and
brings their results back as events:

    Owned ─▶ Fetch ─▶ Fetched ─▶ Claim ─▶ Claimed ─▶ Publish… ─▶ Answered… ─▶ Settle ─▶ Settled ─▶ Fetch …

One page is worked on at a time. Within it every destination has its own batches, and under ``order = strict`` a message
goes out only after the previous one of its key was acknowledged.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from outboxkit import policy
from outboxkit.brokers import Batch, Receipts, Refusal
from outboxkit.outbox import Evidence, Hold
from outboxkit.policy import Bury, Failure, Followers, Order, Pause, Retry, RetryPolicy

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping, Sequence

    from outboxkit.message import Row
    from outboxkit.outbox import StoppedKey

__all__ = [
    "Answered",
    "Burial",
    "Claim",
    "Claimed",
    "Command",
    "Event",
    "Fenced",
    "Fetch",
    "Fetched",
    "GiveUp",
    "Leave",
    "Owned",
    "Paused",
    "Phase",
    "Publish",
    "Rejoin",
    "Rules",
    "Settle",
    "Settled",
    "State",
    "Stop",
    "Tick",
    "step",
]

_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change while a relay runs.

    Attributes:
        batch_size: rows in a page, 1 and more.
        order: how much of a key may be in flight.
        retry: for messages in trouble of their own, and the jitter of pauses.
        quick: time between two empty reads while messages flow.
        slow: the longest time between two empty reads.
        patience: a batch that is not answered for so long is given up and sent again.
        once: leave as soon as nothing is left to publish.
    """

    batch_size: int = 1000
    order: Order = Order.PIPELINED
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    quick: timedelta = timedelta(milliseconds=4)
    slow: timedelta = timedelta(milliseconds=250)
    patience: timedelta = timedelta(seconds=30)
    once: bool = False


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owned:
    """The relay holds a lease and these shards; these keys of them are stopped."""

    shards: frozenset[int]
    stopped: frozenset[StoppedKey]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page: due waiting rows and fresh rows, in position order."""

    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Claimed:
    """What was read is durable, and the lease is safe until an instant."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Answered:
    """A batch has its receipts."""

    number: int
    receipts: Receipts


@dataclass(frozen=True, slots=True)
class Settled:
    """The settlement is committed; these keys are stopped now."""

    stopped: frozenset[StoppedKey]


@dataclass(frozen=True, slots=True)
class Fenced:
    """The lease is lost."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what is in flight, until an instant, and leave."""

    until: datetime


Event = Owned | Fetched | Claimed | Answered | Settled | Fenced | Tick | Stop

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a page."""

    shards: frozenset[int]
    without: frozenset[str]
    limit: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Make what was read durable and confirm the lease."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Hand a batch to the broker; its receipts come back under this number."""

    number: int
    batch: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Burial:
    """A head that became a dead letter, and what happens to its followers."""

    row: Row
    failure: Failure
    text: str
    attempts: int
    fate: Followers
    followers: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What became of a page.

    Attributes:
        evidence: acknowledged and expired rows: they are removed, the ledger keeps the proof.
        held: heads that wait for their next try.
        buried: heads that are dead.
        aside: fresh rows of stopped keys.
        freed: stopped keys whose head went out: their next follower is due.
    """

    evidence: tuple[Evidence, ...] = ()
    held: tuple[Hold, ...] = ()
    buried: tuple[Burial, ...] = ()
    aside: tuple[Row, ...] = ()
    freed: tuple[StoppedKey, ...] = ()

    @property
    def needs_fence(self) -> bool:
        """Whether anything but the removal of published rows changes."""
        return bool(self.held or self.buried or self.aside or self.freed)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Reset the publisher: every batch in flight gets its answer, the unknown ones ``indeterminate``."""


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Forget everything and join under a new token."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Give back shards and lease: the work is done."""


Command = Fetch | Claim | Publish | Settle | GiveUp | Rejoin | Leave

# --- state -------------------------------------------------------------------------------------------------------


class Phase(Enum):
    """Where the relay stands in its circle."""

    JOINING = auto()
    IDLE = auto()
    READING = auto()
    CLAIMING = auto()
    PUBLISHING = auto()
    SETTLING = auto()
    LEFT = auto()


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch at the broker, and when it is given up."""

    batch: Batch
    deadline: datetime


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one row: a refusal, or evidence."""

    refusal: Refusal | None
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A destination in trouble: not used until an instant; how often in a row, and why."""

    until: datetime
    times: int
    failure: Failure
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything the relay knows. ``page``, ``todo``, ``answers`` belong to the page at work."""

    rules: Rules
    phase: Phase = Phase.JOINING
    shards: frozenset[int] = frozenset()
    stopped: frozenset[StoppedKey] = frozenset()
    page: tuple[Row, ...] = ()
    aside: tuple[Row, ...] = ()
    expired: tuple[Row, ...] = ()
    todo: tuple[Row, ...] = ()
    flights: Mapping[int, Flight] = field(default_factory=dict)
    answers: Mapping[int, Answer] = field(default_factory=dict)
    paused: Mapping[str, Paused] = field(default_factory=dict)
    number: int = 0
    lease_until: datetime = _LONG_AGO
    wake_at: datetime = _LONG_AGO
    idle: timedelta = timedelta(0)
    stop_at: datetime | None = None


Steps = tuple[State, list[Command]]


def step(state: State, event: Event, now: datetime, rng: random.Random) -> Steps:
    """The next state and what to do now."""
    return _ON[type(event)](state, event, now, rng)


# --- what each event means ---------------------------------------------------------------------------------------


def _owned(state: State, event: Owned, now: datetime, _rng: random.Random) -> Steps:
    fresh = replace(state, phase=Phase.IDLE, shards=event.shards, stopped=event.stopped, wake_at=now)
    return _read_if_due(fresh, now)


def _tick(state: State, _event: Tick, now: datetime, _rng: random.Random) -> Steps:
    if state.phase is Phase.IDLE:
        return _read_if_due(state, now)
    overdue = any(flight.deadline <= now for flight in state.flights.values())
    if state.phase is Phase.PUBLISHING and overdue:
        # Once: the answers that `GiveUp` forces end every flight.
        later = now + state.rules.patience
        flights = {number: replace(flight, deadline=later) for number, flight in state.flights.items()}
        return replace(state, flights=flights, todo=()), [GiveUp()]
    return state, []


def _stop(state: State, event: Stop, now: datetime, rng: random.Random) -> Steps:
    flights = {
        number: replace(flight, deadline=min(flight.deadline, event.until)) for number, flight in state.flights.items()
    }
    stopping = replace(state, stop_at=event.until, flights=flights, todo=())
    if state.phase is Phase.IDLE:
        return replace(stopping, phase=Phase.LEFT), [Leave()]
    return _settle_if_answered(stopping, now, rng) if state.phase is Phase.PUBLISHING else (stopping, [])


def _fenced(state: State, _event: Fenced, _now: datetime, _rng: random.Random) -> Steps:
    forgotten = State(rules=state.rules, number=state.number, paused=state.paused, stop_at=state.stop_at)
    if state.stop_at is not None:
        return replace(forgotten, phase=Phase.LEFT), [GiveUp(), Leave()]
    return forgotten, [GiveUp(), Rejoin()]


def _fetched(state: State, event: Fetched, now: datetime, _rng: random.Random) -> Steps:
    if not event.rows or state.stop_at is not None:
        return _rest(state, now)
    fresh_of_stopped = [row for row in event.rows if row.waiting_id is None and _key_of(row) in state.stopped]
    rest = [row for row in event.rows if row.waiting_id is not None or _key_of(row) not in state.stopped]
    expired = tuple(row for row in rest if row.expires_at is not None and row.expires_at <= now)
    page = tuple(row for row in rest if row.expires_at is None or row.expires_at > now)
    work = replace(
        state,
        phase=Phase.CLAIMING,
        page=page,
        todo=page,
        aside=tuple(fresh_of_stopped),
        expired=expired,
        answers={},
    )
    return work, [Claim()]


def _claimed(state: State, event: Claimed, now: datetime, rng: random.Random) -> Steps:
    claimed = replace(state, phase=Phase.PUBLISHING, lease_until=event.until)
    return _hand_over(claimed, now, rng)


def _answered(state: State, event: Answered, now: datetime, rng: random.Random) -> Steps:
    flight = state.flights.get(event.number)
    if flight is None:
        return state, []  # of a page that was forgotten with its lease
    answers = dict(state.answers)
    refusals = {refusal.index: refusal for refusal in event.receipts.refusals}
    for index, row in enumerate(flight.batch.rows):
        evidence = event.receipts.partitions[index], event.receipts.offsets[index]
        answers[row.position] = Answer(refusals.get(index), *evidence)
    flights = {number: other for number, other in state.flights.items() if number != event.number}
    known = replace(state, flights=flights, answers=answers)
    if any(refusal.failure is Failure.FENCED for refusal in refusals.values()):
        return _fenced(known, Fenced(), now, rng)
    return _hand_over(_without_troubled(known, flight.batch, refusals), now, rng)


def _settled(state: State, event: Settled, now: datetime, _rng: random.Random) -> Steps:
    done = replace(
        state,
        phase=Phase.IDLE,
        stopped=event.stopped,
        page=(),
        aside=(),
        expired=(),
        answers={},
        wake_at=now,
        idle=state.rules.quick,
    )
    return _read_if_due(done, now)


_ON: Final[dict[type, Callable[..., Steps]]] = {
    Owned: _owned,
    Fetched: _fetched,
    Claimed: _claimed,
    Answered: _answered,
    Settled: _settled,
    Fenced: _fenced,
    Tick: _tick,
    Stop: _stop,
}

# --- reading -----------------------------------------------------------------------------------------------------


def _read_if_due(state: State, now: datetime) -> Steps:
    if state.stop_at is not None:
        return replace(state, phase=Phase.LEFT), [Leave()]
    if now < state.wake_at:
        return state, []
    without = frozenset(topic for topic, paused in state.paused.items() if paused.until > now)
    return replace(state, phase=Phase.READING), [Fetch(state.shards, without, state.rules.batch_size)]


def _rest(state: State, now: datetime) -> Steps:
    idle = min(max(state.idle * 1.5, state.rules.quick), state.rules.slow)
    resting = replace(state, phase=Phase.IDLE, idle=idle, wake_at=now + idle)
    if state.rules.once and not state.paused:
        return replace(resting, phase=Phase.LEFT), [Leave()]
    return _read_if_due(resting, now)


# --- handing over ------------------------------------------------------------------------------------------------


def _hand_over(state: State, now: datetime, rng: random.Random) -> Steps:
    if not state.todo:
        return _settle_if_answered(state, now, rng)
    if now >= state.lease_until:
        return replace(state, phase=Phase.CLAIMING), [Claim()]
    ready, later = _ready(state)
    by_destination: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in ready:
        by_destination[row.topic, row.kind].append(row)
    batches = [Batch(topic, rows) for (topic, _), rows in by_destination.items()]
    numbered = list(enumerate(batches, state.number + 1))
    deadline = now + state.rules.patience
    flights = {**state.flights, **{number: Flight(batch, deadline) for number, batch in numbered}}
    flying = replace(state, todo=tuple(later), flights=flights, number=state.number + len(batches))
    return flying, [Publish(number, batch) for number, batch in numbered]


def _ready(state: State) -> tuple[list[Row], list[Row]]:
    """What may go out now, and what must wait for an acknowledgement of its own key."""
    if state.rules.order is Order.PIPELINED:
        return list(state.todo), []
    busy = {_key_of(row) for flight in state.flights.values() for row in flight.batch.rows}
    ready: list[Row] = []
    later: list[Row] = []
    for row in state.todo:
        key = _key_of(row)
        (later if key in busy else ready).append(row)
        busy.add(key)
    return ready, later


def _without_troubled(state: State, batch: Batch, refusals: Mapping[int, Refusal]) -> State:
    """Drops from the page's rest what must not overtake a refused message, or goes to a destination in trouble."""
    if not refusals or not state.todo:
        return state
    keys = {_key_of(batch.rows[index]) for index in refusals}
    in_trouble = any(refusal.failure.of_destination for refusal in refusals.values())
    todo = (
        row for row in state.todo if _key_of(row) not in keys and not (in_trouble and row.topic == batch.destination)
    )
    return replace(state, todo=tuple(todo))


# --- settling ----------------------------------------------------------------------------------------------------


def _settle_if_answered(state: State, now: datetime, rng: random.Random) -> Steps:
    if state.flights:
        return state, []
    settlement, paused = _judge(state, now, rng)
    return replace(state, phase=Phase.SETTLING, paused=paused), [settlement]


def _judge(state: State, now: datetime, rng: random.Random) -> tuple[Settle, dict[str, Paused]]:
    """What becomes of every row of the page, key by key."""
    paused = dict(state.paused)
    published: list[Row] = []
    held: list[Hold] = []
    buried: list[Burial] = []
    for rows in _by_key(state.page):
        head = next((row for row in rows if not _acknowledged(state, row)), None)
        decision = _decide(state, head, paused, now=now, rng=rng)
        if head is None or isinstance(decision, Retry | Bury):
            # Followers that the broker already acknowledged are published, whatever becomes of the head.
            published += [row for row in rows if _acknowledged(state, row)]
        else:
            published += rows[: rows.index(head)]
        if head is not None and isinstance(decision, Retry | Bury):
            followers = tuple(row for row in rows if row is not head and not _acknowledged(state, row))
            (held if isinstance(decision, Retry) else buried).append(
                _sentence(state, head, followers, decision, now=now),  # type: ignore[arg-type]
            )
    for topic in {row.topic for row in published}:
        if topic in paused and paused[topic].until <= now:
            del paused[topic]
    freed = tuple(_key_of(row) for row in published if row.waiting_id is not None and row.key is not None)
    evidence = (*_evidence(state, published), *_expiries(state))
    freed += tuple(_key_of(row) for row in state.expired if row.waiting_id is not None and row.key is not None)
    return (
        Settle(evidence=evidence, held=tuple(held), buried=tuple(buried), aside=state.aside, freed=freed),  # type: ignore[arg-type]
        paused,
    )


def _decide(
    state: State,
    head: Row | None,
    paused: dict[str, Paused],
    *,
    now: datetime,
    rng: random.Random,
) -> policy.Verdict | None:
    """The verdict on the first row of a key that is not acknowledged; None when it was not even sent."""
    answer = state.answers.get(head.position) if head is not None else None
    if head is None or answer is None or answer.refusal is None:
        return None
    failure, times = answer.refusal.failure, head.attempts + 1
    before = paused.get(head.topic)
    if failure.of_destination:
        if before is not None and before.until > now:
            return Pause(before.until)  # another key of the same page said so already
        times = before.times + 1 if before is not None else 1
    verdict = policy.verdict(failure, times, state.rules.retry, now, rng)
    if isinstance(verdict, Pause):
        paused[head.topic] = Paused(verdict.until, times, failure, answer.refusal.text)
    return verdict


def _sentence(
    state: State,
    head: Row,
    followers: tuple[Row, ...],
    decision: Retry | Bury,
    *,
    now: datetime,
) -> Hold | Burial:
    refusal = state.answers[head.position].refusal
    assert refusal is not None  # noqa: S101  only refused heads come here
    attempts = head.attempts + 1
    if isinstance(decision, Retry):
        return Hold(
            row=head,
            failure=refusal.failure,
            text=refusal.text,
            attempts=attempts,
            delay=decision.at - now,
            followers=followers,
        )
    return Burial(
        row=head,
        failure=refusal.failure,
        text=refusal.text,
        attempts=attempts,
        fate=decision.followers,
        followers=followers,
    )


def _evidence(state: State, rows: Sequence[Row]) -> list[Evidence]:
    by_topic: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.position):
        by_topic[row.topic].append(row)
    return [
        Evidence(
            topic=topic,
            outcome="published",
            rows=group,
            partitions=[state.answers[row.position].partition for row in group],
            offsets=[state.answers[row.position].offset for row in group],
        )
        for topic, group in by_topic.items()
    ]


def _expiries(state: State) -> list[Evidence]:
    by_topic: dict[str, list[Row]] = defaultdict(list)
    for row in state.expired:
        by_topic[row.topic].append(row)
    return [
        Evidence(topic=topic, outcome="expired", rows=group, partitions=[-1] * len(group), offsets=[-1] * len(group))
        for topic, group in by_topic.items()
    ]


def _acknowledged(state: State, row: Row) -> bool:
    answer = state.answers.get(row.position)
    return answer is not None and answer.refusal is None


def _by_key(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_key_of(row)].append(row)
    return list(groups.values())


def _key_of(row: Row) -> tuple[str, bytes | int]:
    """What keeps its order together: (topic, key); a row without a key only itself."""
    return row.topic, row.position if row.key is None else row.key
