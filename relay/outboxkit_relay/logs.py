"""Logs: one line per change of state, as JSON or text, on standard error.

Every value passes through `outboxkit_relay.redaction`. Libraries that would print rows, bound values or frames are
capped at every level: what passes through a relay is nobody's business but the broker's.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog

from outboxkit_relay import redaction

if TYPE_CHECKING:
    from collections.abc import Collection, MutableMapping
    from typing import TextIO

__all__ = ["configure"]

# Their lesser lines hold rows, bound values, frames or the reprs of callbacks. An engine with `echo` ignores the level
# of its logger, so the handler asks once more.
_CAPPED: Final = (
    *("aio_pika", "aiormq", "aiosqlite", "asyncio", "asyncpg", "confluent_kafka", "pamqp", "psycopg", "sqlalchemy"),
    *("httpcore", "httpx", "requests", "urllib3"),
)
# They repeat for every attempt what we say once for every change of state: said on request only.
_TALKATIVE: Final = ("aio_pika", "aiormq", "outboxkit.brokers.kafka.client", "sqlalchemy.engine", "sqlalchemy.pool")


def configure(level: str, form: str, *, secrets: Collection[str] = (), stream: TextIO | None = None) -> None:
    """Sends all logging of the process, our own and that of libraries, to one stream in one form.

    Args:
        level: the least severe level: debug, info, warning, error.
        form: ``json``, ``text``, or ``auto``: text on a terminal, JSON elsewhere.
        secrets: values that must never appear.
        stream: default: standard error.
    """
    redaction.remember(secrets)
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
    handler.addFilter(_is_no_data)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    talkative = logging.CRITICAL if root.level > logging.DEBUG else logging.WARNING
    caps = {**dict.fromkeys(_CAPPED, logging.WARNING), **dict.fromkeys(_TALKATIVE, talkative)}
    for library, cap in caps.items():
        logging.getLogger(library).setLevel(cap)
    logging.captureWarnings(capture=True)


def _is_no_data(record: logging.LogRecord) -> bool:
    """False for what a capped library says below a warning."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in _CAPPED


def _clean(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {
        redaction.escaped(name): redaction.field(name, value, keep_lines=name == "exception")
        for name, value in event.items()
    }


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
    text = _words(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text


def _words(value: object) -> str:
    """The value as people write it; in JSON it has its kind."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
