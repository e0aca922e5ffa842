"""Failures of a command: one line that says what to do, and the right exit code."""

from __future__ import annotations

import difflib
import logging
import re
import traceback
from pathlib import Path

import click

from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit_relay import redaction
from outboxkit_relay.exit_codes import Exit

__all__ = ["report"]

_INTERRUPTED = 130
_INSUFFICIENT_PRIVILEGE = "42501"  # SQLSTATE
_EXTRAS = {  # modules that an extra brings; any other belongs to the application that was loaded
    "aio_pika",
    "aiormq",
    "aiosqlite",
    "confluent_kafka",
    "fastavro",
    "jinja2",
    "pamqp",
    "prometheus_client",
    "psycopg",
    "pydantic",
    "pydantic_settings",
    "rich",
    "starlette",
    "structlog",
    "uvicorn",
}


def report(error: Exception) -> int:
    """Says what went wrong; returns the exit code."""
    if isinstance(error, click.ClickException):
        return _show(error)
    if isinstance(error, click.Abort):
        return _INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else Exit.FAILED
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("outboxkit"):
        ours = (error.name or "").partition(".")[0] in _EXTRAS
        what = "run: pip install 'outboxkit[all]'" if ours else "is it installed in this environment?"
        return _say(f"this command needs the module {error.name}; {what}", Exit.USAGE)
    if isinstance(error, ConfigurationError):
        return _say(error.message, Exit.USAGE)
    if isinstance(error, OutboxKitError):
        return _say(error.message, Exit.FAILED)
    return _unexpected(error)


def _show(error: click.ClickException) -> int:
    """Says it as click does, which repeats what was typed."""
    vars(error)["message"] = redaction.escaped(redaction.redacted(error.message))
    error.show()
    if not isinstance(error, click.UsageError):
        return Exit.FAILED
    if meant := _meant(error):
        click.echo(f"Did you mean {meant}?", err=True)
    return Exit.USAGE


def _meant(error: click.UsageError) -> str:
    """Returns the command that a mistyped one may stand for, empty where none is close."""
    wrong = re.fullmatch(r"No such command '(.+)'\.", error.message)
    if wrong is None or error.ctx is None or not isinstance(error.ctx.command, click.Group):
        return ""
    close = difflib.get_close_matches(wrong[1], error.ctx.command.list_commands(error.ctx), 1)
    return f"{error.ctx.command_path} {close[0]}" if close else ""


def _unexpected(error: Exception) -> int:
    driver = getattr(error, "orig", None) or error  # of SQLAlchemy's wrapper the driver's class says more
    state = getattr(driver, "sqlstate", None)
    if state == _INSUFFICIENT_PRIVILEGE:
        said = str(driver).partition("\n")[0]  # names of ours, no data
        return _say(
            f"the database login lacks a right: {said}; `outboxkit db roles` makes roles that have it", Exit.USAGE
        )
    what = f"{type(driver).__name__} (SQLSTATE {state})" if state else type(driver).__name__
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        click.echo(redaction.redacted("".join(traceback.format_exception(error))), err=True)
        return Exit.FAILED
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in last)
    return _say(f"unexpected {what}{where}; OUTBOXKIT_LOG__LEVEL=debug shows all of it", Exit.FAILED)


def _say(text: str, code: Exit) -> int:
    click.echo(f"outboxkit: {redaction.escaped(redaction.redacted(text))}", err=True)
    return code
