"""Redaction: takes secrets and control characters out of every text that people or machines read.

Secrets are replaced wherever they appear when they are known, and where they look like one when they are not. Control
characters are escaped, so that no message can forge a line or command a terminal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["cause", "cleaned", "escaped", "field", "is_secret", "redacted", "remember", "secrets_of"]

_MASK: Final = "***"
_SHORTEST_SECRET: Final = 4  # replacing shorter ones would garble every line
_LONGEST_TEXT: Final = 4_000  # characters of one value: enough to understand

# C0, DEL, C1, the bidirectional controls, line and paragraph separators, and what joins or hides characters.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_LAST_OF_A_BYTE: Final = 0xFF
_SHORT_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# Up to the last @: a password that should have been percent-encoded holds anything but blanks and quotes.
_CREDENTIALS: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)[^\s'\"<>]*@", re.IGNORECASE)
_WORDS: Final = r"(?:\w*\.)*\w*(?:password|passwd|passphrase|pwd|secret|token|api_?key|authorization)"
_ASSIGNED: Final = re.compile(
    rf"(\b{_WORDS}\b['\"]?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|(?:bearer|basic)\s+\S+|[^\s,;&]+)",
    re.IGNORECASE,
)
_SECRET_NAME: Final = re.compile(_WORDS, re.IGNORECASE)
_VALUES_OF_ROWS: Final = re.compile(r"^\s*(?:DETAIL|CONTEXT):.*$", re.MULTILINE)  # PostgreSQL quotes data there

_known: set[str] = set()


def remember(secrets: Collection[str]) -> None:
    """Makes `redacted` replace these values from now on, wherever they appear."""
    _known.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def cause(error: BaseException) -> str:
    """The first line of a driver's error about a database that is away: it names host and reason, never data."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def secrets_of(url: str) -> Iterator[str]:
    """Yields the secrets of a URL: its password as written and as meant, and everything secret in its query."""
    rest = url.partition("://")[2]
    authority, _, _ = rest.rpartition("@")
    password = authority.partition(":")[2]
    named = (pair.partition("=") for pair in rest.partition("?")[2].split("&"))
    for secret in (password, *(value for name, _, value in named if _SECRET_NAME.search(unquote(name)))):
        if secret:
            yield from {secret, unquote(secret)}


def is_secret(name: str) -> bool:
    """Whether a setting or field of this name holds a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def redacted(text: str) -> str:
    """The text without secrets."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _MASK)
    text = _VALUES_OF_ROWS.sub("", text)
    return _ASSIGNED.sub(rf"\g<1>{_MASK}", _CREDENTIALS.sub(rf"\g<1>{_MASK}@", text))


def escaped(text: str) -> str:
    """The text with every control character visible: safe in a line of a log and on a terminal."""
    return _CONTROL.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code <= _LAST_OF_A_BYTE else f"\\u{code:04x}")


def field(name: str, value: Any, *, keep_lines: bool = False) -> Any:
    """The value of a named field as it may be shown; the name may say that it is a secret."""
    return _MASK if is_secret(name) else cleaned(value, keep_lines=keep_lines)


def cleaned(value: Any, *, keep_lines: bool = False) -> Any:
    """The value as it may be shown: texts redacted, escaped and shortened, nested ones, too."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {escaped(str(name)): field(str(name), item) for name, item in value.items()}
    text = redacted(value if isinstance(value, str) else str(value))
    text = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return "\n".join(map(escaped, text.splitlines())) if keep_lines else escaped(text)
