"""``outboxkit quarantine``: keys whose order is held, because the message at their head failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from outboxkit.consumer import quarantine
from outboxkit.inbox import held
from outboxkit.inbox.held import HeldKey
from outboxkit.rows import Request, StopReason
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.known_consumers import nothing_found
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.store import stopped_keys
from outboxkit_relay.store.stopped_keys import KeyStop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_COLUMNS: Final = ("TOPIC", "KEY", "STATE", "TRIES", "NEXT TRY", "BEHIND", "ASKED", "ERROR")
_CONSUMER: Final = click.option("--consumer", metavar="NAME", help="Keys of this consumer, not of the relays.")
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one key a line.")


@click.group()
def command() -> None:
    """See stopped keys, let them go on, or skip their heads.

    A key is stopped when a message of it fails: the message is its head, and later messages of the key wait behind it.
    Of relays, what you ask is recorded; the one that owns the key does it within a third of its lease. With --consumer
    the keys are those of a consumer, and what you ask is done at once.
    """


@command.command("list")
@click.option("--topic", help="Only keys of this topic.")
@_CONSUMER
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@_JSON
@click.pass_obj
def list_stops(invocation: Invocation, topic: str | None, consumer: str | None, limit: int, *, as_json: bool) -> None:
    """List stopped keys and why their heads failed."""
    with database.reading(invocation) as connection:
        found, total = _keys_of(consumer).list(connection, topic, limit)
        nothing = "" if found else nothing_found(connection, consumer, "no stopped keys")
    if as_json:
        for stop in found:
            output.print_json({**output.plain(asdict(stop)), "key": output.text_of(stop.key)})
        return
    if not found:
        click.echo(nothing, err=True)
        return
    now = datetime.now(UTC)
    output.table(_COLUMNS, [_row(stop, now) for stop in found], whole=("TOPIC", "KEY"))
    if total > len(found):
        click.echo(f"{len(found):,} of {total:,}: --limit shows more", err=True)


def _asking(function: Callable[..., int]) -> Callable[..., int]:
    """Adds what `release` and `skip` take."""

    @click.argument("topic")
    @click.argument("keys", metavar="KEY...", nargs=-1, required=True)
    @_CONSUMER
    @click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
    @asking
    @click.pass_obj
    @wraps(function)
    def asked(invocation: Invocation, /, **options: Any) -> int:
        return function(invocation, options.pop("topic"), options.pop("keys"), options)

    return asked


@command.command("release")
@_asking
def release(invocation: Invocation, topic: str, keys: tuple[str, ...], options: dict[str, Any]) -> int:
    """Try waiting heads at once; behind a dead head let the others go on.

    A key is written as `list` shows it.
    """
    return _ask(invocation, Request.RELEASE, (topic, keys), options)


@command.command("skip")
@_asking
def skip(invocation: Invocation, topic: str, keys: tuple[str, ...], options: dict[str, Any]) -> int:
    """Make waiting heads dead letters, and let the others go on.

    A head that is at the broker just now is heard out first. A key is written as `list` shows it.
    """
    return _ask(invocation, Request.SKIP, (topic, keys), options)


Stop = KeyStop | HeldKey


class _Keys(Protocol):
    """Keys of the relays, or of one consumer."""

    @property
    def outcomes(self) -> Mapping[Request, tuple[str, str]]:
        """Words for a request: before and after it is made."""
        ...

    def list(self, connection: Connection, topic: str | None, limit: int) -> tuple[Sequence[Stop], int]: ...

    def find(self, connection: Connection, topic: str, key: bytes) -> Sequence[Stop]: ...

    def ask(self, connection: Connection, what: Request, stop: Stop, why: str) -> bool: ...


class _OfRelays:
    """Keys that relays have stopped: requests are recorded for them."""

    outcomes: Final = {what: (f"would ask for {what}", f"asked for {what}") for what in Request}

    def list(self, connection: Connection, topic: str | None, limit: int) -> tuple[Sequence[Stop], int]:
        found = stopped_keys.list_stopped(connection, topic=topic, limit=limit)
        return found, stopped_keys.count_stopped_keys(connection, topic=topic)

    def find(self, connection: Connection, topic: str, key: bytes) -> Sequence[Stop]:
        return stopped_keys.list_stopped(connection, topic=topic, key=key)

    def ask(self, connection: Connection, what: Request, stop: Stop, why: str) -> bool:
        assert isinstance(stop, KeyStop)  # noqa: S101  `find` gave it
        return stopped_keys.request(connection, stop.topic, stop.key, what, by=who(), why=why, position=stop.position)


class _OfConsumer:
    """Keys that a consumer holds: requests are carried out at once."""

    outcomes: Final = {
        Request.RELEASE: ("would be released", "released"),
        Request.SKIP: ("would be skipped", "skipped"),
    }

    def __init__(self, consumer: str) -> None:
        self._consumer = consumer

    def list(self, connection: Connection, topic: str | None, limit: int) -> tuple[Sequence[Stop], int]:
        found = held.held(connection, self._consumer, topic=topic, limit=limit)
        return found, held.count_held(connection, self._consumer, topic=topic)

    def find(self, connection: Connection, topic: str, key: bytes) -> Sequence[Stop]:
        return held.held(connection, self._consumer, topic=topic, key=key)

    def ask(self, connection: Connection, what: Request, stop: Stop, why: str) -> bool:
        assert isinstance(stop, HeldKey)  # noqa: S101  `find` gave it
        return (quarantine.release if what is Request.RELEASE else quarantine.skip)(connection, stop, by=who(), why=why)


def _keys_of(consumer: str | None) -> _Keys:
    return _OfRelays() if consumer is None else _OfConsumer(consumer)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A key of the command line, what is asked of it, and what was found of it; None when it is not stopped."""

    topic: str
    text: str
    what: Request
    stop: Stop | None

    @property
    def refusal(self) -> str:
        """Says why nothing can be asked of it; empty when it can."""
        if self.stop is None:
            return "it is not stopped"
        request = self.stop.request if isinstance(self.stop, KeyStop) else None
        return "its dead head is being replayed" if request == Request.REPAIR else ""

    def result(self, outcome: str, refusal: str) -> Result:
        """Returns the result for this key."""
        meaning = _meaning(self.what, self.stop) if self.stop is not None else ""
        return Result(
            name=f"{self.topic}  {self.text}",
            outcome="refused" if refusal else outcome,
            done=not refusal,
            reason=refusal or meaning,
            facts={"topic": self.topic, "key": self.text},
        )


def _ask(invocation: Invocation, what: Request, target: tuple[str, tuple[str, ...]], options: dict[str, Any]) -> int:
    """Looks, asks, records, tells: only heads that were looked at are concerned."""
    (topic, names), why, keys = target, options.pop("why"), _keys_of(options.pop("consumer"))
    with database.reading(invocation) as connection:
        asked = [_Asked(topic, name, what, _stopped(connection, keys, topic, name)) for name in dict.fromkeys(names)]
    would, done = keys.outcomes[what]
    stops = [one.stop for one in asked if one.stop is not None and not one.refusal]

    def record() -> list[Result]:
        with database.writing(invocation) as connection:
            return [one.result(done, _recorded(connection, keys, one, why)) for one in asked]

    change = Change(
        expected=[one.result(would, one.refusal) for one in asked],
        question=_question(what, topic, stops) if stops else "",
        apply=record,
    )
    return confirm_and_apply(change, **options)


def _recorded(connection: Connection, keys: _Keys, asked: _Asked, why: str) -> str:
    """Records a request; returns the refusal, or nothing."""
    stop = asked.stop
    if stop is None or asked.refusal:
        return asked.refusal
    is_done = keys.ask(connection, asked.what, stop, why)
    return "" if is_done else "its head is another one by now: look again"


def _stopped(connection: Connection, keys: _Keys, topic: str, text: str) -> Stop | None:
    """Returns the stopped key that `list` shows like this; it writes bytes that cannot be shown as escapes."""
    raw = text.encode("utf-8", "surrogateescape")
    escaped = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), raw)
    for key in dict.fromkeys((raw, escaped)):
        if found := keys.find(connection, topic, key):
            return found[0]
    return None


def _question(what: Request, topic: str, stops: Sequence[Stop]) -> str:
    keys, behind = len(stops), sum(stop.followers for stop in stops)
    named = f"the key {output.text_of(stops[0].key)}" if keys == 1 else f"{keys:,} keys"
    return f"{what.value.capitalize()} {named} of {topic} ({output.count(behind, 'message')} behind)?"


def _meaning(what: Request, stop: Stop) -> str:
    """Says what will happen."""
    rest = f"{output.count(stop.followers, 'message')} behind it go{'es' * (stop.followers == 1)} on"
    if stop.reason == StopReason.PARKED:
        return f"its head is dead, {rest}"
    return "its head is tried at once" if what is Request.RELEASE else f"its head becomes a dead letter, {rest}"


def _row(stop: Stop, now: datetime) -> tuple[object, ...]:
    due = "-" if stop.due_at is None else "now" if stop.due_at <= now else f"in {output.ago(stop.due_at - now)}"
    asked = (isinstance(stop, KeyStop) and stop.request) or "-"
    return (
        stop.topic,
        output.text_of(stop.key),
        stop.reason,
        stop.attempts,
        due,
        stop.followers,
        asked,
        stop.error or "-",
    )
