"""What the daemon says: one line per change of state, as JSON or text, on standard error.

Secrets never get there: known ones are replaced wherever they appear, unknown ones where they look like one. Control
characters are escaped, so that no message can forge a line or command a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import structlog

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, MutableMapping
    from typing import TextIO

__all__ = ["cause", "configure", "escaped", "is_secret", "redacted", "secrets_of"]

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

# Clients repeat for every attempt what we say once for every change of state.
_TALKATIVE: Final = ("aiormq", "outboxkit.brokers.kafka.client", "sqlalchemy.engine", "sqlalchemy.pool")

_known: set[str] = set()


def cause(error: BaseException) -> str:
    """What a driver says of a database that is away: its first line names host and reason, never data."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def configure(level: str, form: str, *, secrets: Collection[str] = (), stream: TextIO | None = None) -> None:
    """Sends all logging of the process, our own and that of libraries, to one stream in one form.

    Args:
        level: the least severe level: debug, info, warning, error.
        form: ``json``, ``text``, or ``auto``: text on a terminal, JSON elsewhere.
        secrets: values that must never appear.
        stream: default: standard error.
    """
    _known.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
    out = stream or sys.stderr
    as_text = form == "text" or (form == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _clean,
                _text_line if as_text else _json_line,
            ],
        ),
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.DEBUG if root.level <= logging.DEBUG else logging.CRITICAL)
    logging.captureWarnings(capture=True)


def secrets_of(url: str) -> Iterator[str]:
    """What must stay secret of a URL: its password as written and as meant, and everything secret in its query."""
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


def _clean(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {
        escaped(name): _MASK if is_secret(name) else _cleaned(value, keep_lines=name == "exception")
        for name, value in event.items()
    }


def _cleaned(value: Any, *, keep_lines: bool = False) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {escaped(str(name)): _MASK if is_secret(str(name)) else _cleaned(item) for name, item in value.items()}
    text = redacted(value if isinstance(value, str) else str(value))
    text = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return "\n".join(map(escaped, text.splitlines())) if keep_lines else escaped(text)


_FIRST: Final = ("timestamp", "level", "event")


def _json_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    ordered = {name: event.pop(name) for name in _FIRST if name in event} | dict(event)
    return json.dumps(ordered, ensure_ascii=False, default=str)


def _text_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    time, level, name = (str(event.pop(part, "")) for part in _FIRST)
    trace = event.pop("exception", None)
    event.pop("logger", None)
    fields = " ".join(f"{key}={_quoted(value)}" for key, value in event.items())
    line = f"{time[11:19]} {level:<7} {name} {fields}".rstrip()
    return f"{line}\n{trace}" if trace else line


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
