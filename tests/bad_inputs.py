"""Deliveries as brokers hand them out, good ones and such as were made to hurt: values for tests of the consumer."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from outboxkit import avro
from outboxkit.brokers import Assignment, Delivery
from outboxkit.brokers.memory import FEATURES
from outboxkit.codecs.avro import encode
from outboxkit.headers import wire_headers
from outboxkit.message import Message
from tests.consumer_fixture import order

__all__ = ["ORDER", "SCHEMAS", "Handed", "avro_delivery", "avro_order", "changed", "delivery", "packed", "with_headers"]


class Handed:
    """A subscriber that hands out what it was given, and again what is given back."""

    features, assignment = FEATURES, Assignment(1)

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self._ready = deque(deliveries)

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        if not self._ready:
            await asyncio.sleep(timeout.total_seconds())
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """It keeps no books: the test does."""

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        self._ready.extendleft(reversed(deliveries))

    async def declare(self, _subscription: Any) -> Sequence[str]:
        return ()

    async def close(self) -> None:
        """Nothing is open."""


def delivery(message: Message, **changes: Any) -> Delivery:
    """A delivery of a message as the library's own relay sends it, changed as a stranger would."""
    values: dict[str, Any] = {
        "topic": message.topic,
        "key": message.key,
        "headers": wire_headers(message),
        "payload": message.payload,
        "origin": f"bad {message.id}",
    }
    return Delivery(**values | changes)


def changed(number: int = 1, **changes: Any) -> Delivery:
    """An order whose delivery has other facts than the library gives."""
    return delivery(order(number, key=f"bad {number}"), **changes)


def with_headers(*headers: tuple[str, bytes], number: int = 1, **others: Any) -> Delivery:
    """An order with these headers instead of those of the same names."""
    found, names = delivery(order(number, key=f"bad {number}", **others)), {name for name, _ in headers}
    kept = [header for header in found.headers if header[0] not in names]
    return replace(found, headers=(*kept, *headers))


# --- Avro: what a writer's schema may be, and what may come under it ----------------------------------------------

ORDER: dict[str, Any] = {"type": "record", "name": "Order", "fields": [{"name": "number", "type": "int"}]}


def _order_and(name: str, kind: Any) -> dict[str, Any]:
    """A writer's order that has one more field, which the reader must step over."""
    return {**ORDER, "fields": [*ORDER["fields"], {"name": name, "type": kind}]}


_LIST = {"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]}
_NESTED = '{"type":"array","items":' * 100_000 + '"int"' + "}" * 100_000
_ALIASES = {
    "type": "record",
    "name": "A",
    "aliases": ["B"],
    "fields": [{"name": "b", "type": {"type": "record", "name": "B", "aliases": ["A"], "fields": []}}],
}

SCHEMAS: dict[str, str] = {
    "1": json.dumps(ORDER),
    "2": json.dumps(_order_and("tail", _LIST)),
    "3": json.dumps(_order_and("nothings", {"type": "array", "items": "null"})),
    "4": json.dumps(_order_and("note", "string")),
    "5": json.dumps(_order_and("state", {"type": "enum", "name": "State", "symbols": ["A", "B"]})),
    "6": json.dumps(_order_and("maybe", ["null", "int"])),
    "7": json.dumps(_order_and("total", "long")),
    "8": json.dumps({"type": "record", "name": "Refund", "fields": [{"name": "amount", "type": "double"}]}),
    "9": _NESTED,
    "10": '"' + "x" * 10_000_000 + '"',
    "11": json.dumps(_ALIASES),
    "12": "{",
    str(2**31 - 1): json.dumps(ORDER),
}


def avro_delivery(schema: int, body: bytes, **changes: Any) -> Delivery:
    """A delivery with a registry's frame, that says which schema wrote it."""
    frame = b"\0" + (schema % 2**32).to_bytes(4, "big")
    return delivery(order(1, key="bad", payload=frame + body, content_type=""), **changes)


def avro_order(number: int = 1) -> bytes:
    """The body of an order."""
    return encode(avro.parse(ORDER), {"number": number})


def packed(encoding: str, data: bytes) -> Delivery:
    """An order whose payload is packed."""
    made = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
    return with_headers(("content-encoding", encoding.encode()), payload=made)
