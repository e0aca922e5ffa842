"""``outboxkit dlq export`` and ``import``: letters as JSON lines, byte for byte, and letters of other tools."""

from __future__ import annotations

import base64
import json
from typing import IO, TYPE_CHECKING, Any, Final

import click

from outboxkit import dead_letters
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, transfer
from outboxkit.errors import OutboxKitError, ReplayError
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq import select

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["COMMANDS"]

_NAMED_IN_AUDIT: Final = 20


@click.command("export")
@select.choosing
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the audit log.")
@click.pass_obj
def export(invocation: Invocation, /, choice: select.Choice, *, why: str) -> None:
    """Write letters as JSON lines, byte for byte, content included. The audit log says that you did."""
    choice.require_some("export")
    with database.writing(invocation) as connection:
        found = select.chosen(connection, choice)
        named = [letter.id for letter in found[:_NAMED_IN_AUDIT]]
        dead_letters.audit(connection, "dlq.export", named, by=who(), why=f"{len(found):,} letters: {why}")
    for letter in found:
        output.print_json(transfer.as_record(letter))


@click.command("import")
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
@click.option("--consumer", default="", help="The consumer of foreign messages whose headers name none.")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@asking
@click.pass_obj
def import_letters(invocation: Invocation, /, file: IO[str], *, consumer: str, why: str, **options: Any) -> int:
    """Take letters in: lines that `export` wrote, or messages of a dead-letter topic or queue of another tool.

    A foreign message is a line with topic, key, payload (both in base64), and headers as a list of name and base64; its
    Spring, Kafka Connect or x-first-death headers say where it came from. A letter that is there already is left alone.
    """
    letters = [_letter(number, line, consumer) for number, line in enumerate(file, 1) if line.strip()]
    if not letters:
        click.echo("no letters: nothing to do", err=True)
        return 0
    with database.reading(invocation) as connection:
        known = {letter.id for letter in letters if dead_letters.get(connection, letter.id) is not None}

    def apply() -> list[Result]:
        with database.writing(invocation) as connection:
            taken = [_taken(connection, letter, known) for letter in letters]
            dead_letters.audit(connection, "dlq.import", [], by=who(), why=f"{len(taken):,} letters: {why}")
        return taken

    expected = [_result(one, "would import", "it is there already" if one.id in known else "") for one in letters]
    question = f"Import {output.count(len(letters) - len(known), 'letter')}?"
    return confirm_and_apply(Change(expected=expected, question=question, apply=apply), **options)


COMMANDS: Final = (export, import_letters)


def _taken(connection: Connection, letter: DeadLetter, known: set[Any]) -> Result:
    if letter.id in known:
        return _result(letter, "imported", "it is there already")
    if letter.state is not dead_letters.State.DEAD:
        dead_letters.store(connection, letter)
    elif dead_letters.bury(connection, letter) is None:
        return _result(letter, "imported", "its message was handled, or is dead already")
    return _result(letter, "imported", "")


def _letter(number: int, line: str, consumer: str) -> DeadLetter:
    try:
        return _of_record(json.loads(line), consumer)
    except (ReplayError, ValueError, KeyError, TypeError) as error:
        told = error.message if isinstance(error, OutboxKitError) else f"{type(error).__name__} {error}"
        raise OutboxKitError(f"line {number}: {told}") from None


def _of_record(record: object, consumer: str) -> DeadLetter:
    if not isinstance(record, dict):
        raise ReplayError("it is no object")
    return _foreign(record, consumer) if isinstance(record.get("headers"), list) else transfer.from_record(record)


def _foreign(record: dict[str, Any], consumer: str) -> DeadLetter:
    def decoded(text: str | None) -> bytes | None:
        return None if text is None else base64.b64decode(text, validate=True)

    delivery = Delivery(
        topic=record["topic"],
        key=decoded(record.get("key")),
        headers=tuple((name, decoded(value) or b"") for name, value in record["headers"]),
        payload=decoded(record.get("payload")),
        origin=f"{record['topic']}[{record.get('partition', '?')}]@{record.get('offset', '?')}",
    )
    letter = transfer.of_foreign(delivery, consumer=consumer)
    if letter is None:
        raise ReplayError("no header says that another tool has dead-lettered it")
    if not letter.consumer:
        raise ReplayError("its headers name no consumer: give --consumer")
    return letter


def _result(letter: DeadLetter, outcome: str, refusal: str) -> Result:
    return Result(
        name=str(letter.id)[:8],
        outcome="refused" if refusal else outcome,
        done=not refusal,
        reason=refusal,
        facts={"id": letter.id},
    )
