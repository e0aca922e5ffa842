"""The janitor: deletes what its retention no longer keeps, a little at a time, on a thread of its own.

Of all relays the one that owns the first shard cleans up. It skips what others have locked, its transactions are short,
and it uses a connection of its own: publishing does not notice. ``outboxkit prune`` stays for people.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, ProgrammingError

from outboxkit import tables
from outboxkit_relay.store import retention

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outboxkit_relay.settings import Retention

__all__ = ["Janitor"]

_log: Final = logging.getLogger(__name__)

_PORTION: Final = 1_000  # rows in one transaction
_REST: Final = 0.05  # seconds between two of them


class Janitor:
    """Cleans up while the block runs.

    Args:
        engine: of the database.
        kept: how long each table is kept, and how often it is looked at.
        relay: tells the fencing token of the relay that it belongs to; None before it has joined.
    """

    def __init__(self, engine: Engine, kept: Retention, relay: Callable[[], UUID | None]) -> None:
        self._engine, self._kept, self._relay = engine, kept, relay
        self._forbidden: set[str] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outboxkit-janitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._kept.every.total_seconds()):
            for name in retention.PRUNED:
                self._clean(name)

    def _clean(self, name: str) -> None:
        """Deletes from one table until nothing is left to delete; a database that is away is no news here."""
        total, deleted = 0, _PORTION
        try:
            while deleted >= _PORTION and name not in self._forbidden and self._is_mine():
                with self._engine.begin() as connection:
                    deleted = retention.prune_table(connection, self._kept, name, limit=_PORTION)
                total += deleted
                if self._ending.wait(_REST):
                    return
        except ProgrammingError as error:
            self._forbidden.add(name)
            _log.warning("cleanup.not_allowed", extra={"table": name, "error": type(error.orig).__name__})
        except DBAPIError:
            return
        if total:
            _log.debug("cleanup.done", extra={"table": name, "rows": total})

    def _is_mine(self) -> bool:
        """Whether this relay owns the first shard."""
        relay, shards = self._relay(), tables.outbox_shards.c
        with self._engine.connect() as connection:
            owner = connection.execute(select(shards.owner).order_by(shards.shard).limit(1)).scalar_one_or_none()
        return relay is not None and owner == relay
