"""The guard around calls of other services: a decorator, a context manager, or `Guard.call`; plain or asynchronous."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from outboxkit import context
from outboxkit.errors import ConfigurationError, GuardRefused
from outboxkit.guards.policy import GuardLimits, Refused, State
from outboxkit.policy import Backoff, duration

if TYPE_CHECKING:
    from outboxkit.guards.circuit_breaker import CircuitRule

__all__ = ["Guard", "GuardReport", "guard", "remaining", "report"]

F = TypeVar("F", bound=Callable[..., Any])

_log: Final = logging.getLogger(__name__)
_guards: Final[dict[str, Guard]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardReport:
    """Counts of a guard in this process.

    Attributes:
        name: of the guard.
        circuit: ``closed``, ``open`` or ``half-open``.
        running: calls under way.
        succeeded: calls that did.
        failed: calls that did not, each try counted.
        refused: calls that were not made.
        fallbacks: answers of the fallback.
    """

    name: str
    circuit: str
    running: int
    succeeded: int
    failed: int
    refused: int
    fallbacks: int


def guard(
    name: str,
    *,
    timeout: timedelta | str | None = None,
    retry: Backoff | None = None,
    breaker: CircuitRule | None = None,
    bulkhead: int | None = None,
    rate: float | None = None,
    fallback: Callable[[Exception], Any] | None = None,
    on: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Guard:
    """Makes a guard for the calls of one dependency; its state is shared by everything in this process that uses it.

    Around a function: fallback, then retry, then the limits of each try. As a context manager it has the limits only.
    Retry only what is safe to repeat: hand an idempotency key on.

    Args:
        name: of the dependency: in logs, metrics and errors.
        timeout: time for one try; what remains of a handler's deadline shortens it.
        retry: delays between tries, with full jitter.
        breaker: when to leave the dependency alone.
        bulkhead: calls at a time, from 1.
        rate: calls a second, above 0.
        fallback: answers instead, given the error.
        on: errors that count as failures of the dependency; others pass, and count as success.

    Raises:
        ConfigurationError: the name is taken, or a number is out of range.
    """
    errors = on if isinstance(on, tuple) else (on,)
    _check(name, retry, fallback, errors)
    limits = GuardLimits(
        timeout=None if timeout is None else duration(timeout, name="guard(timeout=…)"),
        circuit=breaker,
        bulkhead=bulkhead,
        rate=rate,
    )
    _guards[name] = Guard(name, limits, retry=retry, fallback=fallback, on=errors)
    return _guards[name]


def _check(name: object, retry: object, fallback: object, errors: tuple[object, ...]) -> None:
    if not isinstance(name, str) or not name or name in _guards:
        raise ConfigurationError(f"a guard needs a name of its own, got {name!r}; share the guard object instead")
    if not isinstance(retry, Backoff | None):
        raise ConfigurationError(f"guard(retry=…) takes a Backoff, got {retry!r}")
    if fallback is not None and not callable(fallback):
        raise ConfigurationError(f"guard(fallback=…) takes a function of the error, got {fallback!r}")
    if not all(isinstance(one, type) and issubclass(one, Exception) for one in errors):
        raise ConfigurationError(f"guard(on=…) takes one class of exceptions or a tuple of them, got {errors!r}")


def report() -> list[GuardReport]:
    """Reports every guard of this process, by name."""
    return [_guards[name].report() for name in sorted(_guards)]


class Guard:
    """Calls of one dependency, and their limits; made by `guard`."""

    def __init__(
        self,
        name: str,
        limits: GuardLimits,
        *,
        retry: Backoff | None,
        fallback: Callable[[Exception], Any] | None,
        on: tuple[type[Exception], ...],
    ) -> None:
        self.name, self._state = name, State(limits)
        self._retry, self._fallback, self._on = retry, fallback, on
        self._caught: tuple[type[Exception], ...] = (GuardRefused, *on)
        self._lock = threading.Lock()
        self._rng = random.Random()  # noqa: S311  jitter needs no secrecy
        self._counts = dict.fromkeys(("succeeded", "failed", "refused", "fallbacks"), 0)

    def __repr__(self) -> str:
        return f"Guard({self.name!r})"

    def __call__(self, function: F) -> F:
        """Guards a function."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def asynchronous(*args: Any, **options: Any) -> Any:
                return await self._attempts(functools.partial(function, *args, **options))

            return cast("F", asynchronous)

        @functools.wraps(function)
        def plain(*args: Any, **options: Any) -> Any:
            return self.call(function, *args, **options)

        return cast("F", plain)

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Calls a plain function under the guard.

        A plain call cannot be interrupted: give the client `remaining()` as its time-out. One that takes longer than
        its time counts as a failure of the dependency, and its result is returned.

        Raises:
            GuardRefused: a limit was met, and there is no fallback.
            Exception: the last error of the call, when there is no fallback.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                with self.limits():
                    return function(*args, **options)
            except self._caught as error:
                delay = self._next(error, attempt)
                if delay is None:
                    return self._answer(error)
            time.sleep(delay.total_seconds())

    @contextmanager
    def limits(self) -> Iterator[timedelta | None]:
        """Holds one call to the limits; gives its time, None for no limit.

        Raises:
            GuardRefused: a limit was met: the block is not entered.
        """
        allowed = self._begin()
        began, failed = _now(), True
        until = None if allowed is None else began + allowed
        try:
            with context.bounded(until):
                yield allowed
            failed = until is not None and _now() > until
        except BaseException as error:
            failed = isinstance(error, self._on)
            raise
        finally:
            self._end(failed=failed)

    def report(self) -> GuardReport:
        """Reports what this guard did in this process."""
        with self._lock:
            return GuardReport(
                name=self.name, circuit=self._state.circuit(_now()).value, running=self._state.running, **self._counts
            )

    async def _in_time(self, make: Callable[[], Awaitable[Any]]) -> Any:
        with self.limits() as allowed:
            async with asyncio.timeout(None if allowed is None else allowed.total_seconds()):
                return await make()  # made here: a coroutine that is never awaited is a warning

    async def _attempts(self, make: Callable[[], Awaitable[Any]]) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._in_time(make)
            except self._caught as error:
                delay = self._next(error, attempt)
                if delay is None:
                    answer = self._answer(error)
                    return await answer if inspect.isawaitable(answer) else answer
            await asyncio.sleep(delay.total_seconds())

    def _begin(self) -> timedelta | None:
        with self._lock:
            allowed = self._state.begin(_now(), context.deadline())
            if isinstance(allowed, Refused):
                self._counts["refused"] += 1
        if isinstance(allowed, Refused):
            raise GuardRefused(
                f"{self.name}: not called, because of its {allowed.why}; try again in {_seconds(allowed.retry_after)}",
                guard=self.name,
                retry_after=allowed.retry_after,
            )
        return allowed

    def _end(self, *, failed: bool) -> None:
        with self._lock:
            before = self._state.circuit(_now())
            self._state.end(_now(), failed=failed)
            after = self._state.circuit(_now())
            self._counts["failed" if failed else "succeeded"] += 1
        if before is not after:
            _log.warning("guard.circuit", extra={"guard": self.name, "was": before.value, "state": after.value})

    def _next(self, error: Exception, attempt: int) -> timedelta | None:
        """The delay before the next try; None when there is none."""
        if self._retry is None or attempt > self._retry.attempts or isinstance(error, GuardRefused):
            return None
        delay = self._retry.delay(attempt, self._rng)
        until = context.deadline()
        return delay if until is None or _now() + delay < until else None

    def _answer(self, error: Exception) -> Any:
        if self._fallback is None:
            raise error
        with self._lock:
            self._counts["fallbacks"] += 1
        return self._fallback(error)


def remaining() -> timedelta | None:
    """The time that is left for the current call or handler; None when nothing bounds it, zero when it is over."""
    until = context.deadline()
    return None if until is None else max(timedelta(0), until - _now())


def _now() -> datetime:
    return datetime.now(UTC)


def _seconds(time: timedelta) -> str:
    return f"{time.total_seconds():.1f} s"
