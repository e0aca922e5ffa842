"""Wake-up: listens for the hints of writers, on a connection of its own. Polling goes on, whatever happens here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy.exc import DBAPIError

from outboxkit.dialects import dialect_of
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["Listener"]

_log: Final = logging.getLogger(__name__)

_LOOK_UP: Final = 0.25  # seconds: so soon it sees that it should end
_REST: Final = 1.0  # seconds between two tries to connect


class Listener:
    """Calls a function for each hint while the block runs.

    Args:
        engine: of a database that can notify, not through a pooler.
        wake: is called for each hint, and once after each connecting: what came before was missed.

    Raises:
        ConfigurationError: the database cannot notify.
    """

    def __init__(self, engine: Engine, wake: Callable[[], None]) -> None:
        if not dialect_of(engine).features.notifies:
            raise ConfigurationError(f'{engine.dialect.name} cannot notify: use relay.wake = "poll"')
        self._engine, self._wake = engine, wake
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outboxkit-wakeup", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        away = False
        while not self._ending.is_set():
            try:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.exec_driver_sql("LISTEN outboxkit")
                    driver: Any = connection.connection.driver_connection
                    connection.detach()  # what listens must not serve others
                    away = False
                    self._listen(driver)
            except DBAPIError as error:
                if not away:
                    _log.warning("wakeup.away", extra={"error": type(error.orig or error).__name__})
                away = True
                self._ending.wait(_REST)

    def _listen(self, driver: Any) -> None:
        self._wake()
        while not self._ending.is_set():
            try:
                hints = list(driver.notifies(timeout=_LOOK_UP, stop_after=1))
            except (driver.OperationalError, driver.InterfaceError) as error:
                raise DBAPIError("listening for hints", None, error) from error
            if hints:
                self._wake()
