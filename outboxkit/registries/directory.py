"""A registry made of files: ``*.avsc`` as people edit them, and a lock file with every released version.

The lock file carries the released schemas whole, so that a checkout alone answers every question: what was released,
what may not break, and which schema a message of last year names. It is written sorted and indented: two branches that
release at once meet in a merge conflict, not in a wrong order. Writers take turns through an advisory lock, and readers
only ever see a complete file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from outboxkit.avro import Mode, Schema, Version, fingerprint, identity
from outboxkit.avro.gate.evaluate import Allow, Finding, find, parse_allowed
from outboxkit.avro.model.parse import parse
from outboxkit.errors import ConfigurationError, SchemaError, SchemaNotFound
from outboxkit.registries import Features, Reference, Registered, Registry, require_compatible, self_contained

__all__ = ["ALLOW_FILE", "LOCK_FILE", "DirectoryRegistry", "SchemaFile", "registry"]

LOCK_FILE: Final = "schemas.lock.json"
ALLOW_FILE: Final = "allow.toml"
MAX_LOCK_SIZE: Final = 64 * 1024 * 1024
"""Bytes of a lock file: thousands of versions fit; more is no lock file."""
_FORMAT: Final = 1
_FEATURES: Final = Features(name="directory", ids=False, remote=False)


def registry(url: str) -> Registry:
    """The registry of a folder: ``directory:schemas``, relative to the working directory, or an absolute path."""
    path = url.partition(":")[2].removeprefix("//")
    if not path:
        raise ConfigurationError("the registry URL names no folder, as in directory:schemas")
    return DirectoryRegistry(Path(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaFile:
    """One ``.avsc`` file."""

    path: Path
    schema: Schema
    text: str

    @property
    def subject(self) -> str:
        """The full name of its outermost type."""
        return self.schema.name


@dataclass(frozen=True, slots=True)
class DirectoryRegistry:
    """Schemas in a folder; the subject of a file is the full name of its outermost type.

    Args:
        folder: with ``*.avsc`` at any depth, and the lock file.
        default: what new versions may not break, where the lock file says nothing else.
    """

    folder: Path
    default: Mode = field(default=Mode.BACKWARD)

    @property
    def features(self) -> Features:
        return _FEATURES

    @property
    def lock_file(self) -> Path:
        """Place of the released versions."""
        return self.folder / LOCK_FILE

    def resolve(self, name: str) -> str:
        released = [one for subject in self.subjects() for one in self.history(subject)]
        for one in released:
            if one.fingerprint == name:
                return one.text
        # Not released yet, but used: a developer's own messages can be read before the lock file is written.
        for file in self.files():
            if fingerprint(file.schema).hex() == name:
                return file.text
        raise SchemaNotFound(f"neither {self.lock_file} nor a schema file beside it has the fingerprint {name}")

    def history(self, subject: str) -> Sequence[Registered]:
        versions = self._lock().get(subject, {}).get("versions", [])
        return tuple(self._registered(subject, number, entry) for number, entry in enumerate(versions, 1))

    def register(self, subject: str, text: str, references: Sequence[Reference] = ()) -> Registered:
        with self._alone():
            known = self.history(subject)
            used = [self._referenced(one) for one in references]
            schema = parse(text, references=used)
            for one in known:
                if one.identity == identity(schema):
                    return one
            require_compatible(self, subject, schema)
            return self._append(subject, schema, self_contained(text, used, schema))

    def mode(self, subject: str) -> Mode:
        given = self._lock().get(subject, {}).get("mode", self.default.value)
        try:
            return Mode(given)
        except ValueError as error:
            raise SchemaError(f"{self.lock_file}: {given!r} is no compatibility mode") from error

    def subjects(self) -> Sequence[str]:
        return sorted(self._lock())

    def set_mode(self, subject: str, mode: Mode) -> None:
        """Writes down what new versions of a subject may not break."""
        with self._alone():
            subjects = dict(self._lock())
            subjects[subject] = {"versions": [], **subjects.get(subject, {}), "mode": mode.value}
            self._write(subjects)

    def files(self) -> Sequence[SchemaFile]:
        """The schema files, parsed; a file may use types that other files define.

        Raises:
            SchemaError: a file is no schema, or its types are nowhere defined; the message begins with its path.
        """
        waiting = {path: path.read_text(encoding="utf-8") for path in sorted(self.folder.rglob("*.avsc"))}
        done: dict[Path, SchemaFile] = {}
        while waiting:
            faults = self._parse_pass(waiting, done)
            if len(faults) == len(waiting):
                raise SchemaError(next(iter(faults.values())))
            waiting = {path: waiting[path] for path in faults}
        return [done[path] for path in sorted(done)]

    def findings(
        self,
        history: Callable[[str], Sequence[Version]] | None = None,
        mode: Callable[[str], Mode] | None = None,
    ) -> list[Finding]:
        """Lists what the schema files break.

        Files of one subject are its versions in the order of their paths (``order.v1.avsc``, ``order.v2.avsc``).

        Args:
            history: older versions of a subject, oldest first; the released ones without it.
            mode: what a subject may not break; the lock file's word without it.
        """
        earlier: dict[str, list[Version]] = {}
        found: list[Finding] = []
        for file in self.files():
            older = earlier.setdefault(file.subject, [])
            known = history(file.subject) if history else [one.version for one in self.history(file.subject)]
            wanted = mode(file.subject) if mode else self.mode(file.subject)
            text = file.path.read_text(encoding="utf-8")
            found += find(file.subject, file.schema, [*known, *older], wanted, file=str(file.path), text=text)
            older.append(Version(schema=file.schema, label=str(file.path)))
        return found

    def allowed(self) -> tuple[Allow, ...]:
        """The dated exceptions written in the folder."""
        path = self.folder / ALLOW_FILE
        return parse_allowed(path.read_text(encoding="utf-8")) if path.exists() else ()

    def _parse_pass(self, waiting: Mapping[Path, str], done: dict[Path, SchemaFile]) -> dict[Path, str]:
        """Parses what can be parsed by now; the faults of the rest may go away with the next pass."""
        faults: dict[Path, str] = {}
        for path, text in waiting.items():
            others = [one.schema for one in done.values()]
            try:
                alone = _attempt(text)
                schema = parse(text, references=others) if alone is None else alone
            except SchemaError as error:
                faults[path] = f"{path}: {error}"
                continue
            complete = text if alone is not None else self_contained(text, others, schema)
            done[path] = SchemaFile(path=path, schema=schema, text=complete)
        return faults

    def _referenced(self, reference: Reference) -> Schema:
        for one in self.history(reference.subject):
            if one.number == reference.version:
                return one.schema
        raise SchemaNotFound(f"{self.lock_file} has no version {reference.version} of {reference.subject}")

    def _append(self, subject: str, schema: Schema, text: str) -> Registered:
        subjects = dict(self._lock())
        entry = {"fingerprint": fingerprint(schema).hex(), "identity": identity(schema), "schema": json.loads(text)}
        before = subjects.get(subject, {"mode": self.default.value, "versions": []})
        subjects[subject] = {**before, "versions": [*before["versions"], entry]}
        self._write(subjects)
        return Registered(subject=subject, number=len(subjects[subject]["versions"]), schema=schema, text=text)

    def _registered(self, subject: str, number: int, entry: Mapping[str, Any]) -> Registered:
        text = json.dumps(entry.get("schema"))
        schema = parse(text, lenient=True)
        if identity(schema) != entry.get("identity"):
            raise SchemaError(
                f"{self.lock_file}: version {number} of {subject} was edited after its release; "
                "restore it, and release the change as a new version"
            )
        return Registered(subject=subject, number=number, schema=schema, text=text)

    def _lock(self) -> Mapping[str, Any]:
        try:
            text = self.lock_file.read_text(encoding="utf-8") if self.lock_file.stat().st_size <= MAX_LOCK_SIZE else ""
            found = json.loads(text)
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{self.lock_file} is not JSON (a merge left half done?): {error}") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise SchemaError(f"{self.lock_file} is not a lock file of format {_FORMAT}")
        subjects: Mapping[str, Any] = found["subjects"]
        return subjects

    def _write(self, subjects: Mapping[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, "subjects": subjects}, indent=2, sort_keys=True, ensure_ascii=False)
        handle, name = tempfile.mkstemp(prefix=LOCK_FILE, dir=self.folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
        Path(name).chmod(0o644)
        Path(name).replace(self.lock_file)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, over all processes."""
        if not self.folder.is_dir():
            raise ConfigurationError(f"the schema folder {self.folder} does not exist")
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _attempt(text: str) -> Schema | None:
    """Parses a file that needs no other."""
    try:
        return parse(text)
    except SchemaError:
        return None
