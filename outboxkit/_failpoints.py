"""Named places at which a test makes the process die, fail or stand still. Without `enable` they do nothing.

The environment is not read here: a command that wants failpoints hands the text of ``OUTBOXKIT_FAILPOINTS`` to
`enable`.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from outboxkit.errors import ConfigurationError

__all__ = ["NAMES", "Crash", "FailpointHit", "disable", "enable", "failpoint"]

NAMES: Final = (
    # relay
    "claim.before_commit",
    "claim.after_commit",
    "publish.before_send",
    "publish.after_send",
    "publish.after_ack",
    "settle.before_commit",
    "settle.after_commit",
    "lease.renew",
    "dead.before_insert",
    "dead.after_insert",
    # consumer
    "recv",
    "attempt.recorded",
    "inbox.inserted",
    "handler.before",
    "handler.after",
    "commit.before",
    "commit.after",
    "ack.before",
    "ack.after",
    "retry.scheduled",
    "dlq.before",
    "dlq.after",
    # replay
    "replay.claimed",
    "replay.written",
    "replay.planned",
    "replay.decided",
    "replay.advanced",
)

_EXIT_STATUS: Final = 137  # as after SIGKILL: no handler, no finally, no flush
_ACTIONS: Final = ("crash", "exit", "raise", "stop")

_armed: dict[str, tuple[str, int]] = {}


class FailpointHit(Exception):
    """A failpoint with the action ``raise`` was reached."""


class Crash(BaseException):
    """A failpoint with the action ``crash`` was reached; like the end of a process, nothing handles it."""


def enable(text: str) -> None:
    """Arms failpoints: ``name=action`` or ``name=action:n`` (at the n-th hit), separated by commas.

    Args:
        text: as in ``commit.after=exit:2,ack.before=raise``; ``exit`` ends the process at once, ``raise`` raises,
            ``crash`` raises what no `except Exception` sees, for a test in one process,
            ``stop`` is SIGSTOP: somebody outside can look at what is there, and kill it or let it go on.

    Raises:
        ConfigurationError: an unknown name or action.
    """
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = item.partition("=")
        action, _, count = rest.partition(":")
        if name not in NAMES or action not in _ACTIONS or not (count or "1").isdigit():
            raise ConfigurationError(f"expected failpoint=action[:count] with one of {', '.join(NAMES)}, got {item!r}")
        _armed[name] = (action, int(count or "1"))


def disable() -> None:
    """Disarms all of them."""
    _armed.clear()


def failpoint(name: str) -> None:
    """Marks a place; does nothing unless it was armed."""
    if name not in _armed:
        return
    action, left = _armed[name]
    _armed[name] = (action, left - 1)
    if left == 1:
        if action == "exit":
            os._exit(_EXIT_STATUS)
        if action == "crash":
            raise Crash(name)
        if action == "raise":
            raise FailpointHit(name)
        signal.raise_signal(signal.SIGSTOP)  # to this thread: sent to the process, it would stop a moment later
