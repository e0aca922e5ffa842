"""A registry in this process: for tests, and for applications that need no other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from outboxkit.avro import Mode, Schema, identity
from outboxkit.avro.model.parse import parse
from outboxkit.errors import SchemaNotFound
from outboxkit.registries import Features, Reference, Registered, Registry, require_compatible, self_contained

__all__ = ["MemoryRegistry", "registry"]

_FEATURES: Final = Features(name="memory", ids=True, remote=False)


def registry(url: str) -> Registry:
    """The registry of that name in this process: ``memory:name``."""
    with _lock:
        return _named.setdefault(url, MemoryRegistry())


class MemoryRegistry:
    """Schemas in dictionaries, with the checks of a real registry.

    Args:
        mode: what new versions may not break, where `modes` says nothing else.
    """

    def __init__(self, mode: Mode = Mode.BACKWARD) -> None:
        self.modes: dict[str, Mode] = {}
        self._default = mode
        self._lock = threading.RLock()
        self._subjects: dict[str, list[Registered]] = {}
        self._ids: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    @property
    def features(self) -> Features:
        return _FEATURES

    def resolve(self, name: str) -> str:
        text = self._texts.get(name)
        if text is None:
            raise SchemaNotFound(f"the registry has no schema {name}")
        return text

    def history(self, subject: str) -> Sequence[Registered]:
        return tuple(self._subjects.get(subject, ()))

    def register(self, subject: str, text: str, references: Sequence[Reference] = ()) -> Registered:
        with self._lock:
            used = [self._version(one) for one in references]
            schema = parse(text, references=used)
            known = self._subjects.get(subject, [])
            for one in known:
                if one.identity == identity(schema):
                    return one
            require_compatible(self, subject, schema)
            number = self._ids.setdefault(identity(schema), len(self._ids) + 1)
            made = Registered(
                subject=subject,
                number=len(known) + 1,
                schema=schema,
                text=self_contained(text, used, schema),
                schema_id=number,
            )
            self._texts[str(number)] = made.text
            self._texts.setdefault(made.fingerprint, made.text)
            self._subjects[subject] = [*known, made]
            return made

    def mode(self, subject: str) -> Mode:
        return self.modes.get(subject, self._default)

    def subjects(self) -> Sequence[str]:
        return sorted(self._subjects)

    def _version(self, reference: Reference) -> Schema:
        for one in self._subjects.get(reference.subject, ()):
            if one.number == reference.version:
                return one.schema
        raise SchemaNotFound(f"the registry has no version {reference.version} of {reference.subject}")


_named: dict[str, MemoryRegistry] = {}
_lock = threading.Lock()
