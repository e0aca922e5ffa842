"""Routes: where the events of a model go, and which of its changes are events by themselves.

Both are values of a class, checked when they are written down; what only the mapping knows (that the columns exist) is
checked when SQLAlchemy configures the mapper.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from sqlalchemy import event as listeners
from sqlalchemy.orm import Mapper

from outboxkit.capture.keys import KeyValue, header_pairs, name_of
from outboxkit.errors import CaptureError, ConfigurationError, EncodeError
from outboxkit.message import Headers, MessageLimits

__all__ = ["BULK_RULES", "ChangeCapture", "KeyOf", "Outbox", "captures_changes", "route_of"]

BulkRule = Literal["raise", "warn", "allow"]
ChangeKind = Literal["created", "updated", "deleted"]
Coalesce = Literal["transaction", "flush"]
KeyOf = str | Sequence[str] | Callable[[Any], KeyValue | None] | None

BULK_RULES: Final[tuple[str, ...]] = get_args(BulkRule)
_KINDS: Final[tuple[ChangeKind, ...]] = get_args(ChangeKind)
_LIMITS: Final = MessageLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeCapture:
    """Choice of the changes that are events without `emit`: ``Outbox(topic="orders", changes=ChangeCapture())``.

    Attributes:
        kinds: the changes that are told; all three by default.
        name: what their types begin with: ``order`` for ``order.created``; the class's name in lower case when empty.
        include: the columns that they tell of; all when None.
        exclude: columns that they never tell of.
        coalesce: one event per object and ``transaction`` (a savepoint's begin and end cut it), or per ``flush``.

    Raises:
        ConfigurationError: a choice is not one of those above, or names of columns are not a collection of text.
    """

    kinds: Collection[ChangeKind] = _KINDS
    name: str = ""
    include: Collection[str] | None = None
    exclude: Collection[str] = ()
    coalesce: Coalesce = "transaction"

    def __post_init__(self) -> None:
        kinds = _names("ChangeCapture(kinds=…)", self.kinds)
        if not kinds or not kinds <= set(_KINDS):
            raise ConfigurationError(f"ChangeCapture(kinds=…) takes some of {_listed(_KINDS)}, got {self.kinds!r}")
        _choice("ChangeCapture(coalesce=…)", self.coalesce, get_args(Coalesce))
        _name("ChangeCapture(name=…)", self.name)
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "exclude", _names("ChangeCapture(exclude=…)", self.exclude))
        if self.include is not None:
            object.__setattr__(self, "include", _names("ChangeCapture(include=…)", self.include))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """Route of the events of a model: ``__outbox__ = Outbox(topic="orders", key="id")``.

    Attributes:
        topic: the destination; the event's type when empty.
        key: the ordering key: a column's name, several (joined by ``/``), or a function of the object, read after the
            flush. None keeps no order. Values are text, bytes, int, UUID, date, or an Enum with such a value.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        headers: added to every message.
        limits: bounds that every message must keep.
        bulk: what happens to a bulk UPDATE, DELETE or INSERT of the ORM, which emits nothing:
            see `outboxkit.capture.bulk_statements`.
        changes: which changes are events without `emit`; none when None.

    Raises:
        ConfigurationError: an argument is of another kind, or a header's name is reserved.
    """

    topic: str = ""
    key: KeyOf = None
    source: str = ""
    headers: Mapping[str, KeyValue] = field(default_factory=dict)
    limits: MessageLimits = _LIMITS
    bulk: BulkRule = "raise"
    changes: ChangeCapture | None = None
    pairs: Headers = field(init=False, repr=False, compare=False)  # the headers as a message has them

    def __post_init__(self) -> None:
        _name("Outbox(topic=…)", self.topic)
        _name("Outbox(source=…)", self.source)
        _choice("Outbox(bulk=…)", self.bulk, BULK_RULES)
        _kind("Outbox(limits=…)", self.limits, MessageLimits)
        if self.changes is not None:
            _kind("Outbox(changes=…)", self.changes, ChangeCapture)
        object.__setattr__(self, "key", _key(self.key))
        try:
            object.__setattr__(self, "pairs", header_pairs(self.headers))
        except (CaptureError, EncodeError) as error:
            raise ConfigurationError(f"Outbox(headers=…): {error.message}") from error


def route_of(cls: type) -> Outbox:
    """Finds the route of the events of a model.

    Raises:
        CaptureError: it does not say.
    """
    found = getattr(cls, "__outbox__", None)
    if not isinstance(found, Outbox):
        raise CaptureError(f"{cls.__qualname__} does not say where its events go: __outbox__ = Outbox(topic=…, key=…)")
    return found


_capturing: Final[weakref.WeakSet[type]] = weakref.WeakSet()


def captures_changes() -> bool:
    """Whether any model of this process captures changes; while none does, flushes are not looked at."""
    return len(_capturing) > 0


@listeners.listens_for(Mapper, "mapper_configured")
def _check_against_the_mapping(mapper: Mapper[Any], cls: type) -> None:
    """Refuses a route that names what the model does not have, before the first message depends on it."""
    route = getattr(cls, "__outbox__", None)
    if route is None:
        return
    if not isinstance(route, Outbox):
        raise ConfigurationError(f"{cls.__qualname__}.__outbox__ is a {type(route).__qualname__}; expected an Outbox")
    if not callable(getattr(cls, "emit", None)):
        raise ConfigurationError(
            f"{cls.__qualname__} has an __outbox__ but no OutboxMixin, so nothing would be emitted"
        )
    if route.changes is not None:
        _capturing.add(cls)
    if "__outbox__" not in vars(cls):
        return  # of a base class: its names may be those of other models
    keys = () if route.key is None or callable(route.key) else [route.key] if isinstance(route.key, str) else route.key
    if unknown := [name for name in keys if not hasattr(cls, name)]:
        raise ConfigurationError(f"{cls.__qualname__} has no {_listed(unknown)}, which its Outbox(key=…) names")
    columns = {one.key for known in mapper.self_and_descendants for one in known.column_attrs}
    if route.changes is not None and (unknown := sorted(_named(route.changes) - columns)):
        raise ConfigurationError(f"{cls.__qualname__} has no column {_listed(unknown)}, which its ChangeCapture names")


def _named(changes: ChangeCapture) -> set[str]:
    return {*(changes.include or ()), *changes.exclude}


# --- arguments ---------------------------------------------------------------------------------------------------


def _key(key: Any) -> KeyOf:
    if key is None or (callable(key) and not inspect.isbuiltin(key)):
        return key
    names = (key,) if isinstance(key, str) else key
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigurationError(
            f"Outbox(key=…) takes a column's name, a list of them, or a function of the object; got {key!r}"
        )
    return key if isinstance(key, str) else tuple(names)


def _name(what: str, value: object) -> None:
    try:
        name_of(value, what)
    except CaptureError as error:
        raise ConfigurationError(error.message) from error


def _names(what: str, value: object) -> frozenset[str]:
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise ConfigurationError(f"{what} takes a collection of names, got {value!r}")
    if wrong := [name for name in value if not isinstance(name, str)]:
        raise ConfigurationError(f"{what} takes names as text, got {wrong[0]!r}")
    return frozenset(value)


def _choice(what: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigurationError(f"{what} is one of {_listed(allowed)}, got {value!r}")


def _kind(what: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise ConfigurationError(f"{what} takes a {expected.__qualname__}, got {value!r}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names)
