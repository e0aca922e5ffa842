"""Cost of the guard: encode and decode of a record of about 300 bytes, against bare fastavro.

    python benchmarks/codec.py --quick
    python benchmarks/codec.py --json codec.json

Short rounds of both sides are interleaved and the fastest round of each counts: what is left when nobody else has the
processor. Nothing is asserted here: the numbers are for people and for the report.
"""

from __future__ import annotations

import argparse
import datetime as dt
import decimal
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro

from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode, encode

_ORDER: dict[str, Any] = {
    "type": "record",
    "name": "shop.OrderPlaced",
    "fields": [
        {"name": "order_id", "type": "string"},
        {"name": "customer_id", "type": "string"},
        {"name": "number", "type": "long"},
        {"name": "placed_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "currency", "type": {"type": "enum", "name": "Currency", "symbols": ["EUR", "USD", "GBP"]}},
        {"name": "total_minor", "type": "long"},
        {"name": "weight", "type": "double"},
        {"name": "express", "type": "boolean"},
        {"name": "channel", "type": ["null", "string"], "default": None},
        {"name": "note", "type": ["null", "string"], "default": None},
        {
            "name": "address",
            "type": {
                "type": "record",
                "name": "Address",
                "fields": [
                    {"name": "street", "type": "string"},
                    {"name": "city", "type": "string"},
                    {"name": "zip", "type": "string"},
                    {"name": "country", "type": "string"},
                ],
            },
        },
        {
            "name": "lines",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Line",
                    "fields": [
                        {"name": "sku", "type": "string"},
                        {"name": "quantity", "type": "int"},
                        {"name": "price_minor", "type": "long"},
                    ],
                },
            },
        },
    ],
}
_ORDER_VALUE: dict[str, Any] = {
    "order_id": "018f3c5e-7a10-7c3e-9a55-0d9f6f2b1c44",
    "customer_id": "018f3c5e-7a10-7c3e-9a55-0d9f6f2b1c45",
    "number": 48_211_907,
    "placed_at": dt.datetime(2026, 11, 24, 9, 0, tzinfo=dt.UTC),
    "currency": "EUR",
    "total_minor": 129_900,
    "weight": 12.75,
    "express": True,
    "channel": "web",
    "note": None,
    "address": {"street": "Lange Strasse 112, 3rd floor", "city": "Frankfurt am Main", "zip": "60311", "country": "DE"},
    "lines": [
        {"sku": f"SKU-2026-{number:05d}-BLUE", "quantity": 2, "price_minor": 12_990 + number} for number in range(6)
    ],
}
_FLAT: dict[str, Any] = {
    "type": "record",
    "name": "shop.Flat",
    "fields": [
        *({"name": f"text{number}", "type": "string"} for number in range(6)),
        *({"name": f"number{number}", "type": "long"} for number in range(5)),
        *({"name": f"count{number}", "type": "int"} for number in range(3)),
        {"name": "ratio", "type": "double"},
        {"name": "open", "type": "boolean"},
        {"name": "amount", "type": {"type": "bytes", "logicalType": "decimal", "precision": 12, "scale": 2}},
    ],
}
_FLAT_VALUE: dict[str, Any] = {
    **{f"text{number}": "the quick brown fox jumps over the lazy dog"[: 30 + number * 2] for number in range(6)},
    **{f"number{number}": 1_795_000_000_000 + number for number in range(5)},
    **{f"count{number}": number * 1_000 for number in range(3)},
    "ratio": 0.25,
    "open": False,
    "amount": decimal.Decimal("1299.00"),
}


def main() -> int:
    """Measure and print; with --json also write the numbers."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="few rounds: a look, not a measurement")
    options.add_argument("--json", type=Path, metavar="FILE")
    given = options.parse_args()
    rounds, size = (40, 200) if given.quick else (400, 500)
    cases = {"order": (_ORDER, _ORDER_VALUE), "flat": (_FLAT, _FLAT_VALUE)}
    found = {name: _measure(schema, value, rounds, size) for name, (schema, value) in cases.items()}
    report = {
        "benchmark": "codec",
        "python": platform.python_version(),
        "fastavro": fastavro.__version__,
        "cases": found,
    }
    for name, numbers in found.items():
        print(f"{name}: {numbers['bytes']:.0f} bytes")
        for side in ("encode", "decode"):
            bare, ours = numbers[f"{side}_bare_us"], numbers[f"{side}_us"]
            print(f"  {side}: {ours:.2f} us, bare fastavro {bare:.2f} us: {100 * bare / ours:.0f} % of its speed")
        print(f"  decode as another version: {numbers['evolve_us']:.2f} us, bare {numbers['evolve_bare_us']:.2f} us")
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _measure(source: dict[str, Any], value: Any, rounds: int, size: int) -> dict[str, float]:
    schema, library = parse(source), fastavro.parse_schema(source)
    newer_source = source | {"fields": [*source["fields"][1:], {"name": "added", "type": "int", "default": 7}]}
    newer, newer_library = parse(newer_source), fastavro.parse_schema(newer_source)
    data = encode(schema, value)
    if decode(schema, schema, data) != fastavro.schemaless_reader(io.BytesIO(data), library, None):
        sys.exit("the two sides disagree: nothing to measure")

    def bare_encode() -> object:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, library, value)
        return out.getvalue()

    sides: dict[str, Callable[[], object]] = {
        "encode_us": lambda: encode(schema, value),
        "encode_bare_us": bare_encode,
        "decode_us": lambda: decode(schema, schema, data),
        "decode_bare_us": lambda: fastavro.schemaless_reader(io.BytesIO(data), library, None),
        "evolve_us": lambda: decode(schema, newer, data),
        "evolve_bare_us": lambda: fastavro.schemaless_reader(io.BytesIO(data), library, newer_library),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(_timed(call, size))
    return {"bytes": float(len(data))} | {name: min(one) * 1e6 for name, one in times.items()}


def _timed(call: Callable[[], object], size: int) -> float:
    start = time.perf_counter()
    for _ in range(size):
        call()
    return (time.perf_counter() - start) / size


if __name__ == "__main__":
    sys.exit(main())
