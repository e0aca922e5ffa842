"""Rollouts: a new version of an event goes to a share of the keys, the previous version to all others.

Both versions are encoded at emit, so an event that the previous version cannot represent is rejected for every key, not
only for keys outside the share. Which version goes out depends on the key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from outboxkit.codecs import Encoded, codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import DecodeError, EncodeError, SchemaError
from outboxkit.events import EventType, check_share, event_type
from outboxkit.message import Message

__all__ = ["EncodedVersion", "Versions", "encode", "in_share"]

EncodedVersion = tuple[EventType, Encoded]  #: an event in one of its versions

_STEPS: Final = 2**32


class Versions(tuple[EncodedVersion, ...]):
    """An event in every version that may go out, the newest first; without a rollout there is one."""

    __slots__ = ()

    def version_for(self, key: bytes) -> EncodedVersion:
        """Chooses the version for a key: the newest one whose rollout takes it.

        Raises:
            ConfigurationError: a share that a function says is not a number between 0 and 1.
        """
        for contract, encoded in self[:-1]:
            share = 1.0 if contract.rollout is None else contract.rollout.share
            if in_share(key, share() if callable(share) else share, salt=contract.name):
                return contract, encoded
        return self[-1]


def encode(event: object, contract: EventType) -> Versions:
    """Encodes an event in every version that may go out.

    Raises:
        EncodeError: it cannot be encoded, or a previous version cannot hold it.
    """
    encoded = codec_named(contract.codec).encode(event, contract)
    if contract.rollout is None:
        return Versions(((contract, encoded),))
    return Versions(_all_versions(contract, encoded))


def _all_versions(contract: EventType, encoded: Encoded) -> Iterator[EncodedVersion]:
    yield contract, encoded
    if contract.rollout is not None:
        previous = event_type(contract.rollout.previous)
        yield from _all_versions(previous, _retold(contract, encoded, previous))


def _retold(contract: EventType, encoded: Encoded, previous: EventType) -> Encoded:
    """Encodes under the previous version what its readers would see of the event."""
    codec = codec_named(contract.codec)
    text = codec.schema_text(contract) or ""
    message = Message(
        id="",
        type=contract.name,
        topic="",
        payload=encoded.payload,
        content_type=encoded.content_type,
        schema=encoded.schema,
    )
    try:
        seen = from_plain(previous.cls, codec.decode(message, previous, lambda _: text))
    except (DecodeError, SchemaError) as error:
        why = f"version {previous.version} of {contract.name} cannot represent this event: {error.message}"
        raise EncodeError(why, path=error.path if isinstance(error, DecodeError) else "") from error
    return codec_named(previous.codec).encode(seen, previous)


def in_share(key: bytes, share: float, *, salt: str = "") -> bool:
    """True if a key belongs to the share (0.0 to 1.0) that gets the new version.

    Args:
        key: the message's key, or its id.
        share: part of all keys.
        salt: the subject, so that not always the same keys go first.

    Raises:
        ConfigurationError: the share is not a number between 0 and 1.
    """
    check_share(share)
    digest = hashlib.sha256(salt.encode() + b"\0" + key).digest()
    return int.from_bytes(digest[:4], "big") < share * _STEPS
