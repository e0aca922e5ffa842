"""Codecs: how an event becomes bytes and bytes become an event.

**Writing a codec.** One module with ``codec() -> Codec`` and one entry point in the group ``outboxkit.codecs`` named as
users write it in ``@event(…, codec=…)``. Encoding happens inside the user's transaction, so every refusal must name the
field. Decoding meets hostile bytes: whatever they are, the only error is `DecodeError` (or `IncompatibleSchema`).
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, Protocol, cast

from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from outboxkit.events import EventType
    from outboxkit.message import Message

__all__ = ["Codec", "Encoded", "Resolve", "codec_named"]

Resolve = "Callable[[str], str]"  #: schema text for a fingerprint or id; raises SchemaNotFound

_GROUP: Final = "outboxkit.codecs"


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded event.

    Attributes:
        payload: the bytes.
        content_type: media type (``application/json``, ``avro/binary``).
        schema: fingerprint of the writer's schema, empty when the codec has none.
    """

    payload: bytes
    content_type: str
    schema: str = ""


class Codec(Protocol):
    """One encoding."""

    def encode(self, value: object, event_type: EventType) -> Encoded:
        """Encodes an event.

        Raises:
            EncodeError: the value does not fit, with the field path.
        """
        ...

    def decode(self, message: Message, event_type: EventType, resolve: Callable[[str], str]) -> object:
        """Decodes a payload into plain data, as the reader's contract sees it; `from_plain` makes the event of it.

        Args:
            message: payload, content type and writer's schema fingerprint.
            event_type: the reader's contract.
            resolve: gives the writer's schema text for the fingerprint or id that the message names.

        Raises:
            DecodeError: the bytes are not what they should be, with path and offset.
            IncompatibleSchema: the reader's schema cannot read this writer's.
            SchemaNotFound: the writer's schema is unknown.
        """
        ...

    def schema_text(self, event_type: EventType) -> str | None:
        """The contract's schema as text, None when this codec has no schemas."""
        ...


def codec_named(name: object) -> Codec:
    """The codec of that name; what is no name is a codec already (``@event(…, codec=AvroCodec(…))``).

    Raises:
        ConfigurationError: no such codec, or its extra is missing.
    """
    return _found(name) if isinstance(name, str) else cast("Codec", name)


@functools.cache
def _found(name: str) -> Codec:
    known = {point.name: point.value for point in entry_points(group=_GROUP)}
    if name not in known:
        raise ConfigurationError(f"there is no codec {name!r}; expected one of {', '.join(sorted(known))}")
    try:
        found: Codec = importlib.import_module(known[name]).codec()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the codec {name} needs the module {error.name}; install it: pip install 'outboxkit[{name}]'",
        ) from error
    return found
