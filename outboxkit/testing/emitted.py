"""The outbox as a test sees it: the committed messages, and assertions whose failures show them.

Only what is committed counts, because only that would be published. Delayed messages count as well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from sqlalchemy import Connection, Engine, Table, select

from outboxkit import tables
from outboxkit.avro import fingerprint
from outboxkit.avro.model.parse import parse
from outboxkit.capture.keys import KeyValue, key_bytes
from outboxkit.codecs import codec_named
from outboxkit.consumer.handlers import decode
from outboxkit.errors import CodecError, DecodeError, SchemaError
from outboxkit.events import EventType, event_type, versions_of
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.message import Kind, Message

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy.orm import Session

__all__ = ["EmittedMessages", "is_unfinished"]

T = TypeVar("T")

_MAX_SHOWN: Final = 20  # a failure is read by a person
_MAX_CHARACTERS: Final = 200  # of one event
_UNFINISHED: Final = (
    "the outbox_session has changes that are not committed, and only what is committed is published: "
    "commit() or rollback() first"
)


class EmittedMessages:
    """The outbox of a test database.

    Args:
        engine: of the database.
        session: the test's own session: while it has changes that are not committed, no question is answered.
    """

    def __init__(self, engine: Engine, session: Session | None = None) -> None:
        self._engine, self._session = engine, session

    @property
    def messages(self) -> list[Message]:
        """Committed messages that are not published, in the order of the outbox; delayed ones last.

        Transaction: opens its own; only reads.

        Raises:
            AssertionError: the test has not ended its transaction, so that the answer would be about another state.
        """
        __tracebackhide__ = True
        if self._session is not None and is_unfinished(self._session):
            raise AssertionError(_UNFINISHED)
        with self._engine.connect() as connection:
            return [
                *_stored(connection, tables.outbox_messages, "position"),
                *_stored(connection, tables.outbox_waiting, "id"),
            ]

    def events(self, what: type[T]) -> list[T]:
        """The events of one class, decoded, in order.

        Raises:
            CodecError: a message of that type cannot be read as this class.
        """
        contract = event_type(what)
        return [_event(message, contract) for message in self.messages if message.type == contract.name]

    @overload
    def assert_emitted(
        self, what: type[T], *, key: KeyValue | EllipsisType | None = ..., topic: str = "", **fields: object
    ) -> T: ...

    @overload
    def assert_emitted(
        self, what: str, *, key: KeyValue | EllipsisType | None = ..., topic: str = "", **fields: object
    ) -> Mapping[str, Any]: ...

    def assert_emitted(
        self, what: Any, *, key: KeyValue | EllipsisType | None = ..., topic: str = "", **fields: object
    ) -> Any:
        """Asserts that one message fits, and returns the event of the first that does.

        Args:
            what: the event class, or the type's name; then the event is a mapping.
            key: its ordering key; None asserts that it has none. Not looked at when left out.
            topic: its destination; not looked at when empty.
            fields: values of the event's fields; other fields are not looked at.

        Raises:
            AssertionError: none fits; the text shows every message and what is different about it.
        """
        __tracebackhide__ = True
        contract = event_type(what) if isinstance(what, type) else EventType(name=what)
        messages = self.messages
        shown = []
        for message in messages:
            event, differences = _compared(message, contract, key, topic)
            differences += [] if event is None else list(_different_fields(event, fields))
            if event is not None and not differences:
                return event
            shown.append(_line(message, event, differences))
        wanted: dict[str, object] = {"topic": topic} if topic else {}
        wanted |= ({} if key is ... else {"key": _text(key)}) | fields
        with_ = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise AssertionError(f"no {contract.name}{f' with {with_}' if with_ else ''} was emitted; {_found(shown)}")

    def assert_nothing_emitted(self) -> None:
        """Asserts that no message is committed.

        Raises:
            AssertionError: some are; the text shows them.
        """
        __tracebackhide__ = True
        if messages := self.messages:
            raise AssertionError(f"expected no message; {_found([_line(message) for message in messages])}")


def is_unfinished(session: Session) -> bool:
    """Whether the session has changes that nobody else sees yet, as far as it and SQLite's driver know."""
    if session.new or session.dirty or session.deleted:
        return True
    transaction = session.get_transaction()
    if transaction is None or not transaction.is_active:
        return False
    driver = session.connection().connection.driver_connection
    return bool(getattr(driver, "in_transaction", False))


def _found(lines: Sequence[str]) -> str:
    more = [f"  … and {len(lines) - _MAX_SHOWN} more"] if len(lines) > _MAX_SHOWN else []
    text = "\n".join([f"the outbox holds {len(lines)}:", *lines[:_MAX_SHOWN], *more])
    return text if lines else "the outbox is empty"


def _stored(connection: Connection, table: Table, order: str) -> Iterator[Message]:
    for row in connection.execute(select(table).order_by(table.c[order])):
        message = from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)
        yield replace(message, kind=Kind(row.kind), recorded_at=row.recorded_at)


def _event(message: Message, contract: EventType) -> Any:
    if contract.cls is dict:
        if "json" not in message.content_type:
            raise DecodeError(f"it is {message.content_type}: give the event class instead of its name")
        return json.loads(message.payload)
    # In a test the class that reads is the class that wrote, or its rollout's previous version is.
    texts = [codec_named(one.codec).schema_text(one) or "" for one in versions_of(contract)]
    own = next((text for text in texts if text and fingerprint(parse(text)).hex() == message.schema), texts[0])
    return decode(message, contract, lambda _: own)


def _compared(message: Message, contract: EventType, key: Any, topic: str) -> tuple[Any, list[str]]:
    """The event if the message is of this type and can be read, and what is different about its envelope."""
    if message.type != contract.name:
        return None, []
    differences = []
    if topic and message.topic != topic:
        differences.append(f"topic is {message.topic!r}, expected {topic!r}")
    if key is not ... and _text(key) != _text(message.key):
        differences.append(f"key is {_text(message.key)!r}, expected {_text(key)!r}")
    try:
        return _event(message, contract), differences
    except (CodecError, SchemaError) as error:
        return None, [f"cannot be read: {error}"]


def _different_fields(event: Any, fields: Mapping[str, object]) -> Iterator[str]:
    for name, expected in fields.items():
        is_there, found = (name in event, event.get(name)) if isinstance(event, dict) else _attribute(event, name)
        if not is_there:
            yield f"there is no field {name!r}"
        elif found != expected:
            yield f"{name} is {found!r}, expected {expected!r}"


def _attribute(event: object, name: str) -> tuple[bool, object]:
    missing = object()
    found = getattr(event, name, missing)
    return found is not missing, found


def _line(message: Message, event: object = None, differences: Sequence[str] = ()) -> str:
    body = message.payload.decode("utf-8", "replace") if event is None else repr(event)
    body = body if len(body) <= _MAX_CHARACTERS else f"{body[:_MAX_CHARACTERS]}…"
    why = f"  ← {'; '.join(differences)}" if differences else ""
    return f"  {message.type}  topic={message.topic!r}  key={_text(message.key)!r}  {body}{why}"


def _text(key: Any) -> str | None:
    return None if key is None else key_bytes(key).decode("utf-8", "backslashreplace")
