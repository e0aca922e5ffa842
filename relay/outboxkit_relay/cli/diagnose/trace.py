"""``outboxkit trace``: what happened to this message, key or conversation?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from outboxkit_relay.cli.console import database, output
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.diagnose.trace import Trace, trace
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.words import shortened

if TYPE_CHECKING:
    from datetime import datetime

    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.diagnose.steps import Step

__all__ = ["command"]

_WORDS: Final = 9  # the longest name of a step


@click.command()
@click.argument("asked", metavar="KEY|ID|CORRELATION|TRACE")
@click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most so many messages."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one step a line.")
@click.pass_obj
def command(invocation: Invocation, asked: str, limit: int, *, as_json: bool) -> Exit:
    """Follow a message, a key or a conversation.

    One timeline over the outbox, the brokers' evidence, each consumer's inbox, retries, dead letters and replays, with
    all that the messages caused. Payloads are not shown. A key, a correlation id or a trace id is known while a message
    is stored; what was published and handled is found by its id. Of an id the first characters are enough, as lists
    print them. Exit code 3 when nothing is known.
    """
    with database.reading(invocation) as connection:
        found = trace(connection, asked, limit=limit)
        if not found.steps:
            found = trace(connection, find_message.named(connection, asked), limit=limit)
    if as_json:
        for step in found.steps:
            at = None if step.at is None else step.at.isoformat()
            facts = output.plain(step.facts)
            output.print_json({"at": at, "message": step.message_id, "what": step.what, "text": step.text, **facts})
    else:
        _show(found)
    return Exit.OK if found.steps else Exit.PROBLEMS


def _show(found: Trace) -> None:
    if not found.steps:
        click.echo(
            f"nothing is known of {output.safe(found.asked)}: it was never committed, or is no longer kept; "
            "what was published and handled is found by the id of its message",
            err=True,
        )
        return
    day, short = None, shortened(step.message_id for step in found.steps)
    width = max(map(len, short.values()))
    for step in found.steps:
        if step.at is not None and step.at.date() != day:
            day = step.at.date()
            click.echo(f"{day} UTC")
        _show_step(step, f"{short[step.message_id]:<{width}}")
    if not found.is_whole:
        click.echo("there are more messages: --limit shows them", err=True)


def _show_step(step: Step, short: str) -> None:
    at = "now" if step.at is None else _time(step.at)
    name = f"  {at:<12}  {short}  {step.what:<{_WORDS}}"
    output.field(output.safe(name), step.text, len(name))


def _time(at: datetime) -> str:
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}"
