"""``outboxkit dlq edit`` and ``repair``: another content for dead messages, checked before it is sent."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from outboxkit import dead_letters, schema_store
from outboxkit.dead_letters import DeadLetter, Decision, Terms, repair
from outboxkit.errors import OutboxKitError
from outboxkit_relay.cli.console import database, import_string, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.known_consumers import nothing_found
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq import select
from outboxkit_relay.cli.dlq.replays import resolver

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["COMMANDS"]

_WHY: Final = click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")


@click.command("edit")
@click.argument("name", metavar="ID")
@_WHY
@asking
@click.pass_obj
def edit(invocation: Invocation, /, name: str, *, why: str, **options: Any) -> int:
    """Edit a dead message in $EDITOR, and replay what you saved.

    It opens as JSON, Avro too. What you save must be valid; you see the difference and are asked. It goes out under a
    new id; the letter keeps its bytes, and the audit log says that you saw them.
    """
    with database.writing(invocation) as connection:
        letter = select.named(connection, name)
        find_schema = partial(schema_store.schema_text, connection, resolve=resolver(invocation.settings))
        before = repair.editable(letter, find_schema)
        dead_letters.audit(connection, "dlq.reveal", [letter.id], by=who(), why="to edit it")
        after = click.edit(before, extension=".json")
        if after is None or after == before:
            click.echo("nothing was changed", err=True)
            return 0
        payload = repair.from_text(letter, after, find_schema)
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=2):
        click.echo(output.safe(line), err=True)
    return _change(invocation, _Repair([letter], {letter.id: payload}, {}, why or "edited"), options)


@click.command("repair")
@select.choosing
@click.option("--with", "function", required=True, metavar="MODULE:FUNCTION", help="Takes a Message, returns content.")
@click.option("--force", is_flag=True, help="Also what the inbox may have forgotten, and what died several times.")
@_WHY
@asking
@click.pass_obj
def repair_many(
    invocation: Invocation, /, choice: select.Choice, function: str, *, force: bool, why: str, **options: Any
) -> int:
    """Repair dead messages with a function of yours, and replay them.

    It takes the `Message` and returns its new content: bytes, text, or a value that is encoded as the message was; None
    leaves the letter alone. What it returns must be valid.
    """
    choice.require_some("repair")
    call = import_string.load_function(function)
    with database.reading(invocation) as connection:
        found = select.chosen(connection, choice)
        find_schema = partial(schema_store.schema_text, connection, resolve=resolver(invocation.settings))
        contents = {letter.id: _repaired(letter, call, find_schema) for letter in found}
        if not found:
            click.echo(nothing_found(connection, choice.which.consumer, select.NOTHING), err=True)
            return 0
    payloads = {letter_id: content for letter_id, content in contents.items() if isinstance(content, bytes)}
    faults = {letter_id: content for letter_id, content in contents.items() if isinstance(content, str)}
    wanted = _Repair(found, payloads, faults, why or f"{function} {choice.text}".strip())
    return _change(invocation, wanted, options, force=force)


COMMANDS: Final = (edit, repair_many)


def _repaired(letter: DeadLetter, call: Callable[..., Any], find_schema: Callable[[str], str]) -> bytes | str:
    """Returns the new payload, or the reason why there is none."""
    try:
        value = call(letter.message)
        return "the function leaves it alone" if value is None else repair.encoded(letter, value, find_schema)
    except OutboxKitError as error:
        return error.message
    except Exception as error:  # noqa: BLE001  the user's function: one letter that it cannot repair stops no other
        return dead_letters.words_of(error)


@dataclass(frozen=True, slots=True)
class _Repair:
    """Repaired payloads of letters, and the reasons why others have none."""

    letters: Sequence[DeadLetter]
    payloads: Mapping[UUID, bytes]
    faults: Mapping[UUID, str]
    why: str


def _change(invocation: Invocation, wanted: _Repair, options: dict[str, Any], *, force: bool = False) -> int:
    settings = invocation.settings
    terms = Terms(force=force, resolve=resolver(settings), inbox_retention=settings.retention.inbox)

    def send(*, dry_run: bool) -> list[Result]:
        opened = database.reading if dry_run else database.writing
        with opened(invocation) as connection:
            decided = dead_letters.repair_and_replay(
                connection, wanted.payloads, terms, by=who(), why=wanted.why, dry_run=dry_run
            )
        decisions = {decision.id: decision for decision in decided}
        outcome = "would repair" if dry_run else "queued"
        return [
            _result(letter.id, decisions.get(letter.id), wanted.faults.get(letter.id, ""), outcome)
            for letter in wanted.letters
        ]

    question = f"Replay {output.count(len(wanted.payloads), 'repaired message')}, under new ids?"
    change = Change(expected=send(dry_run=True), question=question, apply=partial(send, dry_run=False))
    return confirm_and_apply(change, **options)


def _result(letter_id: UUID, decision: Decision | None, fault: str, outcome: str) -> Result:
    done = decision is not None and decision.action != "none"
    reason = fault if decision is None else decision.reason
    facts = {"id": letter_id}
    return Result(
        name=str(letter_id)[:8], outcome=outcome if done else "refused", done=done, reason=reason, facts=facts
    )
