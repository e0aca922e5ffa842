"""Inputs that were made to hurt, each run in this process: start it as a child, with limits.

Run as ``python -m tests.property.avro.hostile``: one JSON line per case with what was raised, the time and the peak
memory. The name of a case is printed before it runs, so that a crash names its case.
"""

# ruff: noqa: BLE001, T201  a child that reports what it caught

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from outboxkit.avro import FrameKind, check, read_frame
from outboxkit.avro.binary.json_values import write_long
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode, encode

__all__ = ["CASES", "main"]

_LIST = {"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]}
_TREE = {
    "type": "record",
    "name": "T",
    "fields": [{"name": "v", "type": "int"}, {"name": "children", "type": {"type": "array", "items": "T"}}],
}
_ENDLESS = {"type": "record", "name": "R", "fields": [{"name": "r", "type": "R"}]}
_ORDER = {
    "type": "record",
    "name": "Order",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "count", "type": "int"},
        {"name": "total", "type": "long"},
        {"name": "state", "type": {"type": "enum", "name": "State", "symbols": ["A", "B"]}},
        {"name": "note", "type": ["null", "string"]},
        {"name": "ratio", "type": "double"},
        {"name": "open", "type": "boolean"},
        {"name": "lines", "type": {"type": "array", "items": "string"}},
        {"name": "tags", "type": {"type": "map", "values": "int"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    ],
}
_ORDER_VALUE = {
    "id": "018f3c5e-7a10-7c3e-9a55-0d9f6f2b1c44",
    "count": 70_000,
    "total": 1 << 40,
    "state": "B",
    "note": "größer als " + "x" * 100,
    "ratio": 0.5,
    "open": True,
    "lines": ["a" * 20, "", "c"],
    "tags": {"k": 1, "other": -5},
    "at": 1_795_000_000_000_000,
}


def _read(schema: Any, data: bytes) -> Callable[[], object]:
    def run() -> object:
        made = parse(schema, lenient=True)
        return decode(made, made, data)

    return run


def _logical(base: str, name: str, **facts: int) -> dict[str, object]:
    return {"type": base, "logicalType": name, **facts}


def _doubling(levels: int, bottom: object) -> list[dict[str, Any]]:
    """Records that hold the one before twice: 2^levels values from a schema of a few kB."""
    made: list[dict[str, Any]] = [{"type": "record", "name": "D0", "fields": bottom}]
    for level in range(1, levels):
        fields = [{"name": name, "type": f"D{level - 1}"} for name in ("a", "b")]
        made.append({"type": "record", "name": f"D{level}", "fields": fields})
    return made


def _shared(levels: int, kind: str, **facts: object) -> list[dict[str, Any]]:
    return _doubling(levels, [{"name": "x", "type": kind, **facts}])


def _chain(length: int) -> list[dict[str, Any]]:
    parts = [[], *([{"name": "c", "type": f"C{number}"}] for number in range(length - 1))]
    return [{"type": "record", "name": f"C{number}", "fields": fields} for number, fields in enumerate(parts)]


def _defaults(levels: int) -> dict[str, Any]:
    inner = _shared(levels, "int", default=1)
    for record in inner[1:]:
        for one in record["fields"]:
            one["default"] = {}
    return {"type": "record", "name": "Top", "fields": [{"name": "u", "type": inner}]}


def _nested(levels: int) -> str:
    return '{"type":"array","items":' * levels + '"int"' + "}" * levels


def _truncated() -> None:
    schema = parse(_ORDER)
    data = encode(schema, _ORDER_VALUE)
    for end in range(len(data) - 1):
        try:
            decode(schema, schema, data[:end])
        except Exception as error:  # the class is the point of the test
            _demand(error, end)
        else:
            raise AssertionError(f"cut at {end} was read")
    decode(schema, schema, data[:-1])


def _flipped() -> None:
    schema = parse(_ORDER)
    data = encode(schema, _ORDER_VALUE)
    assert len(data) >= 200
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            decode(schema, schema, bytes(changed))
        except Exception as error:  # the class is the point of the test
            _demand(error, bit)
    decode(schema, schema, b"\xff" * len(data))


def _demand(error: Exception, where: int) -> None:
    offset = getattr(error, "offset", None)
    if type(error).__name__ != "DecodeError" or offset is None:
        raise AssertionError(f"{where}: {type(error).__name__}, offset {offset}") from error


def _long_of(size: int) -> bytes:
    return b"\xff" * (size - 1) + b"\x01"


_NULLS = {"type": "array", "items": "null"}
_ENUM = {"type": "enum", "name": "E", "symbols": ["A", "B"]}
_DECIMAL = _logical("bytes", "decimal", precision=6, scale=2)
_BIG = (400_000).to_bytes(3, "big")

CASES: dict[str, tuple[str, Callable[[], object]]] = {
    "P1 list of 10,000": ("DecodeError", _read(_LIST, b"\x02" * 10_000 + b"\x00")),
    "P1 list of 100,000": ("DecodeError", _read(_LIST, b"\x02" * 100_000 + b"\x00")),
    "P1 tree of 100,000": ("DecodeError", _read(_TREE, b"\x02\x02" * 100_000)),
    "endless record": ("DecodeError", _read(_ENDLESS, b"")),
    "P2 2^60 nulls": ("DecodeError", _read(_NULLS, write_long(2**60) + b"\x00")),
    "P2 50 million nulls": ("DecodeError", _read(_NULLS, write_long(50_000_000) + b"\x00")),
    "P2 many arrays of nulls": (
        "DecodeError",
        _read({"type": "array", "items": _NULLS}, write_long(1000) + (write_long(999_999) + b"\x00") * 1000 + b"\x00"),
    ),
    "P2 empty records": (
        "DecodeError",
        _read({"type": "array", "items": {"type": "record", "name": "N", "fields": []}}, write_long(10**6) + b"\x00"),
    ),
    "P2 2^39 values from no bytes": ("DecodeError", _read(_shared(40, "null"), write_long(39))),
    "P3 string of 2^40": ("DecodeError", _read("string", write_long(2**40))),
    "P3 bytes past the end": ("DecodeError", _read("bytes", write_long(10) + b"abc")),
    "P3 negative length": ("DecodeError", _read("string", write_long(-1))),
    "P3 2^40 strings": ("DecodeError", _read({"type": "array", "items": "string"}, write_long(2**40) + b"\x00" * 99)),
    "P3 2^62 doubles": ("DecodeError", _read({"type": "array", "items": "double"}, write_long(2**62) + b"\x00" * 8)),
    "P3 block of negative size": ("DecodeError", _read(_NULLS, write_long(-5) + write_long(-7) + b"\x00")),
    "P3 block count -2^63": ("DecodeError", _read(_NULLS, write_long(-(2**63)) + write_long(0) + b"\x00")),
    "P3 fixed of 2 GiB": ("DecodeError", _read({"type": "fixed", "name": "F", "size": 2**31 - 1}, b"abc")),
    "P6 schema of 100,000 levels": ("SchemaError", lambda: parse(_nested(100_000))),
    "P6 schema of 3,000 levels": ("SchemaError", lambda: parse(_nested(3_000))),
    "P6 schema of 10 MB": ("SchemaError", lambda: parse('"' + "x" * 10_000_000 + '"')),
    "P6 20,000 names": (
        "SchemaError",
        lambda: parse({"type": "enum", "name": "E", "symbols": [f"S{n}" for n in range(20_000)]}),
    ),
    "P6 aliases in a circle": (
        "nothing",
        lambda: check(
            *(
                parse({
                    "type": "record",
                    "name": a,
                    "aliases": [b, a],
                    "fields": [{"name": a, "aliases": [b], "type": "int"}],
                })
                for a, b in (("X", "Y"), ("Y", "X"))
            )
        ),
    ),
    "P6 chain of 3,000 records": ("nothing", _read(_chain(3_000), write_long(2_999))),
    "P6 default of 2^39 parts": ("SchemaError", lambda: parse(_defaults(40))),
    "P6 check of records used twice": (
        "nothing",
        lambda: check(parse(_shared(40, "int")), parse(_shared(40, "string"))),
    ),
    "P7 cut at every byte": ("DecodeError", _truncated),
    "P8 every bit flipped": ("DecodeError", _flipped),
    "P9 left-over bytes": ("DecodeError", _read("int", b"\x02\x00")),
    "P10 unknown magic byte": ("DecodeError", lambda: read_frame(b"\x07\x00\x00\x00\x01abc")),
    "P10 id 0": ("DecodeError", lambda: read_frame(b"\x00\x00\x00\x00\x00abc")),
    "P10 id -1": ("DecodeError", lambda: read_frame(b"\x00\xff\xff\xff\xffabc")),
    "P10 id 2^31": ("DecodeError", lambda: read_frame(b"\x00\x80\x00\x00\x00abc")),
    "P10 half a frame": ("DecodeError", lambda: read_frame(b"\x00\x00")),
    "P10 half a GUID": ("DecodeError", lambda: read_frame(b"\x01" + b"\x00" * 15)),
    "P10 half a single object": ("DecodeError", lambda: read_frame(b"\xc3\x01abc")),
    "P10 broken id header": ("DecodeError", lambda: read_frame(b"abc", {"__value_schema_id": b"\x00\x01"})),
    "P10 broken fingerprint header": ("DecodeError", lambda: read_frame(b"abc", {"outboxkit-schema": b"zz" * 8})),
    "P10 other frame than pinned": (
        "DecodeError",
        lambda: read_frame(b"\x00\x00\x00\x00\x01abc", pinned=FrameKind.SINGLE_OBJECT),
    ),
    "P11 enum index -1": ("DecodeError", _read(_ENUM, b"\x01")),
    "P11 enum index 2": ("DecodeError", _read(_ENUM, b"\x04")),
    "P11 union index -1": ("DecodeError", _read(["null", "int"], b"\x01")),
    "P11 union index 2^40": ("DecodeError", _read(["null", "int"], write_long(2**40))),
    "P12 varint of 11 bytes": ("DecodeError", _read("long", _long_of(11))),
    "P12 varint of 200 bytes": ("DecodeError", _read("long", b"\xff" * 200)),
    "P12 varint of 1 MiB": ("DecodeError", _read("long", b"\xff" * (1 << 20) + b"\x01")),
    "P12 long of 65 bits": ("DecodeError", _read("long", b"\xff" * 9 + b"\x02")),
    "P12 int of 33 bits": ("DecodeError", _read("int", write_long(2**31))),
    "P12 int of 40 bits": ("DecodeError", _read("int", write_long(2**40))),
    "P13 decimal of 400 kB": ("DecodeError", _read(_DECIMAL, write_long(400_000) + b"\x11" * 400_000)),
    "P13 decimal above its precision": ("DecodeError", _read(_DECIMAL, write_long(3) + b"\x7f\xff\xff")),
    "P13 decimal of no bytes": ("DecodeError", _read(_DECIMAL, b"\x00")),
    "P13 date out of range": ("DecodeError", _read(_logical("int", "date"), write_long(2**31 - 1))),
    "P13 time of day -1": ("DecodeError", _read(_logical("int", "time-millis"), write_long(-1))),
    "P13 time of day of a day": ("DecodeError", _read(_logical("long", "time-micros"), write_long(86_400_000_000))),
    "P13 instant out of range": ("DecodeError", _read(_logical("long", "timestamp-millis"), write_long(2**62))),
    "P13 no UUID": ("DecodeError", _read(_logical("string", "uuid"), b"\x06abc")),
    "P13 NaN and Infinity": ("nothing", _read("double", b"\x00\x00\x00\x00\x00\x00\xf8\x7f")),
    "P14 text that is not UTF-8": ("DecodeError", _read("string", b"\x04\xff\xfe")),
    "P14 surrogate in text": ("DecodeError", _read("string", b"\x06\xed\xa0\x80")),
    "P17 no bytes": ("DecodeError", _read(_ORDER, b"")),
    "P20 JSON as Avro": ("DecodeError", _read(_ORDER, b'{"id": "1", "count": 1}')),
    "boolean of 2": ("DecodeError", _read("boolean", b"\x02")),
}


def main() -> None:
    """Run all cases (or those named) and print what happened."""
    wanted = sys.argv[1:] or list(CASES)
    sys.setrecursionlimit(1_000_000)  # the guard's own limit must hold, not Python's
    for name in wanted:
        print(json.dumps({"case": name}), flush=True)
        start = time.process_time()
        try:
            CASES[name][1]()
            raised, text = "nothing", ""
        except Exception as error:  # the class is the point of the test
            raised, text = type(error).__name__, str(error)[:300]
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"case": name, "raised": raised, "text": text, "s": seconds, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
