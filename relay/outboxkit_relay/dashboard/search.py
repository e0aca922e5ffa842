"""Search: what people type into the page's search field, as a value. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from outboxkit.errors import ConfigurationError
from outboxkit.outbox.pauses import unescaped
from outboxkit.policy import duration
from outboxkit.rows import WaitReason

__all__ = ["DEAD", "PENDING", "STATES", "Search", "parse"]

PENDING: Final = "pending"
DEAD: Final = "dead"
STATES: Final = (PENDING, WaitReason.RETRY.value, WaitReason.FOLLOWER.value, WaitReason.SCHEDULED.value, DEAD)

_TERM: Final = re.compile(r'(?:(?P<name>[a-z]+):)?(?P<value>"[^"]*"|\S+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The messages that are looked for; None means any.

    Attributes:
        state: one of `STATES`.
        topic: where it goes.
        type: of the event or command.
        key: the ordering key.
        id: of the message.
        age: at least so old.
    """

    state: str | None = None
    topic: str | None = None
    type: str | None = None
    key: bytes | None = None
    id: str | None = None
    age: timedelta | None = None


def parse(text: str) -> Search:
    """Reads ``topic:orders key:"a b" state:dead age:>5m``; a word alone is an id, or a key.

    Raises:
        ConfigurationError: a term that means nothing here; it says which ones do.
    """
    found: dict[str, Any] = {}
    for term in _TERM.finditer(text):
        value = term["value"].strip('"')
        name = term["name"] or ("id" if _is_uuid(value) else "key")
        if name not in _READERS:
            raise ConfigurationError(f"{name}: is not searched for; there are {', '.join(_READERS)}")
        if name in found:
            raise ConfigurationError(f"{name}: is given twice")
        found[name] = _READERS[name](value)
    return Search(**found)


def _state(value: str) -> str:
    if value not in STATES:
        raise ConfigurationError(f"state:{value} is none; there are {', '.join(STATES)}")
    return value


def _age(value: str) -> timedelta:
    return duration(value.removeprefix(">"))


def _is_uuid(value: str) -> bool:
    try:
        UUID(value)
    except ValueError:
        return False
    return True


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    **{field.name: str for field in fields(Search)},
    "state": _state,
    "key": unescaped,
    "age": _age,
}
