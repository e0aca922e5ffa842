"""``outboxkit quarantine``: keys whose order is held, because the message at their head failed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit.rows import Request, StopReason
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.store import stopped_keys
from outboxkit_relay.store.stopped_keys import KeyStop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_COLUMNS: Final = ("TOPIC", "KEY", "STATE", "TRIES", "NEXT TRY", "BEHIND", "ASKED", "ERROR")
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one key a line.")


@click.group()
def command() -> None:
    """See stopped keys, let them go on, or skip their heads.

    A key is stopped when a message of it fails: the message is its head, and later messages of the key wait behind it.
    What you ask here is recorded; the relay that owns the key does it within a third of its lease.
    """


@command.command("list")
@click.option("--topic", help="Only keys of this topic.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@_JSON
@click.pass_obj
def list_stops(invocation: Invocation, topic: str | None, limit: int, *, as_json: bool) -> None:
    """List stopped keys and why their heads failed."""
    with database.reading(invocation) as connection:
        found = stopped_keys.list_stopped(connection, topic=topic, limit=limit)
        total = stopped_keys.count_stopped_keys(connection, topic=topic)
    if as_json:
        for stop in found:
            output.print_json({**output.plain(asdict(stop)), "key": output.text_of(stop.key)})
        return
    if not found:
        click.echo("no stopped keys", err=True)
        return
    now = datetime.now(UTC)
    output.table(_COLUMNS, [_row(stop, now) for stop in found], whole=("TOPIC", "KEY"))
    if total > len(found):
        click.echo(f"{len(found):,} of {total:,}: --limit shows more", err=True)


def _asking(function: Callable[..., int]) -> Callable[..., int]:
    """Adds what `release` and `skip` take."""

    @click.argument("topic")
    @click.argument("keys", metavar="KEY...", nargs=-1, required=True)
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """A key of the command line, what is asked of it, and what was found of it; None when it is not stopped."""

    topic: str
    text: str
    what: Request
    stop: KeyStop | None

    @property
    def refusal(self) -> str:
        """Says why nothing can be asked of it; empty when it can."""
        if self.stop is None:
            return "it is not stopped"
        return "its dead head is being replayed" if self.stop.request == Request.REPAIR else ""

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
    (topic, keys), why = target, options.pop("why")
    with database.reading(invocation) as connection:
        asked = [_Asked(topic, key, what, _stopped(connection, topic, key)) for key in dict.fromkeys(keys)]
    stops = [one.stop for one in asked if one.stop is not None and not one.refusal]

    def record() -> list[Result]:
        with database.writing(invocation) as connection:
            return [one.result(f"asked for {what}", _recorded(connection, one, why)) for one in asked]

    change = Change(
        expected=[one.result(f"would ask for {what}", one.refusal) for one in asked],
        question=_question(what, topic, stops) if stops else "",
        apply=record,
    )
    return confirm_and_apply(change, **options)


def _recorded(connection: Connection, asked: _Asked, why: str) -> str:
    """Records a request; returns the refusal, or nothing."""
    stop = asked.stop
    if stop is None or asked.refusal:
        return asked.refusal
    is_recorded = stopped_keys.request(
        connection, asked.topic, stop.key, asked.what, by=who(), why=why, position=stop.position
    )
    return "" if is_recorded else "its head is another one by now: look again"


def _stopped(connection: Connection, topic: str, text: str) -> KeyStop | None:
    """Returns the stopped key that `list` shows like this; it writes bytes that cannot be shown as escapes."""
    raw = text.encode("utf-8", "surrogateescape")
    escaped = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), raw)
    for key in dict.fromkeys((raw, escaped)):
        if found := stopped_keys.list_stopped(connection, topic=topic, key=key):
            return found[0]
    return None


def _question(what: Request, topic: str, stops: Sequence[KeyStop]) -> str:
    keys, behind = len(stops), sum(stop.followers for stop in stops)
    named = f"the key {output.text_of(stops[0].key)}" if keys == 1 else f"{keys:,} keys"
    return f"{what.value.capitalize()} {named} of {topic} ({output.count(behind, 'message')} behind)?"


def _meaning(what: Request, stop: KeyStop) -> str:
    """Says what the relay will do."""
    rest = f"{output.count(stop.followers, 'message')} behind it go{'es' * (stop.followers == 1)} on"
    if stop.reason == StopReason.PARKED:
        return f"its head is dead, {rest}"
    return "its head is tried at once" if what is Request.RELEASE else f"its head becomes a dead letter, {rest}"


def _row(stop: KeyStop, now: datetime) -> tuple[object, ...]:
    due = "-" if stop.due_at is None else "now" if stop.due_at <= now else f"in {output.ago(stop.due_at - now)}"
    asked = stop.request or "-"
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
