"""Directives that write reference pages from the code, so that they cannot drift: commands, settings, errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.util.docutils import SphinxDirective

from outboxkit import errors
from outboxkit_relay.cli.main import COMMANDS, program
from outboxkit_relay.settings import PREFIX, DestinationSettings, Settings

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["commands", "errors_by_code", "settings", "setup"]


def commands() -> Iterator[str]:
    """Every command with its options, as Markdown."""
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
    yield from (f"## `{' '.join([path, *arguments])}`", "", *_paragraphs(command.help), "")
    options = [one for one in command.params if isinstance(one, click.Option)]
    if options:
        yield from ("| option | meaning |", "|---|---|")
        yield from (_option(one, click.Context(command)) for one in options)
        yield ""


def _paragraphs(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines()]


def _option(option: click.Option, ctx: click.Context) -> str:
    name, text = option.get_help_record(ctx) or ("", "")
    name, text = (part.replace("|", "\\|") for part in (name, text))  # a pipe would end the cell
    return f"| `{name}` | {text} |"


def settings() -> Iterator[str]:
    """Every setting: its key in the file, its variable, its default."""
    head = ("| key | variable | default | meaning |", "|---|---|---|---|")
    yield from head
    yield from _settings(Settings, "", PREFIX)
    yield from ("", "Of one topic or queue:", "", *head)
    yield from _settings(DestinationSettings, "destinations.NAME.", f"{PREFIX}DESTINATIONS__NAME__")


def _settings(model: type[BaseModel], key: str, variable: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{key}{name}.", f"{variable}{name.upper()}__")
        else:
            default = "" if field.default is None or field.default_factory else f"`{_plain(field.default)}`"
            yield f"| `{key}{name}` | `{variable}{name.upper()}` | {default} | {field.description} |"


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
    """Every error: its code, which is stable, and what it says."""
    for name in errors.__all__:
        error: type[errors.OutboxKitError] = getattr(errors, name)
        base = error.__mro__[1].__name__
        yield from (f"## {error.code}", "", f"`{name}`, a kind of `{base}`.", "", *_paragraphs(error.__doc__), "")


class _Written(SphinxDirective):
    """A directive whose content is written by a function."""

    write: Callable[[], Iterator[str]]

    def run(self) -> list[nodes.Node]:
        """As if the content stood in the page."""
        self.content = StringList(list(type(self).write()), source=self.env.doc2path(self.env.docname))
        return self.parse_content_to_nodes(allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    written = {"outboxkit-commands": commands, "outboxkit-settings": settings, "outboxkit-errors": errors_by_code}
    for name, function in written.items():
        app.add_directive(name, type(name, (_Written,), {"write": staticmethod(function)}))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
