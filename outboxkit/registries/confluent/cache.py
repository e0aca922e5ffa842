"""Remembers what every name stands for, for ever, on disk too; a name that changes its meaning is refused."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

from outboxkit.avro import Schema, fingerprint, identity
from outboxkit.avro.model.parse import parse
from outboxkit.errors import SchemaError

__all__ = ["Memory"]


class Memory:
    """The meaning of every name, for ever; a name that changes its meaning is refused."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._texts: dict[str, str] = {}
        self._identities: dict[str, str] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def text(self, name: str) -> str | None:
        if name not in self._texts and self._folder is not None and re.fullmatch(r"[0-9a-f-]{1,40}", name):
            with contextlib.suppress(OSError, SchemaError):
                text = (self._folder / f"{name}.avsc").read_text(encoding="utf-8")
                self._remember(name, parse(text, lenient=True), text)
        return self._texts.get(name)

    def keep(self, name: str, schema: Schema, text: str) -> str:
        """Remembers a schema under its name and under its fingerprint."""
        self.text(name)
        with self._lock:
            known = self._identities.get(name)
            if known is not None and known != identity(schema):
                raise SchemaError(
                    f"the registry's schema {name} is not the one that it was before: nothing is read by it"
                )
        for key in (name, fingerprint(schema).hex()):
            if self._texts.get(key) is None:
                self._remember(key, schema, text)
                self._store(key, text)
        return text

    def _remember(self, name: str, schema: Schema, text: str) -> None:
        with self._lock:
            self._texts.setdefault(name, text)
            self._identities.setdefault(name, identity(schema))

    def _store(self, name: str, text: str) -> None:
        # A full disk must not stop messages: the cache only helps the next start.
        if self._folder is not None:
            with contextlib.suppress(OSError):
                part = self._folder / f"{name}.{threading.get_ident()}.part"
                part.write_text(text, encoding="utf-8")
                part.replace(self._folder / f"{name}.avsc")
