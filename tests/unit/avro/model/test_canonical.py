"""Canonical form and fingerprints: Apache's published vectors, and what the identity sees beyond them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outboxkit.avro import canonical_form, fingerprint, full_form, identity
from outboxkit.avro.model.parse import parse

# Input and CRC-64-AVRO as a signed number: share/test/data/schema-tests.txt of Apache Avro.
VECTORS: list[tuple[Any, int]] = [
    ("null", 7195948357588979594),
    ("boolean", -6970731678124411036),
    ("int", 8247732601305521295),
    ("long", -3434872931120570953),
    ("float", 5583340709985441680),
    ("double", -8181574048448539266),
    ("bytes", 5746618253357095269),
    ("string", -8142146995180207161),
    ([], -1241056759729112623),
    (["int"], -5232228896498058493),
    (["int", {"type": "boolean"}], 5392556393470105090),
    ({"fields": [], "type": "record", "name": "foo"}, -4824392279771201922),
    ({"fields": [], "type": "record", "name": "foo", "namespace": "x.y"}, 5916914534497305771),
    ({"fields": [], "type": "record", "name": "a.b.foo", "namespace": "x.y"}, -4616218487480524110),
    ({"fields": [], "type": "record", "name": "foo", "doc": "foo", "aliases": ["foo", "bar"]}, -4824392279771201922),
    ({"fields": [{"type": {"type": "boolean"}, "name": "f1"}], "type": "record", "name": "foo"}, 7843277075252814651),
    (
        {
            "fields": [
                {"type": "boolean", "aliases": [], "name": "f1", "default": "true"},
                {"order": "descending", "name": "f2", "doc": "Hello", "type": "int"},
            ],
            "type": "record",
            "name": "foo",
        },
        -4860222112080293046,
    ),
    ({"type": "enum", "name": "foo", "symbols": ["A1"]}, -6342190197741309591),
    ({"namespace": "x.y.z", "type": "enum", "name": "foo", "doc": "d", "symbols": ["A1", "A2"]}, -4448647247586288245),
    ({"name": "foo", "type": "fixed", "size": 15}, 1756455273707447556),
    ({"namespace": "x.y.z", "type": "fixed", "name": "foo", "doc": "foo bar", "size": 32}, -3064184465700546786),
    ({"items": {"type": "null"}, "type": "array"}, -589620603366471059),
    ({"values": "string", "type": "map"}, -8732877298790414990),
    (
        {
            "name": "PigValue",
            "type": "record",
            "fields": [{"name": "value", "type": ["null", "int", "long", "PigValue"]}],
        },
        -1759257747318642341,
    ),
]


@pytest.mark.parametrize(("source", "expected"), VECTORS, ids=lambda one: json.dumps(one)[:60])
def test_apaches_vectors(source: Any, expected: int) -> None:
    digest = fingerprint(parse(json.dumps(source), lenient=True))

    assert int.from_bytes(digest, "little", signed=True) == expected


def test_the_order_of_keys_and_all_that_readers_of_bytes_ignore_is_stripped() -> None:
    source = {"type": "fixed", "size": 4, "name": "F", "namespace": "a", "doc": "x", "extra": 1, "aliases": ["b"]}

    assert canonical_form(parse(source)) == '{"name":"a.F","type":"fixed","size":4}'


def test_a_type_used_twice_is_written_once() -> None:
    enum = {"type": "enum", "name": "E", "symbols": ["A"]}
    fields = [{"name": "x", "type": enum}, {"name": "y", "type": "n.E"}]
    form = json.loads(canonical_form(parse({"type": "record", "name": "n.R", "fields": fields})))

    assert form["fields"][0]["type"]["name"] == "n.E"
    assert form["fields"][1]["type"] == "n.E"


def test_other_digests() -> None:
    assert fingerprint(parse('"int"'), "MD5").hex() == "ef524ea1b91e73173d938ade36c1db32"
    assert fingerprint(parse('"int"'), "SHA-256").hex()[:16] == "3f2b87a9fe7cc9b1"
    with pytest.raises(ValueError, match="CRC-64-AVRO"):
        fingerprint(parse('"int"'), "SHA-1")  # type: ignore[arg-type]


_FIELD: dict[str, Any] = {"name": "x", "type": {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}}


@pytest.mark.parametrize(
    "changed",
    [
        _FIELD | {"default": "\u0001"},
        _FIELD | {"aliases": ["y"]},
        _FIELD | {"type": _FIELD["type"] | {"scale": 1}},
        _FIELD | {"type": "bytes"},
        _FIELD | {"order": "ignore"},
    ],
)
def test_the_identity_sees_what_the_fingerprint_does_not(changed: dict[str, Any]) -> None:
    before = parse({"type": "record", "name": "R", "fields": [_FIELD]})
    after = parse({"type": "record", "name": "R", "fields": [changed]})

    assert fingerprint(before) == fingerprint(after)
    assert identity(before) != identity(after)


def test_the_identity_does_not_see_docs_and_the_full_form_has_it_too() -> None:
    before = parse({"type": "record", "name": "R", "fields": [_FIELD | {"default": "\u0001", "aliases": ["y"]}]})
    after = parse({"type": "record", "name": "R", "doc": "new", "fields": [{**dict(reversed(before_field(before)))}]})

    assert identity(before) == identity(after) == identity(parse(full_form(before)))


def before_field(schema: Any) -> list[tuple[str, Any]]:
    return list(schema.source["fields"][0].items())
