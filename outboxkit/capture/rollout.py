"""Rollouts: a new version of an event goes to a share of the keys, the previous version to all others.

Both are written when the event is emitted, so that an event which cannot be told in the previous version is refused for
every key and not only for the unlucky ones. Which one goes out depends on the key alone (`outboxkit.capture.rollout`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from outboxkit.codecs import Encoded, codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import DecodeError, EncodeError, SchemaError
from outboxkit.events import EventType, event_type
from outboxkit.message import Message

__all__ = [
    "EncodedVersion",
    "all_versions",
    "in_share",
    "version_for",
]

EncodedVersion = tuple[EventType, Encoded]  #: an event in one of its versions


_STEPS: Final = 2**32


def all_versions(newest: EncodedVersion) -> Sequence[EncodedVersion]:
    """An event in every version that may go out, the newest first.

    Raises:
        EncodeError: the previous version cannot tell it.
    """
    contract, encoded = newest
    if contract.rollout is None:
        return (newest,)
    previous = event_type(contract.rollout.previous)
    return (newest, *all_versions((previous, _retold(contract, encoded, previous))))


def version_for(key: bytes, written: Sequence[EncodedVersion]) -> EncodedVersion:
    """The version for a key: the newest one whose rollout takes it.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    for contract, encoded in written[:-1]:
        share = 1.0 if contract.rollout is None else contract.rollout.share
        if in_share(key, share() if callable(share) else share, salt=contract.name):
            return contract, encoded
    return written[-1]


def _retold(contract: EventType, encoded: Encoded, previous: EventType) -> Encoded:
    """What a reader on the previous version would see, written again under that version."""
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
        why = f"{contract.name} cannot be told in its version {previous.version}: {error.message}"
        raise EncodeError(why, path=error.path if isinstance(error, DecodeError) else "") from error
    return codec_named(previous.codec).encode(seen, previous)


def in_share(key: bytes, share: float, *, salt: str = "") -> bool:
    """Tell whether a key belongs to the share (0.0 to 1.0) that gets the new version.

    Args:
        key: the message's key, or its id.
        share: part of all keys.
        salt: the subject, so that not always the same keys go first.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    digest = hashlib.sha256(salt.encode() + b"\0" + key).digest()
    return int.from_bytes(digest[:4], "big") < share * _STEPS
