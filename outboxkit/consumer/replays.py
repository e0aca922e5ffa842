"""Replays on their way in: a header that asks for one is a fact to check, not a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy import LargeBinary, Uuid, func, literal, select

from outboxkit import dead_letters, dialects, tables
from outboxkit.consumer import retries
from outboxkit.dead_letters import State
from outboxkit.headers import LETTER

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from outboxkit.brokers import Delivery
    from outboxkit.message import Message

__all__ = ["is_replay", "took_parked_place"]

_SENT: Final = (State.REPLAYING, State.REPLAYED)


def is_replay(connection: Connection, consumer: str, message: Message) -> bool:
    """True if a letter was replayed to this consumer as this message, with this content.

    Anybody may write the header; what cannot be proved is an ordinary message. Where this login does not see the
    letters of others, the database answers.

    Transaction: joins the caller's; only reads. Index used: the primary key of ``dead_letters``.
    """
    try:
        number = UUID(message.header(LETTER) or "")
    except ValueError:
        return False
    letter = dead_letters.get(connection, number)
    if letter is None and dialects.hidden(connection, [tables.dead_letters.name]):
        return _is_hidden_replay(connection, number, consumer, message)
    if letter is None or letter.state not in _SENT or consumer != (letter.replay_to or letter.consumer):
        return False
    return (letter.topic, letter.payload or b"") == (message.topic, message.payload)


def _is_hidden_replay(connection: Connection, number: UUID, consumer: str, message: Message) -> bool:
    texts = [literal(name.encode("utf-8", "replace"), LargeBinary) for name in (consumer, message.topic)]
    told = func.outboxkit_is_replay(literal(number, Uuid), *texts, literal(message.payload, LargeBinary))
    return connection.scalar(select(told)) is True


def took_parked_place(session: Session, consumer: str, delivery: Delivery) -> bool:
    """Puts the replay of a parked head in its place, before what waits behind it; False when it is none.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``.
    """
    number = next((value for name, value in delivery.headers if name == LETTER), None)
    if number is None:
        return False
    try:
        letter = dead_letters.get(session.connection(), UUID(number.decode("ascii")))
    except ValueError:
        return False
    if letter is None or letter.state is not State.REPLAYING or consumer != (letter.replay_to or letter.consumer):
        return False
    if (letter.payload or b"") != (delivery.payload or b""):
        return False
    return retries.take_parked_place(session, consumer, delivery, {one for one in (letter.id, letter.parent_id) if one})
