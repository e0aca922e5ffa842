"""Reference pages from the command line, the settings and the errors, as Markdown."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator
from typing import Any

import click
from api_reference import prose
from pydantic import BaseModel

from outboxkit import errors
from outboxkit_relay.cli.main import COMMANDS, program
from outboxkit_relay.sections import DestinationSettings
from outboxkit_relay.settings import PREFIX, Settings

__all__ = ["commands", "errors_by_code", "settings"]


def commands() -> Iterator[str]:
    """Yields every command with its options."""
    yield from _command("outboxkit", program)
    for name, (module, _) in COMMANDS.items():
        yield from _tree(f"outboxkit {name}", importlib.import_module(module).command)


def _tree(path: str, command: click.Command) -> Iterator[str]:
    yield from _command(path, command)
    if isinstance(command, click.Group):
        for name, sub in sorted(command.commands.items()):
            yield from _tree(f"{path} {name}", sub)


def _command(path: str, command: click.Command) -> Iterator[str]:
    arguments = [one.make_metavar(click.Context(command)) for one in command.params if isinstance(one, click.Argument)]
    yield from (f"## `{' '.join([path, *arguments])}`", "", textwrap.dedent(command.help or ""), "")
    options = [one for one in command.params if isinstance(one, click.Option)]
    if options:
        yield from ("| option | meaning |", "|---|---|")
        yield from (_option(one, click.Context(command)) for one in options)
        yield ""


def _option(option: click.Option, ctx: click.Context) -> str:
    name, text = option.get_help_record(ctx) or ("", "")
    return f"| `{_cell(name)}` | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")  # a pipe would end the cell


def settings() -> Iterator[str]:
    """Yields every setting, a table for each section: its key, its variable, its default."""
    yield from _section(Settings, "", PREFIX)
    yield from _section(DestinationSettings, "destinations.NAME.", f"{PREFIX}DESTINATIONS__NAME__")


def _section(model: type[BaseModel], key: str, variable: str) -> Iterator[str]:
    title = f"`[{key.rstrip('.')}]`" if key else "At the top of the file"
    yield from (f"## {title}", "", "| setting | meaning, variable, default |", "|---|---|")
    sections = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections.append((kind, f"{key}{name}.", f"{variable}{name.upper()}__"))
        elif not field.exclude:
            default = "" if field.default is None or field.default_factory else f" = `{_plain(field.default)}`"
            said = f"{_cell(field.description or '')}<br>`{variable}{name.upper()}`{default}"
            yield f"| `{key}{name}` | {said} |"
    yield ""
    for section in sections:
        yield from _section(*section)


def _plain(value: Any) -> str:
    seconds = getattr(value, "total_seconds", None)
    if seconds is None:
        return str(getattr(value, "value", value))
    whole: float = seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        if whole >= size and whole % size == 0:
            return f"{whole / size:.0f}{unit}"
    return f"{whole * 1000:.0f}ms"


def errors_by_code() -> Iterator[str]:
    """Yields every error: its code, which is stable, and its meaning."""
    for name in errors.__all__:
        error: type[errors.OutboxKitError] = getattr(errors, name)
        yield from (f"## {error.code}", "", f"`{name}`, a kind of `{error.__mro__[1].__name__}`.", "")
        yield from (*prose(error), "")
