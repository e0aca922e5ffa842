"""Registries: where schemas of other versions and of other services come from.

**Writing a registry.** One module with ``registry(url) -> Registry``, one entry point in the group
``outboxkit.registries`` named after the first part of the URL, and the conformance suite in
``tests/conformance/test_registries.py`` passed. What was seen once is remembered: an id never changes its meaning, so
consumers keep working while a remote registry is away. The only errors are `SchemaNotFound` (ask again later, somebody
may register it), `RegistryUnavailable` (away) and `SchemaError` (the answer makes no sense, or changed).
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Final, Protocol

from outboxkit.avro import Mode, Schema, Version, check_history, fingerprint, full_form, identity
from outboxkit.errors import ConfigurationError, IncompatibleSchema, SchemaNotFound

__all__ = [
    "Features",
    "Reference",
    "Registered",
    "Registry",
    "ids_of",
    "open_registry",
    "require_compatible",
    "self_contained",
]

_GROUP: Final = "outboxkit.registries"


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Capabilities of a registry: the only place where such a question is asked.

    Attributes:
        name: ``directory``, ``confluent``, ``memory``.
        ids: it numbers schemas, so Confluent id frames can be written.
        remote: it can be away.
    """

    name: str
    ids: bool
    remote: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A type that a schema uses without defining it, and the registered version that defines it."""

    name: str
    subject: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """One version of one subject.

    Attributes:
        subject: its name.
        number: the version, from 1.
        schema: parsed.
        text: complete in itself: referenced types are part of it.
        schema_id: the registry's number for this schema, None when it has none.
    """

    subject: str
    number: int
    schema: Schema
    text: str
    schema_id: int | None = None

    @property
    def fingerprint(self) -> str:
        """CRC-64-AVRO of the canonical form, 16 hex digits."""
        return fingerprint(self.schema).hex()

    @property
    def identity(self) -> str:
        """SHA-256 that also sees defaults, aliases and logical types."""
        return identity(self.schema)

    @property
    def version(self) -> Version:
        """The same, as the compatibility check takes it."""
        return Version(schema=self.schema, number=self.number, schema_id=self.schema_id)


class Registry(Protocol):
    """A store of schemas by subject, version and name."""

    @property
    def features(self) -> Features:
        """Its capabilities."""
        ...

    def resolve(self, name: str) -> str:
        """Schema text for what a message names: an id in decimal, a fingerprint of 16 hex digits, or a GUID.

        Raises:
            SchemaNotFound: there is none.
            RegistryUnavailable: it cannot be asked, and the name was never seen before.
            SchemaError: the answer is not the schema that this name stood for before.
        """
        ...

    def history(self, subject: str) -> Sequence[Registered]:
        """All versions of a subject, oldest first; empty when it is unknown."""
        ...

    def register(self, subject: str, text: str, references: Sequence[Reference] = ()) -> Registered:
        """Adds a version, or returns the one that has the same schema already: indentation and docs make no version.

        Raises:
            IncompatibleSchema: the registry's own check refuses it.
            SchemaError: the text is no schema.
        """
        ...

    def mode(self, subject: str) -> Mode:
        """Compatibility that a new version of the subject must keep."""
        ...

    def subjects(self) -> Sequence[str]:
        """The names of all subjects, sorted."""
        ...


def self_contained(text: str, references: Sequence[Schema], schema: Schema) -> str:
    """The text itself, or one that also defines the types which it only refers to."""
    return json.dumps(full_form(schema)) if references else text


def require_compatible(registry: Registry, subject: str, schema: Schema) -> None:
    """Refuses a schema that breaks what the subject promised: called at start, before the first event is written.

    Raises:
        IncompatibleSchema: with every error; a schema that is registered already is never refused.
        RegistryUnavailable: the registry cannot be asked; the caller decides whether to start nevertheless.
    """
    known = registry.history(subject)
    if identity(schema) in [one.identity for one in known]:
        return
    problems = check_history(registry.mode(subject), schema, [one.version for one in known])
    errors = tuple(str(one) for one in problems if one.is_error)
    if errors:
        raise IncompatibleSchema(f"{subject} may not change so: {errors[0]}", problems=errors)


def ids_of(
    registry: Registry, subject: Callable[[Schema], str] = lambda schema: schema.name
) -> Callable[[Schema], int]:
    """The numbers that a registry gave to schemas, for codecs that write them; each is asked for once.

    The function raises `SchemaNotFound` for a schema that is not registered, and what the registry raises.

    Args:
        registry: one that has numbers.
        subject: under which a schema is registered.
    """

    @functools.cache
    def find(schema: Schema) -> int:
        name = subject(schema)
        for one in registry.history(name):
            if one.schema_id is not None and one.identity == identity(schema):
                return one.schema_id
        raise SchemaNotFound(f"{name} has no version with this schema and a number: register it first")

    return find


def open_registry(url: str) -> Registry:
    """The registry for a URL; nothing is connected yet.

    Args:
        url: ``directory:schemas``, ``memory:name``, ``confluent+https://user:password@host/path`` or just ``https://…``.

    Raises:
        ConfigurationError: no such registry.
    """
    family = url.partition(":")[0].partition("+")[0].lower()
    family = "confluent" if family in ("http", "https") else family
    known = {point.name: point.value for point in entry_points(group=_GROUP)}
    if family not in known:
        raise ConfigurationError(
            f"there is no registry {family!r}; expected one of {', '.join(sorted(known))}, as in directory:schemas"
        )
    build: Callable[[str], Registry] = importlib.import_module(known[family]).registry
    return build(url)
