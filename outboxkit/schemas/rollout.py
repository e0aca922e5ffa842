"""Roll a new schema version out to a share of the keys, so that a mistake meets few consumers first.

The choice depends on the key alone: all messages of one key change together, on every producer, and a share that grows
only adds keys. Messages without a key are chosen by their id.
"""

from __future__ import annotations

import hashlib
from typing import Final

__all__ = ["in_share"]

_STEPS: Final = 2**32


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
