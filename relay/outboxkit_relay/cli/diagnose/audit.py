"""``outboxkit audit``: is every message accounted for?"""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click

from outboxkit_relay.cli.console import database, output
from outboxkit_relay.diagnose.audit import Audit, audit
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.diagnose.contradictions import Contradiction

__all__ = ["command"]

_PATIENCE: Final = timedelta(minutes=10)  # for one statement: the ledger is read as a whole


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(invocation: Invocation, *, as_json: bool) -> Exit:
    """Is every message accounted for? Exit code 3 when something contradicts itself.

    Counts each message once, in one snapshot: pending, waiting, dead, published, as far back as `retention.ledger`
    keeps evidence. Then looks for states that no run of outboxkit leaves behind: rows that were edited by hand, mixed
    restores, defects. It reads all of the ledger: give it a quiet hour.

    Of an inbox, open are messages that are claimed and not handled: their replay is under way.
    """
    with database.snapshot(invocation, patience=_PATIENCE) as connection:
        found = audit(connection)
    if as_json:
        output.print_json(asdict(found) | {"verdict": "contradictions" if found.contradictions else "conserved"})
    else:
        _show(found)
    return Exit.PROBLEMS if found.contradictions else Exit.OK


def _show(found: Audit) -> None:
    since = "" if found.since is None else f", evidence since {found.since:%Y-%m-%d %H:%M:%S} UTC"
    if found.contradictions:
        number = output.count(sum(one.count for one in found.contradictions), "contradiction")
        output.verdict("Broken", f"{number}{since}", "red")
    else:
        output.verdict("Conserved", f"{output.count(found.emitted, 'message')}, each in one account{since}", "green")
    click.echo()
    output.table(("ACCOUNT", "MESSAGES"), [*found.accounts.items(), ("emitted", found.emitted)])
    if found.inbox:
        click.echo()
        columns = ("handled", "dead", "open", "waiting")
        rows = [(consumer, *(numbers[name] for name in columns)) for consumer, numbers in found.inbox.items()]
        output.table(("INBOX", *map(str.upper, columns)), rows)
    for one in found.contradictions:
        click.echo()
        _show_contradiction(one)


def _show_contradiction(one: Contradiction) -> None:
    output.field(click.style(f"{one.name:<12}", bold=True), f"{one.count:,}: {one.meaning}")
    output.field("for example", ", ".join(one.examples))
    output.field("fix", one.fix)
