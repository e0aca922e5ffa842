"""A registry with Confluent's HTTP API (Confluent, Apicurio, Karapace, Redpanda, …), by a thin client of its own.

Thin because it must be careful rather than complete: it follows no redirect, takes no answer that is too long or too
slow, and holds every id to the schema that it once stood for. Everything that was seen is kept, on disk too if a folder
is given: a consumer that has met its schemas keeps working while the registry is away, also after a restart.
"""

# ruff: noqa: PLR2004  the numbers are HTTP's

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from outboxkit.avro import Mode, Schema, fingerprint, identity
from outboxkit.avro.model.parse import parse
from outboxkit.errors import (
    ConfigurationError,
    IncompatibleSchema,
    RegistryUnavailable,
    SchemaError,
    SchemaNotFound,
)
from outboxkit.registries import Features, Reference, Registered, Registry, self_contained

__all__ = ["ConfluentRegistry", "Login", "registry"]

_FEATURES: Final = Features(name="confluent", ids=True, remote=True)
MAX_ANSWER: Final = 1024 * 1024
"""Bytes of one answer: a schema may have 256 KiB, and its JSON escapes can double it."""
MAX_REFERENCES: Final = 64
"""Schemas that one schema may refer to, directly or not."""
MAX_REMEMBERED: Final = 10_000
"""Unknown names that are remembered as unknown: hostile messages can name anything."""
_ATTEMPTS: Final = 3
_UNKNOWN_FOR: Final = timedelta(seconds=30)
"""How long a name stays unknown before the registry is asked again: a schema may be registered late."""
_AWAY_FOR: Final = timedelta(seconds=1)
"""How long after a failure nobody asks again: every message of a batch would wait for the time-out."""
_MEDIA_TYPE: Final = "application/vnd.schemaregistry.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Credentials: a user with a password, or a bearer token. Never shown."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def header(self) -> Mapping[str, str]:
        """The header that says so."""
        if self.token:
            return {"Authorization": f"Bearer {self.token}"}
        if not self.user:
            return {}
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}


def registry(url: str) -> Registry:
    """The registry behind ``confluent+https://user:password@host/path`` or ``https://…``."""
    return ConfluentRegistry(url.removeprefix("confluent+"))


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
        login: Login | None = None,
        tls: ssl.SSLContext | None = None,
        cache: Path | None = None,
        timeout: timedelta = timedelta(seconds=5),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._wire = _Wire(url, login=login, tls=tls, timeout=timeout, clock=clock)
        self._memory = _Memory(cache)
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
            numbers = self._call("GET", f"/subjects/{_quoted(subject)}/versions")
        except SchemaNotFound:
            return ()
        if not isinstance(numbers, list) or not all(isinstance(one, int) for one in numbers):
            raise SchemaError(f"the registry's list of versions of {subject} is no list of numbers")
        return tuple(self._version(subject, number) for number in sorted(numbers))

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
            for subject in self.subjects():
                with contextlib.suppress(SchemaNotFound):
                    self.history(subject)
        text = self._memory.text(digest)
        if text is None:
            raise SchemaNotFound(f"no version of any subject has the fingerprint {digest}")
        return text

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


class _Memory:
    """Memory of every name's meaning, for ever; a name that changes it is refused."""

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


class _Wire:
    """One request at a time over HTTP, within bounds."""

    def __init__(
        self,
        url: str,
        *,
        login: Login | None,
        tls: ssl.SSLContext | None,
        timeout: timedelta,
        clock: Callable[[], float],
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError("the registry URL is not http://host… or https://host…")
        self.name = f"{parts.scheme}://{parts.hostname}"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._login = login or Login(user=unquote(parts.username or ""), password=unquote(parts.password or ""))
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._seconds = timeout.total_seconds()
        self._clock = clock

    def call(self, method: str, path: str, body: object) -> Any:
        end = self._clock() + self._seconds
        connection = self._connection()
        try:
            headers = {"Accept": f"{_MEDIA_TYPE}, application/json", "Content-Type": _MEDIA_TYPE, **self._login.header}
            data = None if body is None else json.dumps(body)
            connection.request(method, f"{self._path}{path}", body=data, headers=headers)
            with connection.getresponse() as answer:
                return self._judged(answer.status, self._read(answer, end))
        except (OSError, http.client.HTTPException) as error:
            why = f"the schema registry {self.name} cannot be reached: {type(error).__name__}"
            raise RegistryUnavailable(why) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._seconds)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._seconds, context=self._tls)

    def _read(self, answer: http.client.HTTPResponse, end: float) -> bytes:
        made = bytearray()
        while chunk := answer.read1(65_536):
            made += chunk
            if len(made) > MAX_ANSWER:
                raise SchemaError(f"the schema registry's answer is longer than {MAX_ANSWER} bytes")
            if self._clock() > end:
                raise RegistryUnavailable(f"the schema registry {self.name} answers too slowly")
        return bytes(made)

    def _judged(self, status: int, data: bytes) -> Any:
        if 200 <= status < 300:
            return self._json(data)
        if status in (401, 403):
            raise ConfigurationError(f"the schema registry {self.name} refuses our login (HTTP {status})")
        if status == 404:
            raise SchemaNotFound(f"the schema registry {self.name} has no such schema, version or subject")
        if status == 409:
            raise IncompatibleSchema(f"the schema registry refuses the change: {_said(data)}")
        if status in (408, 429) or status >= 500:
            raise RegistryUnavailable(f"the schema registry {self.name} fails (HTTP {status})")
        if 300 <= status < 400:
            raise SchemaError(f"the schema registry {self.name} redirects, which is not followed: set the final URL")
        raise SchemaError(f"the schema registry refuses the request (HTTP {status}): {_said(data)}")

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"the schema registry {self.name} does not answer in JSON") from error


def _said(data: bytes) -> str:
    """The message of an error answer: one short printable line."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "no reason given"
    text = str(found.get("message", "")) if isinstance(found, dict) else ""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:500] or "no reason given"


def _quoted(part: str) -> str:
    return quote(part, safe="")


def _number(found: object, key: str) -> int:
    number = found.get(key) if isinstance(found, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise SchemaError(f"the registry's answer holds no number {key!r}")
    return number
