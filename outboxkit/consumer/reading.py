"""Reading: what a delivery is, whether this consumer wants it, and under which id. Never raises.

A message without a type is no message of another type. It is read where that can be told: by `Consumer(type_of=…)`,
in a structured CloudEvent, by the routing key, or because its topic has one contract only. Else it is unreadable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from outboxkit import dead_letters, inbox
from outboxkit.consumer import crash_marker, envelopes
from outboxkit.consumer.handlers import is_framed
from outboxkit.consumer.protocol import Failed, Job, Standing
from outboxkit.dead_letters import Stage
from outboxkit.errors import ConfigurationError, DecodeError, OutboxKitError
from outboxkit.headers import REPLAY_FOR, from_wire
from outboxkit.message import Message
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.brokers import Delivery
    from outboxkit.consumer.handlers import Handler, Handlers
    from outboxkit.consumer.retries import WaitingDelivery

__all__ = ["Cause", "Expired", "Extractor", "Ordering", "Reading", "Subject", "extractor_of", "message_of"]

Extractor = Callable[[Message, "Delivery"], object]


class Ordering(StrEnum):
    """Order that is kept."""

    KEY = "key"  #: that of each key
    NONE = "none"  #: none: every message is handled by itself


class Expired(StrEnum):
    """Treatment of a message whose ``ce_expirytime`` is over."""

    SKIP = "skip"  #: acknowledged and counted
    DEAD = "dead"  #: a dead letter
    HANDLE = "handle"  #: handled as if it were in time


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a job failed: how far it came, and the error."""

    stage: Stage
    error: BaseException


@dataclass(frozen=True, slots=True)
class Subject:
    """A job with its message as far as it can be read, its handler, and its row in the waiting room.

    ``candidates`` are the handlers among which the schema that the payload's frame names will decide.
    """

    message: Message | None
    handler: Handler | None = None
    waiting: WaitingDelivery | None = None
    candidates: tuple[Handler, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Rules by which a consumer reads deliveries.

    Attributes:
        handlers: by topic and type.
        queues: the command queues among its sources: there the routing key is the queue's name.
        in_order: whether messages of one key keep their order.
        message_id: finds the id of a foreign message without one.
        type_of: finds the type of a foreign message.
        expired: what happens to messages whose time is over.
    """

    handlers: Handlers
    queues: tuple[str, ...] = ()
    in_order: bool = True
    message_id: Extractor | None = None
    type_of: Extractor | None = None
    expired: Expired = Expired.SKIP

    def job(self, delivery: Delivery, waiting: WaitingDelivery | None, now: datetime) -> Job:
        """Returns what the consumer has to do with a delivery. What cannot be read is told in the job."""
        facts: dict[str, Any] = {
            "delivery": delivery,
            "identity": crash_marker.identity(delivery),
            "lane": (delivery.topic, delivery.key) if self.in_order and delivery.key is not None else None,
            "room_id": waiting.id if waiting else None,
            "spent": waiting.attempts if waiting else 0,
            "first_failed_at": waiting.first_failed_at if waiting else None,
        }
        message: Message | None = None
        try:
            message = message_of(delivery)
            if (told := self._type(message, delivery)) != message.type:
                message = replace(message, type=told)
            handler = self.handlers.find(delivery.topic, message.type, message.dataschema)
            candidates = () if handler or message.type else self._of_topic(message)
            if handler is None and not candidates:
                return self._ignored(facts, message, waiting)
            if len(candidates) == 1:
                handler, candidates = candidates[0], ()
            message = self._named(message, handler, delivery)
            return self._timely(facts, Subject(message, handler, waiting, candidates), now)
        except Exception as error:  # noqa: BLE001  the boundary around headers and the user's extractors
            kept = message and _without_identity(message)
            fault = Failed(failure=Failure.POISON, cause=Cause(Stage.READ, error))
            return Job(standing=Standing.UNREADABLE, fault=fault, subject=Subject(kept, None, waiting), **facts)

    def _type(self, message: Message, delivery: Delivery) -> str:
        if self.type_of is not None and (found := _asked("type_of", self.type_of, message, delivery)):
            return found
        routing_key = delivery.routing_key or ""
        return message.type or (routing_key if routing_key not in (delivery.topic, *self.queues) else "")

    def _of_topic(self, message: Message) -> tuple[Handler, ...]:
        """The handlers of a message without a type: that of the topic's only contract, or those a frame may name."""
        known = [handler for handler in self.handlers if handler.topic == message.topic]
        contracts = tuple(handler for handler in known if handler.event_type is not None)
        if len(known) == len(contracts) == 1 or (contracts and is_framed(message)):
            return contracts
        names = ", ".join(sorted(handler.pattern for handler in known))
        raise DecodeError(
            f"the message has no type, and {message.topic} has {len(known)} handlers here ({names}): let the producer "
            "send ce_type, or give the Consumer type_of=…, or handle what has no type by on('*')"
        )

    def _named(self, message: Message, handler: Handler | None, delivery: Delivery) -> Message:
        """The message under the type of its contract, with an id that the inbox can keep."""
        found = message.id
        if not found and self.message_id is not None:
            found = _asked("message_id", self.message_id, message, delivery)
        if not found:
            raise DecodeError("the message has no id: nothing tells it from its copies; give the Consumer message_id=…")
        if fault := inbox.fault_of(found, message.source):
            raise DecodeError(fault)
        if found == message.id and message.type:
            return message  # as a rule
        return replace(message, id=found, type=message.type or (handler.pattern if handler else ""))

    def _ignored(self, facts: dict[str, Any], message: Message, waiting: WaitingDelivery | None) -> Job:
        return Job(standing=Standing.IGNORED, subject=Subject(message, None, waiting), **facts)

    def _timely(self, facts: dict[str, Any], subject: Subject, now: datetime) -> Job:
        expires = subject.message.expires_at if subject.message else None
        if expires is None or expires > now or self.expired is Expired.HANDLE:
            is_plain = subject.message is None or subject.message.header(REPLAY_FOR) is None
            shares = is_plain and not subject.candidates
            return Job(subject=subject, shares=shares, **facts)
        if self.expired is Expired.SKIP:
            return Job(standing=Standing.EXPIRED, subject=subject, **facts)
        error = OutboxKitError(f"the message expired at {expires.isoformat()}, before it was handled")
        fault = Failed(failure=Failure.POISON, cause=Cause(Stage.READ, error))
        return Job(standing=Standing.UNREADABLE, fault=fault, subject=subject, **facts)


def message_of(delivery: Delivery) -> Message:
    """Returns the message of a delivery, in binary or structured mode.

    Raises:
        DecodeError: an attribute, the envelope or the encoding cannot be read.
    """
    if delivery.fault is not None:  # the client could not read its envelope
        raise DecodeError(delivery.fault)
    headers, payload = delivery.headers, envelopes.unpacked(delivery)
    if envelopes.is_structured(headers):
        headers, payload = envelopes.unwrap(headers, payload)
    return from_wire(delivery.topic, delivery.key, headers, payload)


def extractor_of(name: str, given: Callable[..., object] | Literal["place"] | None) -> Extractor | None:
    """Returns a user's extractor as a function of message and delivery.

    Raises:
        ConfigurationError: not a function of one or two parameters.
    """
    if given is None:
        return None
    if given == "place" and name == "message_id":
        return _place
    if not callable(given):
        known = "a function or 'place'" if name == "message_id" else "a function"
        raise ConfigurationError(f"{name} is {known}, not {given!r}")
    try:
        inspect.signature(given).bind(None)
    except TypeError:
        return given
    return lambda message, _delivery: given(message)


def _place(_message: Message, delivery: Delivery) -> str:
    if delivery.offset is None:
        raise DecodeError(f"message_id='place' needs a broker that has places; {delivery.origin} has none")
    return f"{delivery.topic}/{delivery.partition}/{delivery.offset}"


def _asked(name: str, extractor: Extractor, message: Message, delivery: Delivery) -> str:
    try:
        found = extractor(message, delivery)
    except OutboxKitError:
        raise
    except Exception as error:
        raise DecodeError(f"{name}=… raised {dead_letters.words_of(error)}") from error
    if found is None:
        return ""
    if not isinstance(found, str):
        raise DecodeError(f"{name}=… returned {type(found).__name__}, expected str")
    return found


def _without_identity(message: Message) -> Message:
    return (
        message if not inbox.fault_of(message.id, message.source) and message.id else replace(message, id="", source="")
    )
