"""The relay daemon and the command line of outboxkit.

Reading order: `core` decides what a relay does next, without I/O; `store` is the SQL that only relays need; `daemon`
carries the decisions out, in threads; `observe` tells people and machines how it goes; `dashboard` is the page, `cli`
the command ``outboxkit``. `settings` is read by all of them.

    async with Relay(load()) as relay: ...

runs a relay inside an application.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from outboxkit_relay.daemon.embedded import Relay
    from outboxkit_relay.settings import load

__all__ = ["Relay", "load"]

_HOMES: Final = {"Relay": "outboxkit_relay.daemon.embedded", "load": "outboxkit_relay.settings"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command that needs no relay does not load one."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
