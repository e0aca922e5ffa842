"""``outboxkit saga``: instances of sagas, and the two things that an operator may ask of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit import saga
from outboxkit.errors import SagaNotFound
from outboxkit.saga import SagaRow, Status
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_COLUMNS: Final = ("SAGA", "KEY", "STATUS", "STEP", "FOR", "NEXT")
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one instance a line.")
_ENDED: Final = "it has ended: nothing is left to do"
_UNDOING: Final = "it is being undone already; `resume` sends the current undo again"


@click.group()
def command() -> None:
    """See sagas; send a step again, or undo what was done.

    What you ask goes through the outbox to the saga's own queue; its consumer carries it out.
    """


@command.command("list")
@click.argument("name", metavar="[SAGA]", required=False)
@click.option("--status", type=click.Choice([one.value for one in Status]), help="Only instances in this state.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@_JSON
@click.pass_obj
def list_sagas(invocation: Invocation, name: str | None, status: str | None, limit: int, *, as_json: bool) -> None:
    """List instances, the one that changed last first."""
    chosen = None if status is None else Status(status)
    with database.reading(invocation) as connection:
        found = saga.find(connection, saga=name, status=chosen, limit=limit)
        total = saga.count(connection, saga=name, status=chosen)
    if as_json:
        for row in found:
            output.print_json(_as_json(row))
        return
    if not found:
        click.echo("no sagas", err=True)
        return
    now = datetime.now(UTC)
    output.table(_COLUMNS, [_row(row, now) for row in found], whole=("SAGA", "KEY"))
    if total > len(found):
        click.echo(f"{len(found):,} of {total:,}: --limit shows more", err=True)


@command.command("show")
@click.argument("name", metavar="SAGA")
@click.argument("key")
@_JSON
@click.pass_obj
def show(invocation: Invocation, name: str, key: str, *, as_json: bool) -> None:
    """Show what happened to one instance, in order. Its state is not shown: it may hold what is nobody's business."""
    with database.reading(invocation) as connection:
        row = saga.get(connection, name, key)
    if row is None:
        raise SagaNotFound(f"there is no instance {key} of the saga {name}")
    if as_json:
        output.print_json(_as_json(row) | {"history": [list(entry) for entry in row.history]})
        return
    now = datetime.now(UTC)
    for label, value in zip(_COLUMNS, _row(row, now), strict=True):
        output.field(label.lower(), value)
    output.field("version", row.version)
    output.field("conversation", row.correlation_id or "-")
    for at, text in row.history:
        click.echo(output.safe(f"{at[11:23]}  {text}"))


def _naming(function: Callable[..., int]) -> Callable[..., int]:
    """Adds what `resume` and `compensate` take."""

    @click.argument("name", metavar="SAGA")
    @click.argument("keys", metavar="KEY...", nargs=-1, required=True)
    @click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
    @asking
    @click.pass_obj
    @wraps(function)
    def named(invocation: Invocation, /, **options: Any) -> int:
        return function(invocation, options.pop("name"), options.pop("keys"), options)

    return named


@command.command("resume")
@_naming
def resume(invocation: Invocation, name: str, keys: tuple[str, ...], options: dict[str, Any]) -> int:
    """Send the current command of an instance again: of its step, or of the undo that it is stuck at."""
    return _ask(invocation, "resume", name, keys, options)


@command.command("compensate")
@_naming
def compensate(invocation: Invocation, name: str, keys: tuple[str, ...], options: dict[str, Any]) -> int:
    """Undo what an instance has done so far, in reverse order."""
    return _ask(invocation, "compensate", name, keys, options)


def _ask(  # noqa: PLR0917  the command line's own words
    invocation: Invocation, wish: str, name: str, keys: Sequence[str], options: dict[str, Any]
) -> int:
    why = options.pop("why")
    with database.reading(invocation) as connection:
        found = {key: saga.get(connection, name, key) for key in dict.fromkeys(keys)}
    refusals = {key: _refusal(wish, row) for key, row in found.items()}

    def record() -> list[Result]:
        verb = saga.resume if wish == "resume" else saga.compensate
        with database.writing(invocation) as connection:
            for key in (key for key, refusal in refusals.items() if not refusal):
                verb(connection, name, key, by=who(), why=why)
        return _results(name, refusals, f"asked to {wish}")

    asked = sum(not refusal for refusal in refusals.values())
    change = Change(
        expected=_results(name, refusals, f"would ask to {wish}"),
        question=f"{wish.capitalize()} {output.count(asked, 'instance')} of {name}?",
        apply=record,
    )
    return confirm_and_apply(change, **options)


def _refusal(wish: str, row: SagaRow | None) -> str:
    if row is None:
        return "there is no such instance"
    if row.instance.has_ended:
        return _ENDED
    return _UNDOING if wish == "compensate" and row.instance.status is not Status.RUNNING else ""


def _results(name: str, refusals: dict[str, str], outcome: str) -> list[Result]:
    return [
        Result(
            name=f"{name}  {key}",
            outcome="refused" if refusal else outcome,
            done=not refusal,
            reason=refusal,
            facts={"saga": name, "key": key},
        )
        for key, refusal in refusals.items()
    ]


def _row(row: SagaRow, now: datetime) -> tuple[object, ...]:
    due = "-" if row.due_at is None or row.instance.has_ended else f"in {output.ago(row.due_at - now)}"
    since = output.ago(now - row.started_at)
    return (row.saga, row.key, row.instance.status.value, row.step or "-", since, due)


def _as_json(row: SagaRow) -> dict[str, object]:
    times = {"started_at": row.started_at, "updated_at": row.updated_at, "due_at": row.due_at}
    return {
        "saga": row.saga,
        "key": row.key,
        "version": row.version,
        "status": row.instance.status.value,
        "step": row.step or None,
        "correlation_id": row.correlation_id,
        **{name: None if time is None else time.isoformat() for name, time in times.items()},
    }
