"""``outboxkit dlq``: understand, replay, repair or discard dead letters."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit import dead_letters
from outboxkit.dead_letters import DeadLetter, Side, State, progress
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.known_consumers import nothing_found
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq import repair, replays, select, show, transfer
from outboxkit_relay.store import operator_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one letter a line.")


@click.group()
def command() -> None:
    """Understand, replay, repair or discard dead letters.

    A letter is named by its id or the first characters of it. Without ids, options choose: --consumer, --group …
    """


@command.command("list")
@select.choosing
@_JSON
@click.pass_obj
def list_letters(invocation: Invocation, choice: select.Choice, *, as_json: bool) -> None:
    """List dead letters, the newest first.

    A replay that nobody has closed for five minutes says where it is.
    """
    with database.reading(invocation) as connection:
        found, total = select.chosen(connection, choice), select.how_many(connection, choice)
        reasons = show.late(connection, found)
        nothing = "" if found else nothing_found(connection, choice.which.consumer, "no dead letters")
    if as_json:
        for letter in found:
            output.print_json({**show.as_json(letter), "open_because": reasons.get(letter.id)})
        return
    if not found:
        click.echo(nothing, err=True)
        return
    show.show_list(found, reasons)
    if total > len(found):
        click.echo(f"{len(found):,} of {total:,}: --limit shows more", err=True)


@command.command("groups")
@select.choosing
@_JSON
@click.pass_obj
def list_groups(invocation: Invocation, choice: select.Choice, *, as_json: bool) -> None:
    """List the causes of dead letters, the most frequent first.

    Every other command takes --group. In brackets behind the last hour's number: how much it grew or fell.
    """
    with database.reading(invocation) as connection:
        found = dead_letters.groups(connection, choice.which, limit=choice.limit)
        nothing = "" if found else nothing_found(connection, choice.which.consumer, "no dead letters")
    if as_json:
        for group in found:
            output.print_json(output.plain({name: getattr(group, name) for name in group.__slots__}))
    elif found:
        show.show_groups(found)
    else:
        click.echo(nothing, err=True)


@command.command("note")
@click.argument("group")
@click.argument("text", default="", required=False)
@click.option("--owner", help="The person or team that looks after it.")
@click.option("--dry-run", is_flag=True, help="Show what would be written.")
@click.pass_obj
def note(invocation: Invocation, group: str, text: str, owner: str | None, *, dry_run: bool) -> None:
    """Write down what is known about a group, and who looks after it."""
    with database.writing(invocation) as connection:
        number = dead_letters.count(connection, dead_letters.Filter(state=None, group=group))
        if not number:
            raise click.UsageError(f"no dead letter has the group {group!r}: `outboxkit dlq groups` lists them")
        if not dry_run:
            dead_letters.annotate(connection, group, by=who(), note=text or None, owner=owner)
    click.echo(output.safe(f"{group}  {'would be noted' if dry_run else 'noted'}, {output.count(number, 'letter')}"))


@command.command("show")
@click.argument("name", metavar="ID")
@click.option("--reveal", is_flag=True, help="Show payload and header values too. The audit log says that you did.")
@_JSON
@click.pass_obj
def show_letter(invocation: Invocation, name: str, *, reveal: bool, as_json: bool) -> None:
    """Show why a message is dead, and what would repair it."""
    opened = database.writing if reveal else database.reading
    with opened(invocation) as connection:
        letter = select.named(connection, name)
        resolve = replays.resolver(invocation.settings)
        content = dead_letters.reveal(connection, letter, by=who(), resolve=resolve) if reveal else None
        open_because = progress.why_open(connection, letter)
    if as_json:
        output.print_json({**show.as_json(letter, content), "open_because": open_because or None})
    else:
        show.show(letter, content, open_because)


@command.command("explain")
@click.argument("name", metavar="ID")
@click.pass_obj
def explain(invocation: Invocation, name: str) -> None:
    """Explain a death: the error's chain and places, and the message's earlier and later letters."""
    with database.reading(invocation) as connection:
        letter = select.named(connection, name)
        family = dead_letters.family(connection, letter)
        open_because = progress.why_open(connection, letter)
    show.show(letter, None, open_because)
    show.show_cause(letter)
    if len(family) > 1:
        click.echo()
        show.show_list(family, {})


@command.command("discard")
@select.choosing
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the audit log.")
@asking
@click.pass_obj
def discard(invocation: Invocation, /, choice: select.Choice, *, why: str, **options: Any) -> int:
    """Close dead letters without sending them again.

    Messages that are parked behind a discarded one go on.
    """
    choice.require_some("discard")
    with database.reading(invocation) as connection:
        found = select.chosen(connection, choice)
        if not found:
            click.echo(nothing_found(connection, choice.which.consumer, select.NOTHING), err=True)
            return 0
    dead = [letter for letter in found if letter.state is State.DEAD]

    def apply() -> list[Result]:
        with database.writing(invocation) as connection:
            done = operator_requests.discard_letters(connection, [letter.id for letter in dead], by=who(), why=why)
            now = dead_letters.in_order(connection, [letter.id for letter in found])
        states = {letter.id: letter.state for letter in now} | dict.fromkeys(done, State.DEAD)
        return [_discarded(letter, "discarded", states.get(letter.id)) for letter in found]

    expected = [_discarded(letter, "would discard", letter.state) for letter in found]
    change = Change(expected=expected, question=f"Discard {goals(dead)}?", apply=apply)
    return confirm_and_apply(change, **options)


def _discarded(letter: DeadLetter, outcome: str, state: State | None) -> Result:
    """The result for a letter that was in this state, None: that was not there any more."""
    facts, is_dead = {"id": letter.id, "action": "discard"}, state is State.DEAD
    reason = "" if is_dead else f"it is {state.value if state else 'gone'}"
    return Result(
        name=str(letter.id)[:8], outcome=outcome if is_dead else "refused", done=is_dead, reason=reason, facts=facts
    )


def goals(found: Sequence[DeadLetter]) -> str:
    """Returns the number of letters, and for whom they are: what a person should know before saying yes."""
    names = Counter(letter.consumer if letter.side is Side.CONSUMER else f"topic {letter.topic}" for letter in found)
    return f"{output.count(len(found), 'message')} ({', '.join(f'{name} {n:,}' for name, n in names.items())})"


for _one in (*replays.COMMANDS, *repair.COMMANDS, *transfer.COMMANDS):
    command.add_command(_one)
