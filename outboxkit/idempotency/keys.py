"""Idempotency keys with stored outcomes: one key, one effect, one answer, however often the request comes.

The key's row, the effect and the outcome are committed together. So a holder that crashes leaves nothing behind, a
caller that waits behind it takes over, and no lease must run out. Source of the rules for clients: the IETF draft "The
Idempotency-Key HTTP Header Field".
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, delete, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outboxkit import dialects, tables
from outboxkit._sql import database_now
from outboxkit.dialects import DatabaseTrouble, insert_ignoring, naming_missing_tables
from outboxkit.errors import (
    ConfigurationError,
    EncodeError,
    IdempotencyConflict,
    IdempotencyInProgress,
    IdempotencyOutcomeUnknown,
)
from outboxkit.policy import duration

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import ColumnElement, Connection
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["Call", "Idempotent", "Outcome", "idempotent"]

_KEYS: Final = tables.outbox_idempotency
MAX_KEY: Final = 255  #: characters of a key and of a scope
MAX_OUTCOME_BYTES: Final = 1 << 20  #: an answer to repeat, not a place to store documents
_MAX_TRIES: Final = 10  # each means that another transaction rolled back between two statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to a request, to be given again.

    Attributes:
        status: HTTP status; jobs may leave it.
        headers: name and value, in order.
        body: bytes.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def pack(self) -> bytes:
        """Packs the outcome into one value of a column.

        Raises:
            EncodeError: it is larger than 1 MiB.
        """
        packed = json.dumps([self.status, self.headers, b64encode(self.body).decode()]).encode()
        if len(packed) > MAX_OUTCOME_BYTES:
            raise EncodeError(
                f"an outcome has at most {MAX_OUTCOME_BYTES:,} bytes, got {len(packed):,}: keep a reference"
            )
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Outcome:
        """Restores what `pack` made."""
        status, headers, body = json.loads(packed)
        return cls(status=status, headers=tuple((name, value) for name, value in headers), body=b64decode(body))


@dataclass(slots=True)
class Call:
    """One call under a key.

    Attributes:
        stored: the outcome of an earlier call: give it, and do nothing else; None when this is the first.
    """

    stored: Outcome | None
    _outcome: Outcome | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """True when the effect is still to be made, in this transaction."""
        return self.stored is None

    def finish(self, outcome: Outcome) -> Outcome:
        """Keeps the outcome for later calls, and returns it. Without it the key stays free at the end of the block."""
        self._outcome = outcome
        return outcome


def idempotent(
    session: Session | AsyncSession,
    key: str,
    *,
    scope: str,
    request: bytes | None = None,
    ttl: timedelta | str = "24h",
    wait: timedelta | str = "5s",
) -> Idempotent:
    """Runs a block once for each key: ``with`` for a Session, ``async with`` for an AsyncSession.

    End the block without `Call.finish` where the request was wrong: then it may be corrected and sent again under the
    same key.

    Transaction: joins the session's, which must hold the effect too; does not commit.
    Guarantee: effect and outcome are committed together or not at all; of two calls at once the second waits, and
        takes over if the first one fails or dies.

    Writes: ``outbox_idempotency``. Locks: the key's row, until the caller's transaction ends.

    Args:
        session: whose transaction holds the effect.
        key: the caller's, at most 255 characters.
        scope: who calls what: the caller's account, method and path; keys of different scopes never meet.
        request: its bytes: another request under the same key is refused. None is not compared.
        ttl: how long the outcome is kept, by the database's clock.
        wait: longest wait for another call under the key that is under way.

    Raises:
        ConfigurationError: an empty or too long key or scope, or a wrong duration; at the beginning of the block: the
            tables are missing.
        IdempotencyInProgress: (at the beginning of the block) another call is under way; for HTTP: 409.
        IdempotencyConflict: another request came under this key; for HTTP: 422.
        IdempotencyOutcomeUnknown: an earlier call committed in its middle; nobody knows how it ended.
        EncodeError: (at the end of the block) the outcome is too large.
    """
    for name, text in (("key", key), ("scope", scope)):
        if not text or len(text) > MAX_KEY or "\0" in text:
            raise ConfigurationError(f"an idempotency {name} has 1 to {MAX_KEY} characters, and no NUL")
    digest = None if request is None else hashlib.sha256(request).digest()
    return Idempotent(session, _Key(scope, key, digest), ttl=duration(ttl), wait=duration(wait))


@dataclass(frozen=True, slots=True)
class _Key:
    scope: str
    key: str
    digest: bytes | None

    def where(self) -> ColumnElement[bool]:
        return and_(_KEYS.c.scope == self.scope, _KEYS.c.key == self.key)


class Idempotent:
    """The block of `idempotent`."""

    __slots__ = ("_call", "_key", "_session", "_ttl", "_wait")

    def __init__(self, session: Session | AsyncSession, key: _Key, *, ttl: timedelta, wait: timedelta) -> None:
        self._session, self._key, self._ttl, self._wait = session, key, ttl, wait
        self._call = Call(None)

    def __enter__(self) -> Call:
        if not isinstance(self._session, Session):
            raise ConfigurationError("idempotent of an AsyncSession needs `async with`")
        return self._begin(self._session)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(self._session, Session) and error is None:
            self._end(self._session)

    async def __aenter__(self) -> Call:
        if isinstance(self._session, Session):
            raise ConfigurationError("idempotent of a Session needs `with`")
        return await self._session.run_sync(self._begin)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(self._session, Session) and error is None:
            await self._session.run_sync(self._end)

    @naming_missing_tables()
    def _begin(self, session: Session) -> Call:
        connection = session.connection()
        values = {"scope": self._key.scope, "key": self._key.key, "request_hash": self._key.digest}
        insert = insert_ignoring(connection, _KEYS).values(**values, expires_at=database_now(self._ttl))
        expired = delete(_KEYS).where(self._key.where(), _KEYS.c.expires_at < database_now())
        known = select(_KEYS.c.request_hash, _KEYS.c.outcome).where(self._key.where())
        found = None
        with self._patience(connection):
            for _ in range(_MAX_TRIES):
                connection.execute(expired)
                if connection.execute(insert.returning(_KEYS.c.key)).one_or_none() is not None:
                    return self._call
                if (found := connection.execute(known).one_or_none()) is not None:
                    break
        if found is None:
            raise self._in_progress()
        self._call = Call(self._outcome_of(found.request_hash, found.outcome))
        return self._call

    def _outcome_of(self, digest: bytes | None, outcome: bytes | None) -> Outcome:
        if None not in (digest, self._key.digest) and digest != self._key.digest:
            raise IdempotencyConflict(
                f"{self._key.scope}: another request came under this idempotency key; a new request needs a new key"
            )
        if outcome is None:
            raise IdempotencyOutcomeUnknown(
                f"{self._key.scope}: an earlier call under this idempotency key committed before it had ended, so "
                "nobody knows its outcome; look for its effect, then delete the key's row"
            )
        return Outcome.unpack(bytes(outcome))

    def _end(self, session: Session) -> None:
        if not self._call.first:
            return
        outcome = self._call._outcome  # noqa: SLF001  the two are one thing
        if outcome is None:
            session.connection().execute(delete(_KEYS).where(self._key.where()))
            return
        session.flush()
        done = update(_KEYS).where(self._key.where()).values(outcome=outcome.pack())
        if session.connection().execute(done).rowcount != 1:
            raise IdempotencyOutcomeUnknown(
                f"{self._key.scope}: the row of the idempotency key is gone before the commit: the block must not roll "
                "back; use session.begin_nested() for what may fail"
            )

    @contextmanager
    def _patience(self, connection: Connection) -> Generator[None]:
        """Waits for another call no longer than was asked."""
        try:
            with dialects.lock_patience(connection, self._wait):
                yield
        except DBAPIError as error:
            if dialects.trouble_of(error) is DatabaseTrouble.BUSY:
                raise self._in_progress() from error
            raise

    def _in_progress(self) -> IdempotencyInProgress:
        return IdempotencyInProgress(
            f"{self._key.scope}: another call under this idempotency key is under way; try again in a moment",
            retry_after=self._wait,
        )
