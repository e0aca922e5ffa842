"""Dead letters on the command line: how they are chosen, listed and shown. Payloads are masked unless revealed."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click
from sqlalchemy import and_, select, update

from outboxkit import dead_letters, schema_store, tables
from outboxkit.codecs import codec_named
from outboxkit.dead_letters import DeadLetter, Filter, Side, State
from outboxkit.errors import CodecError, ConfigurationError, OutboxKitError, SchemaError
from outboxkit.events import EventType
from outboxkit.headers import unpack_headers
from outboxkit.policy import duration
from outboxkit.rows import Request, StopReason
from outboxkit_relay.cli.console import output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

__all__ = [
    "Choice",
    "as_json",
    "choosing",
    "chosen",
    "how_many",
    "named",
    "release_followers",
    "reveal",
    "show",
    "show_list",
]

_LETTERS: Final = tables.dead_letters
_ID_DIGITS: Final = 32
_SHORTEST_PREFIX: Final = 4
_BYTES_SHOWN: Final = 4_096
_OUR_HEADERS: Final = ("ce_", "outboxkit-", "content-type")
_COLUMNS: Final = ("ID", "STATE", "CONSUMER", "TYPE", "KEY", "ERROR", "DIED")


# --- choosing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which letters a command line means."""

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
            raise click.UsageError(f"say what to {verb}: ids, options such as --consumer or --type, or --all")


def choosing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument and options that choose letters; the command gets a `Choice`."""

    @click.argument("names", nargs=-1, metavar="[ID]...")
    @click.option(
        "--state", type=click.Choice([*(state.value for state in State), "all"]), default=None, help="Default: dead."
    )
    @click.option("--side", type=click.Choice([side.value for side in Side]), help="Who gave up.")
    @click.option("--consumer", help="The consumer that gave up.")
    @click.option("--type", "type_name", help="The message's type.")
    @click.option("--topic", help="Where it came from, or should have gone.")
    @click.option("--key", help="The ordering key.")
    @click.option("--group", help="The fingerprint of a cause, as `dlq show` prints it.")
    @click.option("--since", metavar="AGE", help="Died within this time: 1h, 14d.")
    @click.option("--all", "everything", is_flag=True, help="All dead letters.")
    @click.option("--limit", default=1000, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
    @functools.wraps(function)
    def chosen_by(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, choice=_choice(options), **options)

    return chosen_by


def _choice(options: dict[str, Any]) -> Choice:
    taken = {
        name: options.pop(name) for name in ("state", "side", "consumer", "type_name", "topic", "key", "group", "since")
    }
    names: tuple[str, ...] = options.pop("names")
    state = taken["state"]
    which = Filter(
        state=None if state == "all" or (state is None and names) else State(state or State.DEAD),
        side=Side(taken["side"]) if taken["side"] else None,
        consumer=taken["consumer"],
        type=taken["type_name"],
        topic=taken["topic"],
        key=taken["key"].encode() if taken["key"] is not None else None,
        group=taken["group"],
        since=datetime.now(UTC) - duration(taken["since"]) if taken["since"] else None,
    )
    text = " ".join(f"{name}={value}" for name, value in taken.items() if value)
    return Choice(names=names, which=which, limit=options.pop("limit"), text=text, everything=options.pop("everything"))


def chosen(connection: Connection, choice: Choice) -> list[DeadLetter]:
    """The letters meant, the newest first; those named by id in their order.

    Raises:
        OutboxKitError: a name means no letter, or several.
    """
    if choice.names:
        return [named(connection, name) for name in dict.fromkeys(choice.names)]
    return dead_letters.find(connection, choice.which, limit=choice.limit)


def how_many(connection: Connection, choice: Choice) -> int:
    """How many there are without the limit."""
    return len(choice.names) or dead_letters.count(connection, choice.which)


def named(connection: Connection, name: str) -> DeadLetter:
    """The letter of an id, or of the first characters of one.

    Raises:
        OutboxKitError: there is none, or there are several.
    """
    digits = name.replace("-", "").lower()
    if len(digits) < _SHORTEST_PREFIX or len(digits) > _ID_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ConfigurationError(
            f"{name!r} is no id of a dead letter: expected at least its first {_SHORTEST_PREFIX} characters"
        )
    lowest, highest = UUID(digits.ljust(_ID_DIGITS, "0")), UUID(digits.ljust(_ID_DIGITS, "f"))
    ids = (
        connection.execute(select(_LETTERS.c.id).where(_LETTERS.c.id.between(lowest, highest)).limit(2)).scalars().all()
    )
    letter = dead_letters.get(connection, ids[0]) if len(ids) == 1 else None
    if letter is None:
        raise OutboxKitError(f"{name} names {'several dead letters: give more of it' if ids else 'no dead letter'}")
    return letter


def release_followers(connection: Connection, discarded: Sequence[DeadLetter], by: str) -> None:
    """Asks the relay to let the messages go on that are parked behind discarded ones.

    Transaction: joins the caller's; does not commit.
    """
    stopped = tables.outbox_stopped_keys
    for letter in discarded:
        head = and_(
            stopped.c.topic == letter.topic,
            stopped.c.key == letter.key,
            stopped.c.position == letter.source_position,
            stopped.c.reason == StopReason.PARKED,
        )
        if letter.side is Side.RELAY:
            connection.execute(update(stopped).where(head).values(request=Request.SKIP, requested_by=by))


# --- showing -----------------------------------------------------------------------------------------------------


def show_list(found: Sequence[DeadLetter]) -> None:
    """A table, one line a letter."""
    now = datetime.now(UTC)
    output.table(_COLUMNS, [_row(letter, now) for letter in found])


def _row(letter: DeadLetter, now: datetime) -> tuple[object, ...]:
    died = output.ago(now - letter.died_at) + " ago" if letter.died_at else "-"
    who = letter.consumer or "(relay)"
    return (str(letter.id)[:8], letter.state.value, who, letter.type, _text_of(letter.key), _summary(letter), died)


def show(letter: DeadLetter, content: str | None) -> None:
    """Everything about a letter: what it is, why it died, what would repair it."""
    who = letter.consumer if letter.side is Side.CONSUMER else "the relay"
    output.field(
        "letter", f"{letter.id}  {letter.state.value}" + (f", replay {letter.generation}" if letter.generation else "")
    )
    output.field("message", f"{letter.message_id}  {letter.type}  key {_text_of(letter.key)}")
    output.field("from", f"{letter.origin or letter.topic}")
    output.field(
        "gave up", f"{who}, after {letter.attempts} attempt{'s' * (letter.attempts != 1)}, at {_time(letter.died_at)}"
    )
    output.field("failure", f"{letter.failure.value} in {letter.stage.value}: {letter.error_class}")
    output.field("error", letter.error)
    if letter.path:
        output.field("field", letter.path + (f" (byte {letter.byte_offset})" if letter.byte_offset is not None else ""))
    for problem in letter.problems or ():
        output.field("problem", f"{problem.get('field', '')}: {problem.get('message', '')}".lstrip(": "))
        if problem.get("fix"):
            output.field("fix", problem["fix"])
    output.field("group", letter.group)
    _show_content(letter, content)


def _show_content(letter: DeadLetter, content: str | None) -> None:
    for name, value in _headers(letter):
        shown = (
            value.decode("utf-8", "backslashreplace")
            if content is not None or name.startswith(_OUR_HEADERS)
            else "(masked)"
        )
        output.field("header", f"{name}: {shown}")
    output.field("payload", _masked(letter.payload) if content is None else content)


def as_json(letter: DeadLetter, content: str | None = None) -> dict[str, object]:
    """A letter as JSON; the payload only when revealed."""
    hidden = ("payload", "headers", "key", "problems")
    values = {field.name: getattr(letter, field.name) for field in fields(letter) if field.name not in hidden}
    headers = {
        name: value.decode("utf-8", "backslashreplace")
        for name, value in _headers(letter)
        if content is not None or name.startswith(_OUR_HEADERS)
    }
    extra = {"payload": content} if content is not None else {"payload_bytes": len(letter.payload or b"")}
    return {
        **output.plain(values),
        "key": _text_of(letter.key),
        "problems": letter.problems,
        "headers": headers,
        **extra,
    }


def reveal(connection: Connection, letter: DeadLetter, by: str, resolve: Callable[[str], str] | None) -> str:
    """The payload as text, as far as it can be read; writes an entry of the audit log.

    Transaction: joins the caller's; does not commit.
    """
    entry = {"who": by, "action": "dlq.reveal", "target": str(letter.id)}
    connection.execute(tables.outbox_audit.insert().values(**entry))
    if letter.payload is None:
        return "(none: a tombstone)"
    return _decoded(letter, letter.payload, partial(schema_store.schema_text, connection, resolve=resolve))[
        :_BYTES_SHOWN
    ]


def _decoded(letter: DeadLetter, payload: bytes, schema_text: Callable[[str], str]) -> str:
    try:
        message = letter.message
        if "json" in message.content_type:
            return payload.decode("utf-8", "backslashreplace")
        plain = codec_named("avro").decode(message, EventType(name=letter.type, codec="avro"), schema_text)
        return json.dumps(plain, default=str, ensure_ascii=False)
    except (CodecError, SchemaError, ConfigurationError, ValueError):
        return payload[:_BYTES_SHOWN].hex(" ")


def _headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    try:
        return unpack_headers(letter.headers)
    except (ValueError, struct.error):  # whatever is wrong with one letter, it must not hide the others
        return [("(unreadable)", letter.headers)]


def _summary(letter: DeadLetter) -> str:
    first = next(iter(letter.problems or ()), None)
    if first and first.get("field"):
        return f"{first['field']}: {first.get('message', '')}"
    told = letter.error or letter.error_class
    return told if told.startswith(letter.error_class) else f"{letter.error_class}: {told}"


def _masked(payload: bytes | None) -> str:
    if payload is None:
        return "(none: a tombstone)"
    return f"{len(payload):,} bytes, sha256 {hashlib.sha256(payload).hexdigest()[:12]}…; --reveal shows it"


def _text_of(key: bytes | None) -> str:
    return "-" if key is None else key.decode("utf-8", "backslashreplace")


def _time(instant: datetime | None) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if instant else "-"
