"""Quarantine: what operators asked for, carried out by the relay that owns the shard.

Operators only *record* a request on a stopped key; the relay that owns its shard carries it out between two pages, so
that a release cannot race the reader.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select, update

from outboxkit import outbox, tables, waiting
from outboxkit.message import unpack_headers

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection, Row

__all__ = ["carry_out_requests"]

_log: Final = logging.getLogger(__name__)

_STOPPED: Final = tables.outbox_stopped_keys
_LETTERS: Final = tables.dead_letters


def carry_out_requests(connection: Connection, shards: Collection[int]) -> None:
    """Repairs or releases stopped keys of these shards, as recorded in ``outbox_stopped_keys.request``.

    ``repair``: the dead head that is being replayed returns to its old position, in front of its followers.
    ``release`` and ``skip``: the followers go on without the head, which stays dead.

    Transaction: the caller's, fenced.
    """
    asked = select(_STOPPED.c.topic, _STOPPED.c.key, _STOPPED.c.position, _STOPPED.c.request).where(
        _STOPPED.c.shard.in_(sorted(shards)),
        _STOPPED.c.request.is_not(None),
    )
    for topic, key, position, request in connection.execute(asked).all():
        letter = _replaying(connection, topic, key, position) if request == "repair" else None
        if letter is not None:
            row = outbox.stored(
                connection,
                message_id=letter.message_id,
                topic=topic,
                key=key,
                type_name=letter.type,
                kind=letter.kind,
                payload=letter.payload,
                headers=tuple(unpack_headers(letter.headers)),
            )
            waiting.bring_back(connection, position, row)
            closed = {"state": "replayed", "closed_at": tables.database_now()}
            connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter.id).values(**closed))
        else:
            waiting.go_on(connection, [(topic, key)])
        _log.info("key.released", extra={"topic": topic, "request": request, "position": position})


def _replaying(connection: Connection, topic: str, key: bytes, position: int) -> Row[Any] | None:
    letter = select(_LETTERS).where(
        _LETTERS.c.side == "relay",
        _LETTERS.c.state == "replaying",
        _LETTERS.c.topic == topic,
        _LETTERS.c.key == key,
        _LETTERS.c.position == position,
    )
    return connection.execute(letter).first()
