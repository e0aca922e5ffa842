"""Reads broker URLs, and never shows what may be secret. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote

from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENCODE", "BrokerUrl", "read_url", "redacted"]

_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*", re.IGNORECASE)
_HOST: Final = re.compile(r"(\[[0-9a-f:.%]+\]|[^\s:\[\]]+)(:(\d{1,5}))?", re.IGNORECASE)
_AUTHORITY_END: Final = re.compile(r"[/?#]")
_MAX_PORT: Final = 65_535
ENCODE: Final = "percent-encode the user and the password (/ is %2F, # is %23, ? is %3F, @ is %40)"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerUrl:
    """The parts of a broker URL.

    Attributes:
        scheme: in lower case.
        hosts: ``host`` or ``host:port``, at least one.
        path: with its leading slash, still quoted.
        login: user and password, as far as they are given.
        query: the settings behind the question mark.
        shown: the URL without secrets.
    """

    scheme: str
    hosts: tuple[str, ...]
    path: str
    login: tuple[str, ...] = field(repr=False)
    query: Mapping[str, str] = field(repr=False)
    shown: str


def read_url(url: str, example: str) -> BrokerUrl:
    """Reads a URL with one host or several.

    Raises:
        ConfigurationError: it cannot be read. The text shows no more than the scheme: what is a password in a URL that
            cannot be read, nobody knows.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise _unreadable(url, f"expected {example}")
    authority = _AUTHORITY_END.split(rest, maxsplit=1)[0]
    path, _, query = rest[len(authority) :].partition("?")
    # The authority ends before its user and password do; or there is a fragment, which no broker has.
    if "#" in rest or "@" in path or ("@" in query and "@" not in authority):
        raise _unreadable(url, ENCODE)
    userinfo, _, hosts = authority.rpartition("@")
    names = tuple(host.strip() for host in hosts.split(",") if host.strip())
    if not names:
        raise ConfigurationError(f"the broker URL {scheme}://… names no host; expected {example}")
    if not all(map(_is_host, names)):
        raise _unreadable(url, f"expected {example}; if it has a password, {ENCODE}")
    return BrokerUrl(
        scheme=scheme.lower(),
        hosts=names,
        path=path,
        login=tuple(map(unquote, userinfo.split(":", 1))) if userinfo else (),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        shown=f"{scheme}://{hosts}{path}",
    )


def redacted(url: str) -> str:
    """The URL without its password, query or anything else that may be secret; never raises."""
    try:
        return read_url(url, "").shown
    except ConfigurationError:
        scheme, separator, _ = url.partition("://")
        return f"{scheme}://…" if separator and _SCHEME.fullmatch(scheme) else "(unparsable URL)"


def _is_host(name: str) -> bool:
    match = _HOST.fullmatch(name)
    return match is not None and int(match[3] or 1) in range(1, _MAX_PORT + 1)


def _unreadable(url: str, advice: str) -> ConfigurationError:
    scheme, separator, _ = url.partition("://")
    known = scheme if separator and _SCHEME.fullmatch(scheme) else "(no scheme)"
    return ConfigurationError(f"cannot read the broker URL {known}://…: {advice}")
