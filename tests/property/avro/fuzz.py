"""Damaged messages by the thousand, in this process: start it as a child, with limits.

Run as ``python -m tests.property.avro.fuzz FIRST_SEED COUNT``. Every input is a valid message of a random schema,
damaged in one of several ways, and read by the writer's schema or by a changed one. It must be read or raise
`DecodeError` with an offset; anything else is printed and ends the run with status 1.
"""

# ruff: noqa: BLE001, T201  a child that reports what it caught

from __future__ import annotations

import collections
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable

from outboxkit.avro import Schema, read_frame
from outboxkit.avro.binary.json_values import encode_json, write_long
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode
from outboxkit.errors import DecodeError, SchemaError
from tests.property.avro import random_schemas

__all__ = ["damaged", "main"]

_PER_PAIR = 40
_SLOW_SECONDS = 1.0  # of our own processor time: a busy machine is no finding


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The message with one to three injuries."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        data = rng.choice(_INJURIES)(rng, data[:at], data[at:])[: 1 << 16]
    return data


def _flip(rng: random.Random, head: bytes, tail: bytes) -> bytes:
    return head + bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:] if tail else head


_NUMBERS = (-1, 2**31, -(2**31), 2**60, 2**63 - 1, 5, 1000)
_INJURIES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    lambda _rng, head, _tail: head,
    lambda rng, head, tail: head + rng.randbytes(rng.randrange(1, 9)) + tail,
    lambda _, head, tail: head + tail[1:],
    lambda rng, head, tail: head + write_long(rng.choice(_NUMBERS)) + tail,
    lambda rng, head, tail: head + b"\xff" * rng.choice((1, 9, 10, 11, 200)) + tail,
    lambda rng, head, tail: head + tail * rng.choice((2, 50)),
    lambda rng, _head, _tail: rng.randbytes(rng.randrange(40)),
    _flip,
)


def _schemas(rng: random.Random) -> tuple[Schema, Schema]:
    while True:
        writer, reader = random_schemas.pair(rng)
        try:
            return parse(writer, lenient=True), parse(reader, lenient=True)
        except SchemaError:
            continue


def _outcome(writer: Schema, reader: Schema, data: bytes) -> str:
    start = time.process_time()
    try:
        decode(writer, reader, data)
        found = "read"
    except DecodeError as error:
        found = "refused" if error.offset is not None else f"no offset: {error}"
    except Exception as error:  # anything else is the finding
        found = f"{type(error).__name__}: {error}"
    return found if time.process_time() - start < _SLOW_SECONDS else f"slow, {found}"


def main() -> int:
    """Run COUNT inputs and print the tally."""
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    tally: collections.Counter[str] = collections.Counter()
    while tally.total() < count:
        rng = random.Random(seed)
        writer, reader = _schemas(rng)
        whole = encode_json(writer, random_schemas.value(rng, writer))
        for _ in range(_PER_PAIR):
            data = damaged(rng, whole)
            found = _outcome(writer, rng.choice((writer, reader)), data)
            with contextlib.suppress(DecodeError):
                read_frame(data)
            tally[found] += 1
            if found not in ("read", "refused"):
                print(json.dumps({"seed": seed, "data": data.hex(), "found": found}), flush=True)
        seed += 1
    print(json.dumps({"next_seed": seed, "tally": tally}), flush=True)
    return 0 if set(tally) <= {"read", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
