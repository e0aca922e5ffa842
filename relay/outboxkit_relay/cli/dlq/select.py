"""Choosing dead letters on the command line: by id, or by options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click
from sqlalchemy import select

from outboxkit import dead_letters, tables
from outboxkit.dead_letters import DeadLetter, Filter, Side, State
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.outbox import pauses
from outboxkit.policy import Failure, duration

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

__all__ = ["NOTHING", "Choice", "choosing", "chosen", "how_many", "named", "numbered"]

NOTHING: Final = "no dead letters match: nothing to do"
_ID_DIGITS: Final = 32
_SHORTEST_PREFIX: Final = 4
_FILTERS: Final = ("state", "side", "consumer", "type_name", "topic", "key", "group", "failure", "error_class", "since")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The letters that a command line means."""

    names: tuple[str, ...]
    which: Filter
    limit: int
    text: str
    everything: bool

    def require_some(self, verb: str) -> None:
        """Refuses to change everything by accident.

        Raises:
            click.UsageError: neither an id nor an option chooses.
        """
        if not self.names and not self.text and not self.everything:
            raise click.UsageError(f"say what to {verb}: ids, options such as --consumer or --group, or --all")


def choosing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument and options that choose letters; the command gets a `Choice`."""

    @click.argument("names", nargs=-1, metavar="[ID]...")
    @click.option(
        "--state", type=click.Choice([*(state.value for state in State), "all"]), default=None, help="Default: dead."
    )
    @click.option("--side", type=click.Choice([side.value for side in Side]), help="The part that gave up.")
    @click.option("--consumer", help="The consumer that gave up.")
    @click.option("--type", "type_name", help="The message's type.")
    @click.option("--topic", help="Where it came from, or should have gone.")
    @click.option("--key", help="The ordering key, as `list` shows it.")
    @click.option("--group", help="The group of a cause, as `groups` shows it.")
    @click.option("--failure", type=click.Choice([failure.value for failure in Failure]), help="The kind of failure.")
    @click.option("--error", "error_class", metavar="CLASS", help="The class of the error.")
    @click.option("--since", metavar="AGE", help="Died within this time: 1h, 14d.")
    @click.option("--all", "everything", is_flag=True, help="All dead letters.")
    @click.option("--limit", default=1000, show_default=True, type=click.IntRange(1, 1_000_000), help="At most.")
    @functools.wraps(function)
    def chosen_by(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, choice=_choice(options), **options)

    return chosen_by


def _choice(options: dict[str, Any]) -> Choice:
    taken = {name: options.pop(name) for name in _FILTERS}
    names: tuple[str, ...] = options.pop("names")
    state = taken["state"]
    which = Filter(
        state=None if state == "all" or (state is None and names) else State(state or State.DEAD),
        side=Side(taken["side"]) if taken["side"] else None,
        consumer=taken["consumer"],
        type=taken["type_name"],
        topic=taken["topic"],
        key=pauses.unescaped(taken["key"]) if taken["key"] is not None else None,
        group=taken["group"],
        failure=Failure(taken["failure"]) if taken["failure"] else None,
        error_class=taken["error_class"],
        since=datetime.now(UTC) - duration(taken["since"]) if taken["since"] else None,
    )
    text = " ".join(f"{name}={value}" for name, value in taken.items() if value)
    return Choice(names=names, which=which, limit=options.pop("limit"), text=text, everything=options.pop("everything"))


def chosen(connection: Connection, choice: Choice) -> list[DeadLetter]:
    """Returns the letters meant, the newest first; those named by id in their order.

    Raises:
        OutboxKitError: a name means no letter, or several.
    """
    if choice.names:
        return [named(connection, name) for name in dict.fromkeys(choice.names)]
    return dead_letters.find(connection, choice.which, limit=choice.limit)


def how_many(connection: Connection, choice: Choice) -> int:
    """Counts the letters meant, without the limit."""
    return len(choice.names) or dead_letters.count(connection, choice.which)


def named(connection: Connection, name: str) -> DeadLetter:
    """Returns the letter of an id, or of the first characters of one.

    Raises:
        OutboxKitError: there is none, or there are several.
    """
    letter = dead_letters.get(connection, numbered(connection, tables.dead_letters, name, "dead letter"))
    if letter is None:
        raise OutboxKitError(f"{name} names no dead letter")
    return letter


def numbered(connection: Connection, table: Table, name: str, what: str) -> UUID:
    """Returns the id of a row that is named by its first characters.

    Raises:
        ConfigurationError: the name cannot be one.
        OutboxKitError: there is none, or there are several.
    """
    digits = name.replace("-", "").lower()
    if len(digits) < _SHORTEST_PREFIX or len(digits) > _ID_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ConfigurationError(
            f"{name!r} is no id of a {what}: expected at least its first {_SHORTEST_PREFIX} characters"
        )
    lowest, highest = UUID(digits.ljust(_ID_DIGITS, "0")), UUID(digits.ljust(_ID_DIGITS, "f"))
    query = select(table.c.id).where(table.c.id.between(lowest, highest)).limit(2)
    ids: list[UUID] = list(connection.scalars(query))
    if len(ids) != 1:
        raise OutboxKitError(f"{name} names {f'several {what}s: give more of it' if ids else f'no {what}'}")
    return ids[0]
