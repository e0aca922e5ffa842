"""``outboxkit dlq``: understand, replay or discard dead letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit import dead_letters, registries
from outboxkit.dead_letters import DeadLetter, Decision, Side, State
from outboxkit.errors import OutboxKitError
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq import show
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.settings import Settings

__all__ = ["command"]

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one letter a line.")
_DRY_RUN: Final = click.option("--dry-run", is_flag=True, help="Show what would happen.")
_YES: Final = click.option("--yes", is_flag=True, help="Do not ask.")
_WHY: Final = click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")


@click.group()
def command() -> None:
    """Understand, replay or discard dead letters.

    A letter is named by its id or the first characters of it. Without ids, options choose: --consumer, --type …
    """


@command.command("list")
@show.choosing
@_JSON
@click.pass_obj
def list_letters(invocation: Invocation, choice: show.Choice, *, as_json: bool) -> None:
    """List dead letters, the newest first."""
    with database.reading(invocation) as connection:
        found, total = show.chosen(connection, choice), show.how_many(connection, choice)
    if as_json:
        for letter in found:
            output.print_json(show.as_json(letter))
        return
    if not found:
        click.echo("no dead letters", err=True)
        return
    show.show_list(found)
    if total > len(found):
        click.echo(f"{len(found):,} of {total:,}: --limit shows more", err=True)


@command.command("show")
@click.argument("name", metavar="ID")
@click.option("--reveal", is_flag=True, help="Show payload and header values too. The audit log says that you did.")
@_JSON
@click.pass_obj
def show_letter(invocation: Invocation, name: str, *, reveal: bool, as_json: bool) -> None:
    """Show why a message is dead, and what would repair it."""
    opened = database.writing if reveal else database.reading
    with opened(invocation) as connection:
        letter = show.named(connection, name)
        content = show.reveal(connection, letter, who(), _resolve(invocation.settings)) if reveal else None
    if as_json:
        output.print_json(show.as_json(letter, content))
    else:
        show.show(letter, content)


@command.command("replay")
@show.choosing
@click.option("--payload", type=click.Path(dir_okay=False, path_type=Path), help="A repaired payload, for one letter.")
@click.option("--force", is_flag=True, help="Also what the inbox may have forgotten, and what died several times.")
@_WHY
@_DRY_RUN
@_YES
@_JSON
@click.pass_obj
def replay(invocation: Invocation, /, choice: show.Choice, **options: Any) -> int:
    """Send dead letters again, each only to the consumer that failed.

    The message keeps its id, so that nothing takes effect twice. It is refused, with the offending field, while the
    consumer's schema still cannot read it.
    """
    choice.require_some("replay")
    payload = _content_of(options["payload"])

    def carry_out(connection: Connection, found: list[DeadLetter], *, dry_run: bool) -> list[Decision]:
        return dead_letters.replay(
            connection,
            [letter.id for letter in found],
            by=who(),
            why=options["why"] or choice.text,
            payload=payload,
            force=options["force"],
            dry_run=dry_run,
            resolve=_resolve(invocation.settings),
            inbox_retention=invocation.settings.retention.inbox,
        )

    return _change(invocation, choice, _Deed("replay", carry_out), options)


@command.command("discard")
@show.choosing
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the audit log.")
@_DRY_RUN
@_YES
@_JSON
@click.pass_obj
def discard(invocation: Invocation, /, choice: show.Choice, **options: Any) -> int:
    """Close dead letters without sending them again.

    Messages that are parked behind a discarded one go on.
    """
    choice.require_some("discard")

    def carry_out(connection: Connection, found: list[DeadLetter], *, dry_run: bool) -> list[Decision]:
        plans = [_discarding(letter) for letter in found]
        ids = [plan.id for plan in plans if not plan.refused]
        if ids and not dry_run:
            dead_letters.discard(connection, ids, by=who(), why=options["why"])
            show.release_followers(connection, [letter for letter in found if letter.id in ids], who())
        return plans

    return _change(invocation, choice, _Deed("discard", carry_out), options)


@dataclass(frozen=True, slots=True)
class _Deed:
    """What is to be done with letters: ``carry_out(connection, letters, dry_run=…)`` does it, or says what it would."""

    verb: str
    carry_out: Callable[..., list[Decision]]


def _change(invocation: Invocation, choice: show.Choice, deed: _Deed, options: dict[str, Any]) -> int:
    """Look, ask, do, tell: what was looked at is what is changed."""
    with database.reading(invocation) as connection:
        found = show.chosen(connection, choice)
        planned = deed.carry_out(connection, found, dry_run=True) if found else []
    if not found:
        click.echo("no dead letters match: nothing to do", err=True)
        return Exit.OK
    possible = {plan.id for plan in planned if plan.action != "none"}
    if not options["dry_run"] and possible:
        question = f"{deed.verb.capitalize()} {_counts([letter for letter in found if letter.id in possible])}?"
        if not output.confirmed(question, yes=options["yes"]):
            click.echo("nothing was changed", err=True)
            return Exit.FAILED
        with database.writing(invocation) as connection:
            planned = deed.carry_out(connection, found, dry_run=False)
    done = f"would {deed.verb}" if options["dry_run"] else f"{deed.verb}ed"
    _tell(planned, done, as_json=options["as_json"])
    refused = sum(plan.refused for plan in planned)
    return Exit.OK if not refused else Exit.FAILED if refused == len(planned) else Exit.PARTLY


def _tell(plans: list[Decision], done: str, *, as_json: bool) -> None:
    for plan in plans:
        what = "refused" if plan.refused else "nothing to do" if plan.action == "none" else done
        if as_json:
            output.print_json({"id": plan.id, "outcome": what, "action": plan.action, "reason": plan.reason})
        else:
            click.echo(output.safe(f"{str(plan.id)[:8]}  {what}" + (f": {plan.reason}" if plan.reason else "")))


def _counts(found: list[DeadLetter]) -> str:
    goals = Counter(letter.consumer if letter.side is Side.CONSUMER else f"topic {letter.topic}" for letter in found)
    return (
        f"{len(found):,} message{'s' * (len(found) != 1)} ("
        + ", ".join(f"{name} {n:,}" for name, n in goals.items())
        + ")"
    )


def _discarding(letter: DeadLetter) -> Decision:
    if letter.state is State.DEAD:
        return Decision(id=letter.id, action="discard")
    return Decision(id=letter.id, action="none", reason=f"it is {letter.state.value}", refused=True)


def _content_of(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise OutboxKitError(f"the payload {path} cannot be read: {error.strerror}") from None


def _resolve(settings: Settings) -> Callable[[str], str] | None:
    """Where to find the schema that a dead message names, when no table has it."""
    if settings.registry_url is None:
        return None
    return registries.open_registry(settings.registry_url.get_secret_value()).resolve
