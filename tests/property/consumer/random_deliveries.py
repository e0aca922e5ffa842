"""Random deliveries: an order, dressed at random; a good one in spite of all, or one with a fault that must be told."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from outboxkit.headers import wire_headers
from tests.consumer_fixture import order

__all__ = ["TAG", "RandomDelivery", "random_delivery"]

TAG = "tag"  #: the header that tells which one it is


@dataclass(frozen=True)
class RandomDelivery:
    """What a producer sends.

    Attributes:
        number: which one it is.
        is_good: whether a consumer must handle it; else it must become a dead letter.
        key: of any bytes.
        headers: in order.
        payload: None is a tombstone.
    """

    number: int
    is_good: bool
    key: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    payload: bytes | None

    def with_header(self, name: str, value: bytes) -> RandomDelivery:
        return replace(self, headers=(*(one for one in self.headers if one[0] != name), (name, value)))

    def without(self, name: str) -> RandomDelivery:
        return replace(self, headers=tuple(one for one in self.headers if one[0] != name))


Change = Callable[[random.Random, RandomDelivery], RandomDelivery]
LETTERS = "abcæ≠☃\u202e\u0301 :;=%\x07"


def random_delivery(rng: random.Random, number: int, topic: str, *, good: float = 0.5) -> RandomDelivery:
    """Returns an order with up to three harmless oddities, and perhaps one fault."""
    message = order(number, message_id=f"m{number}", topic=topic)
    made = RandomDelivery(number, is_good=True, key=_key(rng), headers=wire_headers(message), payload=message.payload)
    made = made.with_header(TAG, b"%d" % number)
    for change in rng.sample(HARMLESS, rng.randrange(4)):
        made = change(rng, made)
    if rng.random() < good:
        return made
    return replace(rng.choice(FAULTS)(rng, made), is_good=False)


def _key(rng: random.Random) -> bytes | None:
    return rng.choice([None, b"", b"k%d" % rng.randrange(50), rng.randbytes(rng.randrange(1, 40))])


def _text(rng: random.Random, longest: int = 30) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randrange(1, longest)))


def _extra_headers(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    extra = tuple((f"x{_text(rng)}", rng.randbytes(rng.randrange(60))) for _ in range(rng.randrange(1, 20)))
    return replace(made, headers=(*made.headers, *extra, *extra[:2]))


def _forged_headers(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    names = ("outboxkit-replay-for", "outboxkit-letter", "outboxkit-attempt", "traceparent", "tracestate", "baggage")
    for name in rng.sample(names, 2):
        made = made.with_header(name, rng.choice([b"", b"\xff", b"billing", rng.randbytes(20)]))
    return made


def _no_type(_rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    return made.without("ce_type")


def _spaces_and_a_mark(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    if made.payload is None or not made.payload.startswith(b"{"):
        return made
    return replace(made, payload=rng.choice([b"", b"\xef\xbb\xbf"]) + b" " * rng.randrange(9) + made.payload + b"\n")


def _further_fields(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    if made.payload is None or not made.payload.startswith(b"{"):
        return made
    more: dict[str, object] = {
        _text(rng): rng.choice([None, 1, 1.5, [], {}, "x", [{"a": [1]}], 10**30]) for _ in range(3)
    }
    return replace(made, payload=json.dumps({**more, **json.loads(made.payload)}).encode())


def _content_type(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    names = (b"", b"application/json; charset=utf-8", b"APPLICATION/problem+json", b"text/plain")
    return made.with_header("content-type", rng.choice(names))


def _packed(_rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    if made.payload is None or any(name == "content-encoding" for name, _ in made.headers):
        return made
    return replace(made, payload=gzip.compress(made.payload)).with_header("content-encoding", b"gzip")


def _odd_sequence(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    return made.with_header("ce_sequence", rng.choice([b"", b"abc", b"9" * 300, b"\xff", b"00000000000000000017"]))


def _payload(*texts: bytes) -> Change:
    return lambda rng, made: replace(made.without("content-encoding"), payload=rng.choice(texts))


def _noise(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    return replace(made.without("content-encoding"), payload=b"\xff" + rng.randbytes(rng.randrange(300)))


def _cut(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    whole = json.dumps({"number": made.number, "text": _text(rng)}).encode()
    return replace(made.without("content-encoding"), payload=whole[: rng.randrange(1, len(whole))])


def _value(name: str, *values: bytes) -> Change:
    return lambda rng, made: made.with_header(name, rng.choice(values))


def _unpackable(rng: random.Random, made: RandomDelivery) -> RandomDelivery:
    encodings = (b"zstd", b"br", b"gzip, gzip", b"\xff", b"deflate", b"gzip")
    return replace(made, payload=rng.randbytes(30)).with_header("content-encoding", rng.choice(encodings))


HARMLESS: tuple[Change, ...] = (
    _extra_headers,
    _forged_headers,
    _no_type,
    _spaces_and_a_mark,
    _further_fields,
    _content_type,
    _packed,
    _odd_sequence,
)
FAULTS: tuple[Change, ...] = (
    _noise,
    _cut,
    _unpackable,
    _payload(
        b"", b" ", b"null", b"[]", b"7", b'"x"', b"{}", b'{"number": "x"}', b'{"number": 1.5}', b'{"number": NaN}'
    ),
    _payload(b"[" * 5_000, b'{"number": 1, "number": 2}', b'{"number": ' + b"9" * 5_000 + b"}", b'{"number": 1} x'),
    _payload(b"\0\0\0\0\x09abc", b"\xc3\x01abc", b"\x01" + bytes(20)),
    lambda _rng, made: replace(made.without("content-encoding"), payload=None),
    lambda _rng, made: made.without("ce_id"),
    _value("ce_id", b"", b"x" * 1_025, b"x" * 9_000, b"a\0b", b"\xff"),
    _value("ce_source", b"x" * 1_025, b"a\0b", b"\xff"),
    _value("ce_type", b"\xff"),
    _value("ce_time", b"yesterday", b"\xff", b"0000-01-01T00:00:00Z", b"99999-01-01"),
    _value("ce_expirytime", b"never", b"\xff"),
    _value("ce_dataschema", b"\xff"),
    _value("ce_correlationid", b"\xff"),
    _value("content-type", b"\xff", b"avro/binary", b"application/cloudevents+json", b"application/cloudevents+avro"),
)
