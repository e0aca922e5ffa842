"""What every registry does, whatever it is made of. The Confluent client runs against a real server."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro import Mode, canonical_form, fingerprint
from outboxkit.avro.model.parse import parse
from outboxkit.errors import IncompatibleSchema, SchemaError, SchemaNotFound
from outboxkit.registries import Reference, Registry, ids_of, open_registry, require_compatible
from outboxkit.registries.confluent import ConfluentRegistry
from outboxkit.registries.directory import DirectoryRegistry
from outboxkit.registries.memory import MemoryRegistry
from tests.servers import registry as server

KINDS = ("confluent", "directory", "memory")
_count = itertools.count()


@pytest.fixture(params=KINDS)
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    builders: dict[str, Callable[[], Registry]] = {
        "confluent": lambda: ConfluentRegistry(server.find().url),
        "directory": lambda: DirectoryRegistry(tmp_path),
        "memory": MemoryRegistry,
    }
    return builders[request.param]()


@pytest.fixture
def name() -> str:
    """A type name that no other test uses: the real server outlives a test."""
    return f"T{uuid.uuid4().hex[:12]}{next(_count)}"


def _record(name: str, *fields: tuple[str, Any], **defaults: Any) -> str:
    made = [{"name": field, "type": kind} | _default(defaults, field) for field, kind in fields]
    return json.dumps({"type": "record", "name": name, "namespace": "shop", "fields": made})


def _default(defaults: dict[str, Any], field: str) -> dict[str, Any]:
    return {"default": defaults[field]} if field in defaults else {}


def test_a_registered_schema_is_found_by_its_fingerprint(registry: Registry, name: str) -> None:
    text = _record(name, ("id", "string"))

    made = registry.register(f"{name}-value", text)

    found = parse(registry.resolve(made.fingerprint))
    assert canonical_form(found) == canonical_form(parse(text))
    assert made.fingerprint == fingerprint(parse(text)).hex()


def test_a_registered_schema_is_found_by_its_number_where_there_are_numbers(registry: Registry, name: str) -> None:
    made = registry.register(f"{name}-value", _record(name, ("id", "string")))

    assert (made.schema_id is not None) is registry.features.ids
    if made.schema_id is not None:
        assert fingerprint(parse(registry.resolve(str(made.schema_id)))).hex() == made.fingerprint


def test_a_codec_finds_the_number_of_a_registered_schema_and_of_no_other(registry: Registry, name: str) -> None:
    text, number = _record(name, ("id", "string")), ids_of(registry)
    with pytest.raises(SchemaNotFound, match="register it first"):
        number(parse(text))

    made = registry.register(f"shop.{name}", text)

    if registry.features.ids:
        assert number(parse(text)) == made.schema_id
    else:
        with pytest.raises(SchemaNotFound):
            number(parse(text))


def test_registering_twice_gives_the_same_version(registry: Registry, name: str) -> None:
    text = _record(name, ("id", "string"))

    first = registry.register(f"{name}-value", text)
    again = registry.register(f"{name}-value", json.dumps(json.loads(text), indent=4))

    assert (first.number, first.schema_id) == (again.number, again.schema_id)
    assert len(registry.history(f"{name}-value")) == 1


def test_the_history_is_complete_and_in_order(registry: Registry, name: str) -> None:
    texts = [
        _record(name, ("id", "string")),
        _record(name, ("id", "string"), ("note", ["null", "string"]), note=None),
        _record(name, ("id", "string"), ("note", ["null", "string"]), ("n", "int"), note=None, n=1),
    ]

    for text in texts:
        registry.register(f"{name}-value", text)

    history = registry.history(f"{name}-value")
    assert [one.number for one in history] == [1, 2, 3]
    assert [one.identity for one in history] == [one.identity for one in map(_registered(registry, name), texts)]


def _registered(registry: Registry, name: str) -> Callable[[str], Any]:
    return lambda text: registry.register(f"{name}-value", text)


def test_an_unknown_subject_has_no_history(registry: Registry, name: str) -> None:
    assert list(registry.history(f"{name}-value")) == []


@pytest.mark.parametrize("unknown", ["0123456789abcdef", "999999999", "00000000-0000-4000-8000-000000000000", "../x"])
def test_an_unknown_name_is_not_found(registry: Registry, unknown: str) -> None:
    with pytest.raises(SchemaNotFound):
        registry.resolve(unknown)


def test_a_change_that_breaks_the_mode_is_refused(registry: Registry, name: str) -> None:
    registry.register(f"{name}-value", _record(name, ("id", "string")))
    assert registry.mode(f"{name}-value") is Mode.BACKWARD

    with pytest.raises(IncompatibleSchema):
        registry.register(f"{name}-value", _record(name, ("id", "string"), ("must", "int")))

    assert len(registry.history(f"{name}-value")) == 1


def test_a_producer_can_ask_at_its_start_whether_its_schema_breaks_something(registry: Registry, name: str) -> None:
    subject = f"{name}-value"
    require_compatible(registry, subject, parse(_record(name, ("id", "string"))))
    registry.register(subject, _record(name, ("id", "string")))

    require_compatible(registry, subject, parse(_record(name, ("id", "string"), ("n", "int"), n=1)))
    with pytest.raises(IncompatibleSchema) as caught:
        require_compatible(registry, subject, parse(_record(name, ("id", "string"), ("must", "int"))))

    assert "READER_FIELD_MISSING_DEFAULT_VALUE" in caught.value.problems[0]


def test_what_is_no_schema_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(SchemaError):
        registry.register(f"{name}-value", '{"type": "record", "name": "X"}')


def test_a_schema_may_use_types_of_another_subject(registry: Registry, name: str) -> None:
    money = registry.register(f"{name}-money", _record(f"{name}Money", ("minor", "long")))
    reference = Reference(name=f"shop.{name}Money", subject=money.subject, version=money.number)

    made = registry.register(f"{name}-value", _record(name, ("total", f"shop.{name}Money")), [reference])

    alone = parse(registry.resolve(made.fingerprint))
    assert f"shop.{name}Money" in alone.names
    assert [one.fingerprint for one in registry.history(f"{name}-value")] == [made.fingerprint]


def test_subjects_are_listed_by_name(registry: Registry, name: str) -> None:
    registry.register(f"{name}-b", _record(name, ("id", "string")))
    registry.register(f"{name}-a", _record(name, ("id", "string")))

    mine = [one for one in registry.subjects() if one.startswith(name)]
    assert mine == [f"{name}-a", f"{name}-b"]


def test_two_services_registering_at_once_get_one_version(registry: Registry, name: str) -> None:
    text = _record(name, ("id", "string"))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: registry.register(f"{name}-value", text), range(8)))

    assert len({(one.number, one.schema_id) for one in made}) == 1
    assert len(registry.history(f"{name}-value")) == 1


def test_every_registry_is_found_by_its_url(tmp_path: Path) -> None:
    found = [
        open_registry(f"directory:{tmp_path}"),
        open_registry("memory:x"),
        open_registry("https://registry.invalid"),
    ]

    assert [one.features.name for one in found] == ["directory", "memory", "confluent"]
