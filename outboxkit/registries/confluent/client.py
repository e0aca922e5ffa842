"""The client: names to schemas, versions of subjects, registration, each held to what it said before."""

from __future__ import annotations

import contextlib
import random
import re
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from outboxkit.avro import Mode, Schema, identity
from outboxkit.avro.model.parse import parse
from outboxkit.errors import RegistryUnavailable, SchemaError, SchemaNotFound
from outboxkit.registries import Features, Reference, Registered, self_contained
from outboxkit.registries.confluent.cache import Memory
from outboxkit.registries.confluent.http import RegistryLogin, Wire

__all__ = ["MAX_REFERENCES", "MAX_REMEMBERED", "MAX_SEARCHED", "ConfluentRegistry"]

_FEATURES: Final = Features(name="confluent", ids=True, remote=True)
MAX_REFERENCES: Final = 64
"""Schemas that one schema may refer to, directly or not."""
MAX_REMEMBERED: Final = 10_000
"""Unknown names that are remembered as unknown: hostile messages can name anything."""
MAX_SEARCHED: Final = 200
"""Requests of one search for a fingerprint: the API finds none, and anybody can name one that does not exist."""
_ATTEMPTS: Final = 3
_UNKNOWN_FOR: Final = timedelta(seconds=30)
"""How long a name stays unknown before the registry is asked again: a schema may be registered late."""
_SEARCH: Final = timedelta(seconds=10)
_AWAY_FOR: Final = timedelta(seconds=1)
"""How long after a failure nobody asks again: every message of a batch would wait for the time-out."""


class ConfluentRegistry:
    """A client; safe to share between threads.

    Args:
        url: the API's root, as in ``https://registry.example/apis/ccompat/v7``; may hold user and password.
        login: overrides what the URL holds.
        tls: for own certificate authorities or client certificates.
        cache: folder in which everything that was seen is kept.
        timeout: for one answer, from connecting to its last byte.
        clock: monotonic seconds.
        sleep: waits between attempts.
        rng: spreads those waits.
    """

    def __init__(
        self,
        url: str,
        *,
        login: RegistryLogin | None = None,
        tls: ssl.SSLContext | None = None,
        cache: Path | None = None,
        timeout: timedelta = timedelta(seconds=5),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._wire = Wire(url, login=login, tls=tls, timeout=timeout, clock=clock)
        self._memory = Memory(cache)
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311  only spreads waiting times
        self._versions: dict[tuple[str, int], Registered] = {}
        self._unknown: dict[str, float] = {}
        self._away_until = float("-inf")
        self._searched_at = float("-inf")

    @property
    def features(self) -> Features:
        return _FEATURES

    def resolve(self, name: str) -> str:
        text = self._memory.text(name)
        if text is not None:
            return text
        if self._unknown.get(name, float("-inf")) > self._clock():
            raise SchemaNotFound(f"the registry had no schema {name} a moment ago")
        try:
            return self._asked(name)
        except SchemaNotFound:
            if len(self._unknown) >= MAX_REMEMBERED:
                self._unknown.clear()
            self._unknown[name] = self._clock() + _UNKNOWN_FOR.total_seconds()
            raise

    def history(self, subject: str) -> Sequence[Registered]:
        try:
            return tuple(self._version(subject, number) for number in self._numbers(subject))
        except SchemaNotFound:
            return ()

    def register(self, subject: str, text: str, references: Sequence[Reference] = ()) -> Registered:
        used = [self._version(one.subject, one.version).schema for one in references]
        schema = parse(text, references=used)
        # Servers compare texts, some byte by byte: another indentation would become another version.
        for known in self.history(subject):
            if known.identity == identity(schema):
                return known
        body: dict[str, Any] = {"schema": text, "schemaType": "AVRO"}
        if references:
            body["references"] = [
                {"name": one.name, "subject": one.subject, "version": one.version} for one in references
            ]
        made = self._call("POST", f"/subjects/{_quoted(subject)}/versions", body)
        found = self._call("POST", f"/subjects/{_quoted(subject)}", body)
        number, schema_id = _number(found, "version"), _number(made, "id")
        whole = self_contained(text, used, schema)
        self._memory.keep(str(schema_id), schema, whole)
        self._unknown.clear()
        return Registered(subject=subject, number=number, schema=schema, text=whole, schema_id=schema_id)

    def mode(self, subject: str) -> Mode:
        try:
            found = self._call("GET", f"/config/{_quoted(subject)}?defaultToGlobal=true")
        except SchemaNotFound:
            # Apicurio knows no configuration of a subject that has no version yet.
            found = self._call("GET", "/config")
        level = found.get("compatibilityLevel") if isinstance(found, dict) else None
        try:
            return Mode(level)
        except ValueError as error:
            raise SchemaError(f"the registry's compatibility level {level!r} of {subject} is unknown") from error

    def subjects(self) -> Sequence[str]:
        found = self._call("GET", "/subjects")
        if not isinstance(found, list):
            raise SchemaError("the registry's list of subjects is no list")
        return sorted(str(one) for one in found)

    def _asked(self, name: str) -> str:
        if re.fullmatch(r"[0-9a-f]{16}", name):
            return self._searched(name)
        place = f"/schemas/ids/{name}" if re.fullmatch(r"[0-9]{1,10}", name) else f"/schemas/guids/{_quoted(name)}"
        schema, text = self._parsed(self._call("GET", place))
        return self._memory.keep(name, schema, text)

    def _searched(self, digest: str) -> str:
        # The API finds no fingerprints: look at every version once, and not again for every unknown message.
        if self._clock() - self._searched_at > _UNKNOWN_FOR.total_seconds():
            self._searched_at = self._clock()
            self._search()
        text = self._memory.text(digest)
        if text is None:
            raise SchemaNotFound(f"no version of any subject has the fingerprint {digest}")
        return text

    def _search(self) -> None:
        """Reads every version of every subject that is not known yet, within a budget of requests and time."""
        end, left = self._clock() + _SEARCH.total_seconds(), MAX_SEARCHED
        for subject in self.subjects():
            numbers: list[int] = []
            with contextlib.suppress(SchemaNotFound):
                numbers = self._numbers(subject)
            new = [number for number in numbers if (subject, number) not in self._versions]
            left -= 1 + len(new)
            if left < 0 or self._clock() > end:
                raise SchemaNotFound(
                    f"the registry finds no fingerprints, and a search of all its subjects takes more than "
                    f"{MAX_SEARCHED} requests or {_SEARCH.total_seconds():g} s: let messages name the id"
                )
            for number in new:
                with contextlib.suppress(SchemaNotFound):
                    self._version(subject, number)

    def _numbers(self, subject: str) -> list[int]:
        numbers = self._call("GET", f"/subjects/{_quoted(subject)}/versions")
        if not isinstance(numbers, list) or not all(isinstance(one, int) for one in numbers):
            raise SchemaError(f"the registry's list of versions of {subject} is no list of numbers")
        return sorted(numbers)

    def _version(self, subject: str, number: int) -> Registered:
        known = self._versions.get((subject, number))
        if known is not None:
            return known
        found = self._call("GET", f"/subjects/{_quoted(subject)}/versions/{number}")
        schema, text = self._parsed(found)
        schema_id = _number(found, "id")
        self._memory.keep(str(schema_id), schema, text)
        made = Registered(subject=subject, number=number, schema=schema, text=text, schema_id=schema_id)
        self._versions[subject, number] = made
        return made

    def _parsed(self, found: object, left: int = MAX_REFERENCES) -> tuple[Schema, str]:
        if not isinstance(found, dict) or not isinstance(found.get("schema"), str):
            raise SchemaError("the registry's answer holds no schema")
        if found.get("schemaType", "AVRO") != "AVRO":
            raise SchemaError(f"the registry's schema is {str(found['schemaType'])[:20]}, not Avro")
        used: dict[int, Schema] = {}
        for reference in found.get("references") or ():
            if left <= 0:
                raise SchemaError(f"the schema refers to more than {MAX_REFERENCES} others, or to itself")
            left -= 1
            place = f"/subjects/{_quoted(str(reference.get('subject')))}/versions/{_number(reference, 'version')}"
            schema, _ = self._parsed(self._call("GET", place), left // 2)
            used[len(used)] = schema
        schema = parse(found["schema"], references=used.values(), lenient=True)
        return schema, self_contained(found["schema"], [*used.values()], schema)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        if self._clock() < self._away_until:
            raise RegistryUnavailable(f"the schema registry {self._wire.name} was away a moment ago")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._wire.call(method, path, body)
            except RegistryUnavailable:
                if attempt == _ATTEMPTS:
                    self._away_until = self._clock() + _AWAY_FOR.total_seconds()
                    raise
                self._sleep(self._rng.uniform(0, 0.1 * 2**attempt))
        raise AssertionError("unreachable")  # the last attempt returns or raises


def _quoted(part: str) -> str:
    return quote(part, safe="")


def _number(found: object, key: str) -> int:
    number = found.get(key) if isinstance(found, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise SchemaError(f"the registry's answer holds no number {key!r}")
    return number
