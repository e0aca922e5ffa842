"""Progress: where a letter's replay is, and why nobody has closed it yet."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, func, literal, select

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters.letter import DeadLetter, Side, State

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["LATE", "is_relay_alive", "is_running", "why_open"]

LATE: Final = timedelta(minutes=5)  #: a replay that nobody has closed for so long is told with the reason


def why_open(connection: Connection, letter: DeadLetter) -> str:
    """Says where the replay of a letter is; empty when the letter is not being replayed.

    Transaction: joins the caller's; reads only. Index used: none of the outbox and the waiting rooms.
    """
    if letter.state is not State.REPLAYING:
        return ""
    row_id, receiver = outbox.stored_id(letter.message_id), letter.replay_to or letter.consumer
    hot, waiting = tables.outbox_messages.c, tables.outbox_waiting.c
    if connection.execute(select(hot.position).where(hot.message_id == row_id).limit(1)).first():
        return "in the outbox" + ("" if is_relay_alive(connection) else ": no relay is alive")
    if found := connection.execute(select(waiting.reason).where(waiting.message_id == row_id).limit(1)).first():
        return f"in the relay's waiting room ({found.reason})"
    if letter.side is Side.RELAY:
        return "its relay is asked to bring it back" + ("" if is_relay_alive(connection) else ": no relay is alive")
    room = tables.inbox_waiting.c
    here = and_(room.consumer == receiver, room.topic == letter.topic, room.payload == letter.payload)
    same = here if letter.key is None else and_(here, room.key == letter.key)
    if found := connection.execute(select(room.attempts, room.reason).where(same).limit(1)).first():
        return f"{receiver} tries it again ({found.attempts} attempts so far)"
    return f"published, and {receiver} has not handled it" + (
        "" if is_running(connection, receiver) else f": no process of {receiver} is known to run"
    )


def is_relay_alive(connection: Connection) -> bool:
    """Tells whether a relay holds a lease on this database.

    Transaction: joins the caller's; reads only.
    """
    alive = tables.outbox_relays.c.expires_at > database_now()
    return connection.execute(select(literal(1)).where(alive).limit(1)).first() is not None


def is_running(connection: Connection, consumer: str) -> bool:
    """Tells whether a process of a consumer has a heartbeat.

    Transaction: joins the caller's; reads only.
    """
    starts = tables.inbox_consumers.c
    running = and_(starts.consumer == consumer, starts.expires_at > database_now(), starts.stopped_at.is_(None))
    return bool(connection.execute(select(func.count()).where(running)).scalar_one())
