"""``outboxkit prune``: deletes what its retention no longer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from outboxkit_relay.cli.console import database, output
from outboxkit_relay.store import retention

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_PORTION: Final = 10_000  # rows of each table in one transaction: short ones, whatever has piled up


@click.command()
@click.option("--dry-run", is_flag=True, help="Count, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(invocation: Invocation, *, dry_run: bool, as_json: bool) -> None:
    """Delete what its retention no longer keeps.

    Closed dead letters, ended sagas, the evidence of what was published, the memory of inboxes, the audit log. Never an
    unpublished message, never an open dead letter, never a saga that is under way.
    """
    total = dict.fromkeys(retention.PRUNED, 0)
    with database.writing(invocation) as connection:
        found = retention.prune(connection, invocation.settings.retention, dry_run=dry_run, limit=_PORTION)
    total |= found
    while not dry_run and any(count >= _PORTION for count in found.values()):
        with database.writing(invocation) as connection:
            found = retention.prune(connection, invocation.settings.retention, limit=_PORTION)
        total = {name: total[name] + count for name, count in found.items()}
    if as_json:
        output.print_json({"dry_run": dry_run, "deleted": total})
        return
    output.table(["TABLE", "WOULD DELETE" if dry_run else "DELETED"], list(total.items()))
