"""Misuse is refused where it is given, by name, and never becomes another behaviour in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypedDict
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, ForeignKey, create_engine, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column

from outboxkit import (
    Backoff,
    CaptureError,
    ChangeCapture,
    ConfigurationError,
    DecodeError,
    EncodeError,
    Outbox,
    OutboxKitError,
    OutboxMixin,
    RetryPolicy,
    Rollout,
    SchemaError,
    bulk,
    context,
    event,
    full_jitter,
    migrations,
    outbox,
    publish,
    send,
    tables,
)
from outboxkit.capture import commit_hooks
from outboxkit.dead_letters import Terms, replay
from outboxkit.errors import InboxConflict
from outboxkit.events import event_type
from outboxkit.guards import CircuitRule
from outboxkit.headers import unpack_headers
from outboxkit.message import Message, MessageLimits
from outboxkit.outbox import pauses
from outboxkit.policy import Followers, duration
from tests.sqlite_template import copied

NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001  that is the point
ID = UUID("0192d3a4-0000-7000-8000-000000000001")


class Region(str, Enum):  # noqa: UP042  as applications of ten years have it
    EU = "eu"


class Size(IntEnum):
    LARGE = 3


class Lane(StrEnum):
    FAST = "fast"


class Base(DeclarativeBase):
    pass


class Item(OutboxMixin, Base):
    __tablename__ = "items"
    __outbox__ = Outbox(topic="items", key=lambda item: item.value())
    id: Mapped[int] = mapped_column(primary_key=True)

    def value(self) -> Any:
        return self.__dict__["given"]


@event("thing.happened")
@dataclass(frozen=True)
class Happened:
    what: str = "it"


def create_tables(connection: Connection) -> None:
    Base.metadata.create_all(connection)
    migrations.upgrade(connection)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    engine = create_engine(copied(tmp_path / "app.db", create_tables))
    with Session(engine) as opened:
        yield opened
        opened.rollback()
    engine.dispose()


def only_row(session: Session) -> Any:
    session.flush()
    return session.execute(select(tables.outbox_messages)).one()


# --- the verbs ---------------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[..., object]] = {
    "publish": lambda session, **options: publish(session, Happened(), topic="t", **options),
    "send": lambda session, **options: send(session, Happened(), to="q", **options),
    "emit": lambda _session, **options: Item(id=1).emit(Happened(), **options),
}

every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@every_verb
@pytest.mark.parametrize("option", ["kye", "dealy", "header", "expire", "unique", "ttl", "correlation_id"])
def test_a_misspelt_option_is_a_type_error_and_nothing_is_stored(session: Session, verb: Any, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        verb(session, **{option: "1"})

    assert not session.new


@every_verb
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("key", 1.5),
        ("key", Decimal("1.0")),
        ("key", True),
        ("key", ("a", "b")),
        ("key", object()),
        ("headers", {"x": None}),
        ("headers", {"x": 1.5}),
        ("headers", {"x": ["a"]}),
        ("headers", {1: "x"}),
        ("headers", {"": "x"}),
        ("headers", {"line\nbreak": "x"}),
        ("headers", {"n" * 250: "x"}),
        ("headers", [("x", "y")]),
        ("delay", 5),
        ("delay", "5"),
        ("delay", "soon"),
        ("delay", "-5m"),
        ("delay", timedelta(seconds=-1)),
        ("delay", "99999999999999999d"),
        ("delay", datetime.now(UTC)),
        ("expires", 3),
        ("expires", "soon"),
        ("expires", timedelta(0)),
        ("expires", NAIVE),
        ("expires", datetime.max.replace(tzinfo=timezone(timedelta(hours=-9)))),
        ("at", "tomorrow"),
        ("at", 1),
        ("at", date(2030, 1, 1)),
        ("at", NAIVE),
        ("at", timedelta(hours=1)),
        ("unique_key", ""),
        ("unique_key", object()),
        ("source", 7),
        ("source", "s" * 1025),
        ("type", "other.thing"),
        ("type", 7),
    ],
    ids=repr,
)
def test_an_argument_of_another_kind_is_refused_by_name(session: Session, verb: Any, option: str, value: Any) -> None:
    with pytest.raises(OutboxKitError) as caught:
        verb(session, **{option: value})

    assert option in str(caught.value) or "header" in str(caught.value) or "ordering key" in str(caught.value)
    assert not session.new


@pytest.mark.parametrize("topic", ["t" * 250, "ü" * 125, "two\nlines", "nul\0", 7, None], ids=repr)
def test_a_destination_that_no_broker_takes_is_refused(session: Session, topic: Any) -> None:
    with pytest.raises(CaptureError):
        publish(session, Happened(), topic=topic)
    with pytest.raises(CaptureError):
        send(session, Happened(), to=topic)
    with pytest.raises(CaptureError, match="receiver"):
        send(session, Happened(), to="")


@every_verb
@pytest.mark.parametrize(
    "name",
    [
        "ce_id",
        "CE_Type",
        "cloudEvents:id",
        "CLOUDEVENTS_source",
        "outboxkit-replay-for",
        "Outboxkit-Replay-For",
        "outboxkit-anything",
        "content-type",
        "Content-Type",
    ],
)
def test_header_names_that_the_library_writes_are_refused_in_every_verb_and_spelling(
    session: Session, verb: Any, name: str
) -> None:
    with pytest.raises(EncodeError, match="reserved"):
        verb(session, headers={name: "forged"})
    with pytest.raises(ConfigurationError, match="reserved"):
        Outbox(topic="t", headers={name: "forged"})
    forged = Message(id=str(uuid4()), type="t", topic="t", payload=b"", headers=((name, b"forged"),))
    with pytest.raises(EncodeError, match="reserved"):
        outbox.write(session.connection(), [forged])
    with pytest.raises(EncodeError, match="reserved"):
        outbox.schedule(session.connection(), [(forged, timedelta(1))])


KEYS: list[tuple[Any, bytes]] = [
    ("eu", b"eu"),
    (b"\x00\xff", b"\x00\xff"),
    (7, b"7"),
    (-7, b"-7"),
    (ID, str(ID).encode()),
    (Region.EU, b"eu"),
    (Size.LARGE, b"3"),
    (Lane.FAST, b"fast"),
    (date(2026, 1, 2), b"2026-01-02"),
    (NAIVE, b"2030-01-01T00:00:00"),
    (datetime(2026, 1, 2, 3, tzinfo=UTC), b"2026-01-02T03:00:00+00:00"),
    (datetime(2026, 1, 2, 5, tzinfo=timezone(timedelta(hours=2))), b"2026-01-02T03:00:00+00:00"),
]


@pytest.mark.parametrize(("value", "expected"), KEYS, ids=[repr(value) for value, _ in KEYS])
def test_a_key_has_one_form_wherever_it_is_given(session: Session, value: Any, expected: bytes) -> None:
    item = Item(id=1)
    item.__dict__["given"] = value
    session.add(item)
    item.emit(Happened())
    item.emit(Happened(), key=value)
    publish(session, Happened(), topic="t", key=value)
    send(session, Happened(), to="t", key=value, headers={"x": value})
    session.flush()

    rows = session.execute(select(tables.outbox_messages)).all()
    assert [row.key for row in rows] == [expected] * 4
    assert dict(unpack_headers(rows[-1].headers))["x"] == expected


@pytest.mark.parametrize("value", [1.5, True, Decimal(1), ("a", 1), [1], object()], ids=repr)
def test_a_models_key_of_another_kind_is_refused_and_named(session: Session, value: Any) -> None:
    item = Item(id=1)
    item.__dict__["given"] = value
    session.add(item)
    item.emit(Happened())

    with pytest.raises(CaptureError, match=r"expected a str, bytes, int, UUID"):
        session.flush()


def test_durations_are_read_from_text_in_every_verb(session: Session) -> None:
    publish(session, Happened(), topic="t", expires="1h")
    row = only_row(session)
    assert timedelta(minutes=59) < row.expires_at - row.recorded_at < timedelta(minutes=61)

    send(session, Happened(), to="q", delay="5m")
    session.flush()
    waiting = session.execute(select(tables.outbox_waiting)).one()
    assert timedelta(minutes=4) < waiting.due_at - waiting.recorded_at < timedelta(minutes=6)


def test_durations_are_read_from_text_by_operators_verbs_too(session: Session) -> None:
    connection, target = session.connection(), pauses.Target(pauses.Scope.DESTINATION, "t")
    pauses.pause(connection, target, by="me", reason="r", lasts="5m")
    (pause,) = pauses.pauses(connection)
    assert pause.until is not None
    assert timedelta(minutes=4) < pause.until - pause.since < timedelta(minutes=6)

    assert Terms(inbox_retention="1d", absence="2h").absence == timedelta(hours=2)  # type: ignore[arg-type]
    assert CircuitRule(window="30s", open_for="5s").window == timedelta(seconds=30)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, "5", "soon", "-5m", timedelta(0)], ids=repr)
def test_a_duration_that_is_none_is_refused_by_operators_verbs_by_name(session: Session, value: Any) -> None:
    connection, target = session.connection(), pauses.Target(pauses.Scope.DESTINATION, "t")
    with pytest.raises(ConfigurationError, match="lasts"):
        pauses.pause(connection, target, by="me", reason="r", lasts=value)
    with pytest.raises(ConfigurationError, match="inbox_retention"):
        replay(connection, [], by="me", why="w", inbox_retention=value)


def test_a_trace_that_the_application_gives_is_not_given_twice(session: Session) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    publish(session, Happened(), topic="t", headers={"traceparent": trace})

    assert [name for name, _ in unpack_headers(only_row(session).headers)].count("traceparent") == 1


@pytest.mark.parametrize("name", [7, "c" * 1025, "nul\0"], ids=repr)
def test_a_conversation_or_producer_that_cannot_be_written_is_refused(name: Any) -> None:
    with pytest.raises(CaptureError), context.correlation(name):
        pass
    with pytest.raises(CaptureError), context.producing(name):
        pass


# --- what a model says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"topic": 1},
        {"topic": "t" * 250},
        {"key": 1},
        {"key": ""},
        {"key": ()},
        {"key": ("id", 1)},
        {"key": b"id"},
        {"key": id},
        {"source": 1},
        {"headers": {"x": None}},
        {"headers": "x"},
        {"limits": 5},
        {"bulk": "alow"},
        {"bulk": None},
        {"changes": {"created"}},
        {"changes": True},
    ],
    ids=repr,
)
def test_a_route_is_checked_where_it_is_written_down(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"Outbox.{next(iter(options))}"):
        Outbox(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": {"create"}},
        {"kinds": "created"},
        {"kinds": ()},
        {"kinds": [1]},
        {"coalesce": "commit"},
        {"name": 1},
        {"include": "total"},
        {"exclude": "secret"},
        {"exclude": [1]},
    ],
    ids=repr,
)
def test_what_is_captured_is_checked_where_it_is_written_down(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"ChangeCapture.{next(iter(options))}"):
        ChangeCapture(**options)


@pytest.mark.parametrize("option", [{"capture": {"created"}}, {"include": ["a"]}, {"coalesce": "flush"}], ids=repr)
def test_a_route_does_not_take_what_belongs_to_change_capture(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Outbox(topic="t", **option)


@pytest.mark.parametrize(
    "route",
    [
        Outbox(topic="t", key="idd"),
        Outbox(topic="t", key=("id", "idd")),
        Outbox(topic="t", changes=ChangeCapture(exclude={"secrte"})),
        Outbox(topic="t", changes=ChangeCapture(include={"id", "secrte"})),
        {"topic": "t"},
        "t",
    ],
    ids=["key", "part of a key", "exclude", "include", "a mapping", "a text"],
)
def test_a_route_that_names_what_the_model_does_not_have_is_refused_when_it_is_mapped(route: Any) -> None:
    class Own(DeclarativeBase):
        pass

    class Wrong(OutboxMixin, Own):
        __tablename__ = "wrong"
        __outbox__ = route
        id: Mapped[int] = mapped_column(primary_key=True)
        secret: Mapped[str]

    with pytest.raises(ConfigurationError, match="Wrong"):
        configure_mappers()
    Own.registry.dispose()


def test_a_route_without_the_mixin_would_emit_nothing_and_is_refused() -> None:
    class Own(DeclarativeBase):
        pass

    class Forgetful(Own):
        __tablename__ = "forgetful"
        __outbox__ = Outbox(topic="t", changes=ChangeCapture())
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ConfigurationError, match="OutboxMixin"):
        configure_mappers()
    Own.registry.dispose()


def test_an_event_that_would_have_to_be_awaited_is_refused(session: Session) -> None:
    async def make() -> Happened:
        return Happened()

    with pytest.raises(CaptureError, match="plain function"):
        publish(session, make, topic="t")


def test_a_class_instead_of_an_event_is_refused(session: Session) -> None:
    with pytest.raises(EncodeError):
        publish(session, Happened, topic="t")


def test_a_base_classes_route_may_name_what_only_some_models_have() -> None:
    class Own(OutboxMixin, DeclarativeBase):
        __outbox__ = Outbox(topic="t", changes=ChangeCapture(exclude={"secret"}))

    class With(Own):
        __tablename__ = "with"
        id: Mapped[int] = mapped_column(primary_key=True)
        secret: Mapped[str]

    class Without(Own):
        __tablename__ = "without"
        id: Mapped[int] = mapped_column(ForeignKey("with.id"), primary_key=True)

    configure_mappers()
    Own.registry.dispose()


@pytest.mark.parametrize("where", ["statement", "session"])
def test_a_rule_for_bulk_statements_that_does_not_exist_is_refused(session: Session, where: str) -> None:
    options = {"outbox_bulk": "alow"} if where == "statement" else {}
    session.info.update({"outbox_bulk": "alow"} if where == "session" else {})

    with pytest.raises(CaptureError, match="'raise', 'warn', 'allow'"):
        session.execute(delete(Item), execution_options=options)


def test_parameters_are_for_inserts_only(session: Session) -> None:
    with pytest.raises(CaptureError, match="insert"):
        bulk(session, delete(Item), lambda _: Happened(), [{"id": 1}])


@pytest.mark.parametrize("bound", [-1, 1.5, "1", True, None], ids=repr)
@pytest.mark.parametrize("name", ["payload", "header_count", "header_bytes", "key"])
def test_a_limit_that_is_no_size_is_refused(name: str, bound: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        MessageLimits(**{name: bound})


def test_hints_are_given_for_an_engine_by_a_function() -> None:
    engine = create_engine("sqlite://")

    with pytest.raises(ConfigurationError, match="expected an Engine"):
        commit_hooks.on_commit(Session(engine), lambda: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="function"):
        commit_hooks.on_commit(engine, "wake")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="sqlite cannot notify"):
        commit_hooks.notify(engine)
    engine.dispose()


# --- event classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        (7, {}),
        (Happened, {}),  # @event without parentheses
        ("n" * 250, {}),
        ("two\nlines", {}),
        ("a.b", {"version": 0}),
        ("a.b", {"version": "1"}),
        ("a.b", {"version": 1.0}),
        ("a.b", {"version": True}),
        ("a.b", {"codec": "jsn"}),
        ("a.b", {"codec": object()}),
        ("a.b", {"schema": 7}),
        ("a.b", {"rollout": 0.5}),
    ],
    ids=repr,
)
def test_a_contract_is_checked_at_the_decorator(name: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        event(name, **options)(type("Any", (), {}))


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.5", None, True, float("nan")], ids=repr)
def test_a_share_is_checked_at_the_rollout(share: Any) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        Rollout(Happened, share=share)


def test_a_rollouts_previous_version_must_be_an_event() -> None:
    with pytest.raises(ConfigurationError):
        Rollout("happened", share=0.5)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="not an event"):
        event("thing.happened", version=2, rollout=Rollout(Item, share=0.5))


class Tuple(NamedTuple):
    a: int


class Typed(TypedDict):
    a: int


@pytest.mark.parametrize("cls", [Tuple, Typed, Region, str, dict, list, int, "text", None], ids=repr)
def test_a_class_that_no_handler_could_read_back_is_refused_at_the_decorator(cls: Any) -> None:
    with pytest.raises(ConfigurationError):
        event("a.b")(cls)


def test_a_dataclass_with_slots_above_the_decorator_is_the_class_that_comes_back() -> None:
    @dataclass(slots=True)
    @event("a.b")
    class Slotted:
        a: int

    assert event_type(Slotted).cls is Slotted
    assert event_type(Slotted(1)).cls is Slotted


# --- policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [ValueError, (ValueError,), [ValueError], {ValueError}, frozenset({ValueError})])
def test_poison_adds_to_what_is_always_poison(poison: Any) -> None:
    policy = RetryPolicy(poison=poison)

    assert {DecodeError, SchemaError, InboxConflict, ValueError} == set(policy.poison_classes)
    assert isinstance(policy.poison, tuple)


@pytest.mark.parametrize(
    "options",
    [
        {"poison": "ValueError"},
        {"poison": ("ValueError",)},
        {"poison": ValueError("x")},
        {"poison": (int,)},
        {"poison": None},
        {"immediate": -1},
        {"immediate": 1.5},
        {"immediate": "2"},
        {"immediate": True},
        {"delayed": 3},
        {"delayed": "1s"},
        {"followers": "later"},
    ],
    ids=repr,
)
def test_a_retry_policy_is_checked_where_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"RetryPolicy.{next(iter(options))}"):
        RetryPolicy(**options)


def test_choices_are_read_from_their_text() -> None:
    assert RetryPolicy(followers="skip").followers is Followers.SKIP  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"base": "1s", "cap": "500ms", "attempts": 1},
        {"base": timedelta(0), "cap": "1s", "attempts": 1},
        {"base": 1, "cap": "1s", "attempts": 1},
        {"base": "1s", "cap": "1s", "attempts": -1},
        {"base": "1s", "cap": "1s", "attempts": 1.5},
        {"base": "1s", "cap": "1s", "attempts": True},
    ],
    ids=repr,
)
def test_a_backoff_is_checked_where_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Backoff(**options)


def test_a_backoff_reads_durations_as_text() -> None:
    assert Backoff(base="1s", cap="5m", attempts=8) == full_jitter("1s", cap="5m", attempts=8)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="attempts"):
        full_jitter("1s", cap="5m", attempts=0)


@pytest.mark.parametrize(
    "value", ["", "5", "5 weeks", "-1s", "0s", "1e3s", "\u0665s", "9" * 400 + "d", 5, 5.0, None], ids=repr
)
def test_a_duration_is_a_timedelta_or_a_text_with_a_unit(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"duration|timedelta"):
        duration(value)
