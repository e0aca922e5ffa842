"""One request at a time over HTTP, within bounds of size and time; redirects are not followed."""

# ruff: noqa: PLR2004  the numbers are HTTP's

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from outboxkit.errors import ConfigurationError, IncompatibleSchema, RegistryUnavailable, SchemaError, SchemaNotFound

__all__ = ["MAX_ANSWER", "RegistryLogin", "Wire"]

MAX_ANSWER: Final = 1024 * 1024
"""Bytes of one answer: a schema may have 256 KiB, and its JSON escapes can double it."""
_MEDIA_TYPE: Final = "application/vnd.schemaregistry.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLogin:
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


class Wire:
    """One request at a time over HTTP, within bounds."""

    def __init__(
        self,
        url: str,
        *,
        login: RegistryLogin | None,
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
        self._login = login or RegistryLogin(user=unquote(parts.username or ""), password=unquote(parts.password or ""))
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._seconds = timeout.total_seconds()
        self._clock = clock

    def call(self, method: str, path: str, body: object) -> Any:
        end = self._clock() + self._seconds
        connection = self._connection()
        # The time-out of a socket is one of each read: a server that sends a byte a second would never be late.
        late = threading.Event()
        deadline = threading.Timer(self._seconds, _hang_up, [connection, late])
        deadline.daemon = True
        deadline.start()
        try:
            headers = {"Accept": f"{_MEDIA_TYPE}, application/json", "Content-Type": _MEDIA_TYPE, **self._login.header}
            data = None if body is None else json.dumps(body)
            connection.request(method, f"{self._path}{path}", body=data, headers=headers)
            with connection.getresponse() as answer:
                said = self._read(answer, end)
            if late.is_set():
                raise RegistryUnavailable(f"the schema registry {self.name} answers too slowly")
            return self._judged(answer.status, said)
        except (OSError, http.client.HTTPException) as error:
            why = f"the schema registry {self.name} cannot be reached: {type(error).__name__}"
            raise RegistryUnavailable(why) from error
        finally:
            deadline.cancel()
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


def _hang_up(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _said(data: bytes) -> str:
    """The message of an error answer: one short printable line."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "no reason given"
    text = str(found.get("message", "")) if isinstance(found, dict) else ""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:500] or "no reason given"
