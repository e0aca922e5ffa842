"""``outboxkit status``: is anything stuck?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy import func, select

from outboxkit import dialects, tables
from outboxkit.policy import duration
from outboxkit_relay.cli import pause
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.observe import situation
from outboxkit_relay.observe.runs import RunState
from outboxkit_relay.observe.situation import Topic

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.observe.runs import ConsumerStatus, Run

__all__ = ["Report", "command", "look"]

_LETTERS: Final = tables.dead_letters.c
_LIMIT: Final = "30s"
_TIMES: Final = ("since", "due_at")  # of a place


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that `status` tells."""

    topics: list[Topic]
    relays: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    consumers: list[ConsumerStatus]
    parked: list[dict[str, Any]]
    parked_at_consumers: list[dict[str, Any]]
    pauses: list[dict[str, Any]]
    problems: list[str]
    summary: str
    schema: str = ""


@click.command()
@click.option("--limit", default=_LIMIT, show_default=True, help="A message that is pending longer is stuck.")
@click.option("--message", "message_id", metavar="ID", help="Where is this message? An id, or how it begins.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; of a message one place a line.")
@click.pass_obj
def command(invocation: Invocation, limit: str, message_id: str | None, *, as_json: bool) -> int:
    """Is anything stuck? Exit code 3 when something is.

    So it is when the message that is asked for is nowhere.
    """
    patience = duration(limit)
    if message_id is not None:
        return _tell_of(invocation, message_id, as_json=as_json)
    with database.reading(invocation) as connection:
        report = look(connection, patience)
    if as_json:
        output.print_json({"verdict": "stuck" if report.problems else "healthy", **asdict(report)})
    else:
        _show(report)
    return Exit.PROBLEMS if report.problems else Exit.OK


def _tell_of(invocation: Invocation, message_id: str, *, as_json: bool) -> int:
    with database.reading(invocation) as connection:
        places = find_message.find(connection, message_id)
        if not places:
            message_id = find_message.named(connection, message_id)
            places = find_message.find(connection, message_id)
    for place in places:
        if as_json:
            output.print_json({"message": message_id, **place})
        else:
            facts = {name: value for name, value in place.items() if name != "place" and value not in (None, "")}
            named = ", ".join(f"{name} {_read(name, value)}" for name, value in facts.items())
            click.echo(output.safe(f"{place['place']}: {named}"))
    if not places:
        click.echo(f"{output.safe(message_id)} is nowhere: it was never committed, or no longer kept", err=True)
    return Exit.OK if places else Exit.PROBLEMS


def _read(name: str, value: Any) -> object:
    return output.instant(datetime.fromisoformat(value)) if name in _TIMES else value


def look(connection: Connection, patience: timedelta) -> Report:
    """Reads the whole state, by the database's clock.

    Transaction: reads only.
    """
    found = situation.look(connection, patience)
    return Report(
        topics=found.topics,
        relays=found.relays,
        schema=dialects.schema_of(connection),
        dead_letters=_dead_letters(connection),
        consumers=found.consumers,
        parked=found.parked,
        parked_at_consumers=found.parked_at_consumers,
        pauses=[
            {**pause.shown(one), "seconds": round((found.now - one.since).total_seconds(), 1)} for one in found.pauses
        ],
        problems=found.problems,
        summary=found.summary,
    )


# --- reading -----------------------------------------------------------------------------------------------------


def _dead_letters(connection: Connection) -> list[dict[str, Any]]:
    grouping = (_LETTERS.side, _LETTERS.consumer, _LETTERS.state)
    rows = connection.execute(select(*grouping, func.count().label("count")).group_by(*grouping).order_by(*grouping))
    return [dict(row) for row in rows.mappings()]


# --- showing -----------------------------------------------------------------------------------------------------


def _show(report: Report) -> None:
    dead = sum(group["count"] for group in report.dead_letters if group["state"] == "dead")
    if report.problems:
        for problem in report.problems:
            output.verdict("STUCK", problem, "red")
    else:
        output.verdict("Healthy", report.summary, "green")
    for run in _starting(report):
        output.verdict("Starting", run.trouble, "yellow")
    for held in report.pauses:
        output.verdict("Paused", _of_pause(held), "yellow")
    if dead:
        click.echo(
            f"{dead:,} dead letter{'s' if dead > 1 else ''} wait{'' if dead > 1 else 's'} for you: outboxkit dlq list"
        )
    _section(
        "TOPIC",
        ["PENDING", "OLDEST", "RETRY", "BEHIND", "SCHEDULED", "STOPPED", "PARKED"],
        [_topic_row(t) for t in report.topics],
    )
    if report.schema:
        click.echo(f"schema {output.safe(report.schema)}")
    _section("RELAY", ["HOST", "SHARDS", "UP", "LEASE"], [_relay_row(relay) for relay in report.relays])
    _section("CONSUMER", ["HANDLED", "WAITING", "PARKED", "OLDEST", "LAG"], list(map(_consumer_row, report.consumers)))
    found = [_run_row(consumer, run) for consumer in report.consumers for run in consumer.runs]
    _section("RUNS", ["HOST", "STATE", "IN HAND", "LAG", "UP"], found)
    letters = [[row["consumer"] or "(relay)", row["state"], row["count"]] for row in report.dead_letters]
    _section("DEAD LETTERS", ["STATE", "COUNT"], letters)


def _starting(report: Report) -> list[Run]:
    """Runs that wait for their first messages, and for no longer than a start may take."""
    runs = [run for consumer in report.consumers for run in consumer.runs if run.state is RunState.STARTING]
    return [run for run in runs if run.trouble not in report.problems]


def _of_pause(pause: dict[str, Any]) -> str:
    name = pause["name"] if pause["key"] is None else f"{pause['name']} {pause['key']}"
    age = output.ago(timedelta(seconds=pause["seconds"]))
    return f"{pause['scope']} {name}, by {pause['by']} {age} ago: {pause['reason']}"


def _section(first: str, others: list[str], rows: list[list[object]]) -> None:
    if rows:
        click.echo()
        output.table([first, *others], rows)


def _topic_row(topic: Topic) -> list[object]:
    oldest = output.ago(timedelta(seconds=topic.oldest_seconds)) if topic.pending else "-"
    counts = (topic.retry, topic.follower, topic.scheduled, topic.stopped_keys, topic.parked_keys)
    return [topic.topic, topic.pending, oldest, *counts]


def _consumer_row(one: ConsumerStatus) -> list[object]:
    oldest = output.ago(timedelta(seconds=one.oldest_seconds)) if one.waiting else "-"
    return [one.consumer, one.handled, one.waiting, one.parked, oldest, _number(one.lag)]


def _run_row(one: ConsumerStatus, run: Run) -> list[object]:
    up = output.ago(timedelta(seconds=run.up_seconds)) if run.is_alive else "-"
    return [one.consumer, run.host, run.state.value, run.in_hand, _number(run.lag), up]


def _number(number: int | None) -> object:
    return "-" if number is None else number


def _relay_row(relay: dict[str, Any]) -> list[object]:
    up = output.ago(timedelta(seconds=relay["up_seconds"]))
    lease = f"{relay['lease_seconds']}s left" if relay["alive"] else "expired"
    return [relay["id"][:8], relay["host"], relay["shards"], up, lease]
