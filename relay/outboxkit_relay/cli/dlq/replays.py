"""``outboxkit dlq replay``, ``replays``, ``resume`` and ``stop``: replays as plans that are kept in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from outboxkit import _failpoints, dead_letters, registries, tables
from outboxkit._failpoints import failpoint
from outboxkit.dead_letters import Decision, Filter, Side, Terms, plan, progress
from outboxkit.dead_letters.pace import Pace
from outboxkit.dead_letters.plan import Draft, Health, Item, Replay
from outboxkit.errors import OutboxKitError
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply, exit_code, tell
from outboxkit_relay.cli.console.known_consumers import nothing_found
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.cli.dlq import select
from outboxkit_relay.cli.dlq.pace import paced, queue
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.settings import Settings

__all__ = ["COMMANDS", "resolver"]

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one replay a line.")
_PORTION: Final = 500  # letters in one transaction


@click.command("replay")
@select.choosing
@click.option("--payload", type=click.Path(dir_okay=False, path_type=Path), help="A repaired payload, for one letter.")
@click.option("--to", metavar="NAME", help="Another consumer than the one that failed: it was renamed.")
@click.option("--force", is_flag=True, help="Also what the inbox may have forgotten, and what died several times.")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@paced
@asking
@click.pass_obj
def replay(invocation: Invocation, /, choice: select.Choice, pace: Pace, **options: Any) -> int:
    """Send dead letters again, each only to the consumer that failed, in the original order of each key.

    The message keeps its id, so that nothing takes effect twice. It is refused, with the offending field, while the
    consumer's schema still cannot read it. What was chosen is kept: a replay that is cut off goes on with `resume`.
    """
    choice.require_some("replay")
    settings = invocation.settings
    _failpoints.enable(settings.failpoints)
    terms = Terms(
        force=options.pop("force"),
        to=options.pop("to"),
        resolve=resolver(settings),
        inbox_retention=settings.retention.inbox,
    )
    payload, why = content_of(options.pop("payload")), options.pop("why") or choice.text
    with database.reading(invocation) as connection:
        which, limit = _which(connection, choice)
        if payload is not None:
            return _repaired(invocation, (which, payload, why), terms, options)
        drafted = plan.draft(connection, which, terms, limit=limit)
        question = f"Replay {_goals(connection, drafted)}?"
        if not drafted.letters:
            click.echo(nothing_found(connection, choice.which.consumer, select.NOTHING), err=True)
            return Exit.OK
    change = Change(
        expected=[_expected(decision) for decision in drafted.decisions],
        question=question,
        apply=lambda: _freeze_and_run(invocation, drafted, terms, (pace, why), as_json=options["as_json"]),
    )
    return confirm_and_apply(change, **options)


@click.command("resume")
@click.argument("name", metavar="REPLAY")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@paced
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one result a line.")
@click.option("--dry-run", is_flag=True, help="Show how much is left, and send nothing.")
@click.pass_obj
def resume(invocation: Invocation, name: str, why: str, pace: Pace, *, as_json: bool, dry_run: bool) -> int:
    """Go on with a replay that was stopped or cut off."""
    _failpoints.enable(invocation.settings.failpoints)
    with database.writing(invocation) as connection:
        replay_id = select.numbered(connection, tables.dead_letter_replays, name, "replay")
        if dry_run:
            (found,) = plan.replays(connection, replay_id)
            output.print_json(_replay_as_json(found)) if as_json else click.echo(_sums(found))
            return Exit.OK
        plan.resume(connection, replay_id, by=who(), why=why)
    results = _run(invocation, replay_id, pace, as_json=as_json)
    tell(results, as_json=as_json)
    return exit_code(results)


@click.command("stop")
@click.argument("name", metavar="REPLAY")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@click.option("--dry-run", is_flag=True, help="Show how far it is, and stop nothing.")
@click.pass_obj
def stop(invocation: Invocation, name: str, why: str, *, dry_run: bool) -> int:
    """Stop a replay where it is, whoever runs it: at most a portion more is queued."""
    with database.writing(invocation) as connection:
        replay_id = select.numbered(connection, tables.dead_letter_replays, name, "replay")
        is_stopped = not dry_run and plan.stop(connection, replay_id, by=who(), why=why)
        (found,) = plan.replays(connection, replay_id)
    outcome = "would stop, it" if dry_run else "stopped, it" if is_stopped else "it"
    click.echo(f"{outcome} is {found.state}: {_sums(found)}")
    return Exit.OK if dry_run or is_stopped else Exit.FAILED


@click.command("replays")
@click.argument("name", metavar="[REPLAY]", required=False)
@_JSON
@click.pass_obj
def replays(invocation: Invocation, name: str | None, *, as_json: bool) -> None:
    """List the latest replays, or the outcome of each letter of one."""
    with database.reading(invocation) as connection:
        if name is not None:
            replay_id = select.numbered(connection, tables.dead_letter_replays, name, "replay")
            results = [_result(item) for item in plan.items(connection, replay_id)]
            tell(results, as_json=as_json)
            if not as_json:
                _say_health(plan.health(connection, replay_id))
            return
        found = plan.replays(connection)
    if as_json:
        for one in found:
            output.print_json(_replay_as_json(one))
        return
    if not found:
        click.echo("no replays", err=True)
        return
    now = datetime.now(UTC)
    output.table(
        ("REPLAY", "STATE", "CHOSEN", "QUEUED", "REFUSED", "GONE", "LEFT", "BY", "SINCE", "WHY"),
        [_replay_row(one, now) for one in found],
        whole=("REPLAY",),
    )


COMMANDS: Final = (replay, replays, resume, stop)


# --- carrying out ------------------------------------------------------------------------------------------------


def _freeze_and_run(
    invocation: Invocation, drafted: Draft, terms: Terms, how: tuple[Pace, str], *, as_json: bool
) -> list[Result]:
    pace, why = how
    with database.writing(invocation) as connection:
        replay_id = plan.freeze(connection, drafted, terms, by=who(), why=why)
    failpoint("replay.planned")
    return _run(invocation, replay_id, pace, as_json=as_json)


def _run(invocation: Invocation, replay_id: UUID, pace: Pace, *, as_json: bool) -> list[Result]:
    """Carries a replay out to its end, or to where it is stopped; tells the sums and returns each letter's outcome."""
    resolve = resolver(invocation.settings)
    try:
        with database.opened(invocation) as engine:
            queue(engine, replay_id, pace, resolve)
    except KeyboardInterrupt:
        click.echo(f"cut off; go on with: outboxkit dlq resume {str(replay_id)[:8]}", err=True)
    with database.reading(invocation) as connection:
        (found,) = plan.replays(connection, replay_id)
        results = [_result(item) for item in plan.items(connection, replay_id)]
        is_alive = progress.is_relay_alive(connection)
    if as_json:
        output.print_json(_replay_as_json(found))
    elif found.chosen > 1 or found.waiting:
        click.echo(_sums(found), err=True)
    if found.queued and not is_alive:
        click.echo("queued; no relay is alive here: start one with `outboxkit relay run`", err=True)
    return results


# --- a repaired payload ------------------------------------------------------------------------------------------


def _repaired(
    invocation: Invocation, what: tuple[Filter | Sequence[UUID], bytes, str], terms: Terms, options: dict[str, Any]
) -> int:
    """Replays one letter with another payload."""
    which, payload, why = what
    ids = [] if isinstance(which, Filter) else list(which)
    if len(ids) != 1:
        raise click.UsageError("--payload repairs one letter: name it by its id")

    def send(*, dry_run: bool) -> list[Decision]:
        opened = database.reading if dry_run else database.writing
        with opened(invocation) as connection:
            return dead_letters.replay(
                connection,
                ids,
                by=who(),
                why=why,
                payload=payload,
                to=terms.to,
                force=terms.force,
                dry_run=dry_run,
                resolve=terms.resolve,
                inbox_retention=terms.inbox_retention,
            )

    expected = [_expected(decision) for decision in send(dry_run=True)]
    change = Change(
        expected=expected,
        question="Replay 1 message with the repaired payload, under a new id?",
        apply=lambda: [_expected(decision, done="queued") for decision in send(dry_run=False)],
    )
    return confirm_and_apply(change, **options)


# --- words -------------------------------------------------------------------------------------------------------


def resolver(settings: Settings) -> Callable[[str], str] | None:
    """Returns where to find the schema that a dead message names, when no table has it."""
    if settings.registry_url is None:
        return None
    return registries.open_registry(settings.registry_url.get_secret_value()).resolve


def content_of(path: Path | None) -> bytes | None:
    """Returns the content of a file.

    Raises:
        OutboxKitError: it cannot be read.
    """
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise OutboxKitError(f"the payload {path} cannot be read: {error.strerror}") from None


def _which(connection: Connection, choice: select.Choice) -> tuple[Filter | list[UUID], int | None]:
    if not choice.names:
        return choice.which, choice.limit
    return [select.named(connection, name).id for name in dict.fromkeys(choice.names)], None


def _goals(connection: Connection, drafted: Draft) -> str:
    """Returns the number of letters that would be queued, and for whom they are."""
    going = [decision.id for decision in drafted.decisions if decision.action != "none"]
    names: Counter[str] = Counter()
    for start in range(0, len(going), _PORTION):
        for letter in dead_letters.in_order(connection, going[start : start + _PORTION]):
            names[letter.consumer if letter.side is Side.CONSUMER else f"topic {letter.topic}"] += 1
    return f"{output.count(len(going), 'message')} ({', '.join(f'{name} {n:,}' for name, n in names.items())})"


def _expected(decision: Decision, done: str = "would replay") -> Result:
    outcome = "refused" if decision.refused else "nothing to do" if decision.action == "none" else done
    return Result(
        name=str(decision.id)[:8],
        outcome=outcome,
        done=decision.action != "none",
        reason=decision.reason,
        facts={"id": decision.id, "action": decision.action},
    )


def _result(item: Item) -> Result:
    return Result(
        name=str(item.letter_id)[:8],
        outcome=item.outcome.value,
        done=item.outcome is plan.Outcome.QUEUED,
        reason=item.reason,
        facts={"id": item.letter_id, "number": item.number},
    )


def _sums(found: Replay) -> str:
    left = f" + {found.waiting:,} left" if found.waiting else ""
    parts = f"{found.queued:,} queued + {found.refused:,} refused + {found.gone:,} gone{left}"
    return f"replay {str(found.id)[:8]}: {found.chosen:,} chosen = {parts}"


def _say_health(found: Health) -> None:
    click.echo(
        f"of those queued: {found.replayed:,} replayed, {found.died_again:,} died again, {found.under_way:,} under way",
        err=True,
    )


def _replay_as_json(found: Replay) -> dict[str, object]:
    facts = {name: getattr(found, name) for name in found.__slots__ if name not in ("id", "options")}
    return {"replay": str(found.id), **output.plain(facts), "chosen": found.chosen, "options": found.options}


def _replay_row(found: Replay, now: datetime) -> tuple[object, ...]:
    numbers = (found.chosen, found.queued, found.refused, found.gone, found.waiting)
    since = f"{output.ago(now - found.created_at)} ago"
    return (str(found.id)[:8], found.state, *numbers, found.requested_by, since, found.why)
