"""Every command runs on SQLite and on PostgreSQL, with ``--json`` and without, on tables that hold something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import click
import pytest
from sqlalchemy import Engine

from outboxkit import dead_letters, migrations, outbox, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters import Terms, plan, transfer
from outboxkit.dialects import open_engine
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit_relay.cli.main import COMMANDS, program
from tests.consumer_fixture import order
from tests.unit.relay.cli.builders import bury, hold_key, stop_key
from tests.unit.relay.cli.conftest import Outboxkit

#: Commands that look at no database, or have tests of their own on both.
ELSEWHERE = {"dashboard", "demo", "demo-broker", "consume", "healthcheck", "saga", "schema"}

WITHOUT_JSON = {"init", "db upgrade", "db sql", "db roles", "relay run", "dlq note", "dlq explain", "dlq export", "dlq stop"}  # noqa: E501  # fmt: skip

#: command -> command lines that succeed, with names of what the tables hold.
LINES: dict[str, list[str]] = {
    "init": ["--dry-run", ""],
    "db upgrade": ["--dry-run", ""],
    "db sql": ["", "--dialect sqlite"],
    "db check": [""],
    "db roles": ["--dry-run"],
    "relay run": ["--once"],
    "relay pause": ["payments --why night", "payments --key 7 --why x --for 5m", "--type a.b --why x --dry-run"],
    "relay resume": ["invoices", "invoices --dry-run"],
    "relay pauses": [""],
    "status": ["--limit 1h", "--message {message}", "--message {published}", "--message {dead}"],
    "doctor": ["", "--role app --notes"],
    "trace": ["7", "{message}", "{dead}", "{published} --limit 1"],
    "audit": [""],
    "dlq list": ["", "--state all --consumer billing --since 1h", "--group {group}", "{letter}"],
    "dlq groups": ["", "--consumer billing", "--state all"],
    "dlq note": ["{group} known --owner team", "{group} --dry-run"],
    "dlq show": ["{letter}", "{letter} --reveal"],
    "dlq explain": ["{letter}"],
    "dlq replay": ["{letter} --yes", "--group {group} --dry-run", "--all --yes --rate 1000 --limit 1"],
    "dlq replays": ["", "{replay}"],
    "dlq resume": ["{replay}", "{replay} --dry-run"],
    "dlq stop": ["{replay} --why x", "{replay} --dry-run"],
    "dlq edit": ["{letter} --dry-run"],
    "dlq repair": ["{letter} --with repairs:empty --dry-run"],
    "dlq export": ["{letter} --why x", "--group {group} --why x"],
    "dlq import": ["letters.jsonl --yes", "letters.jsonl --dry-run"],
    "dlq discard": ["{letter} --yes --why x", "--group {group} --dry-run --why x"],
    "consumer rename": ["billing invoicing --yes --why x", "billing invoicing --dry-run"],
    "quarantine list": ["", "--topic orders", "--consumer billing"],
    "quarantine release": ["orders 7 --yes", "orders 7 --dry-run"],
    "quarantine skip": ["orders 7 --yes", "orders 7 --dry-run"],
    "prune": ["--dry-run", ""],
    "log": ["", "--action dlq --since 1h", "--by ana"],
    "messages list": ["", "--state scheduled", "--topic payments --limit 1"],
    "messages show": ["{message}", "{scheduled} --reveal"],
    "messages redirect": ["{message} --to orders --yes --why x", "--topic payments --to orders --dry-run --why x"],
    "messages discard": ["{message} --yes --why x", "{scheduled} --dry-run --why x"],
    "messages cancel": ["{scheduled} --yes --why x", "{scheduled} --dry-run --why x"],
}


def _walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for child in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), child)
            assert found is not None
            yield from _walk(f"{name} {child}".strip(), found)
    else:
        yield name, command


def _all() -> dict[str, click.Command]:
    return {name: command for name, command in _walk("", program) if name.split()[0] not in ELSEWHERE}


def test_no_command_is_left_out() -> None:
    assert set(COMMANDS) >= ELSEWHERE
    assert set(_all()) == set(LINES)


@dataclass(frozen=True)
class Held:
    """What the tables hold, by the names that command lines use."""

    engine: Engine
    names: dict[str, str]


@pytest.fixture(params=["sqlite", "postgresql"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Held]:
    url = f"sqlite:///{tmp_path}/app.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("database_url")
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", url)
    Path("repairs.py").write_text("def empty(message):\n    return {}\n")
    Path("editor").write_text('#!/bin/sh\necho {} > "$1"\n')
    Path("editor").chmod(0o755)
    monkeypatch.setenv("VISUAL", str(Path("editor").absolute()))
    engine = open_engine(url, patience=timedelta(seconds=10))
    with engine.begin() as connection:
        migrations.upgrade(connection)
    yield Held(engine, _fill(engine))
    engine.dispose()


def _fill(engine: Engine) -> dict[str, str]:
    letter, other = bury(engine), bury(engine, "shipping", b"8")
    stop_key(engine, reason="parked")
    hold_key(engine)
    pending, scheduled, published = order(1, topic="payments"), order(2), uuid4()
    with engine.begin() as connection:
        outbox.write(connection, [pending])
        outbox.schedule(connection, [(scheduled, timedelta(hours=1))])
        pauses.pause(connection, Target(Scope.DESTINATION, "invoices"), by="ana", reason="x", lasts=None)
        connection.execute(tables.outbox_ledger.insert().values(**_evidence(published)))
        lease = {"id": uuid4(), "host": "h", "version": "1", "expires_at": database_now(timedelta(seconds=-1))}
        connection.execute(tables.outbox_relays.insert().values(**lease))
        drafted = plan.draft(connection, [other.id], Terms())
        replay_id = plan.freeze(connection, drafted, Terms(), by="ana", why="x")
        travelling = replace(letter, id=uuid4(), message_id=str(uuid4()))
        Path("letters.jsonl").write_text(json.dumps(transfer.as_record(travelling)) + "\n")
        dead_letters.annotate(connection, letter.group, by="ana", note="a note", owner="ana")
    return {
        "letter": str(letter.id),
        "group": letter.group,
        "dead": letter.message_id,
        "message": pending.id,
        "scheduled": scheduled.id,
        "published": str(published),
        "replay": str(replay_id),
    }


def _evidence(message_id: UUID) -> dict[str, Any]:
    where = {"partitions": [0], "offsets": [7], "ids": [message_id.bytes], "min_id": message_id, "max_id": message_id}
    return {"relay": uuid4(), "topic": "payments", "outcome": "published", **where}


CASES = [(name, line, as_json) for name, lines in LINES.items() for line in lines for as_json in (False, True)]


@pytest.mark.parametrize(("name", "line", "as_json"), CASES)
def test_it_runs(outboxkit: Outboxkit, held: Held, name: str, line: str, *, as_json: bool) -> None:
    takes_json = any("--json" in parameter.opts for parameter in _all()[name].params)
    if as_json and not takes_json:
        assert name in WITHOUT_JSON
        return
    arguments = [*name.split(), *line.format_map(held.names).split(), *(["--json"] if as_json else [])]

    done = outboxkit(*arguments)

    allowed = {0, 3} if name in {"status", "audit", "doctor"} else {0}  # something is wrong, and it says so
    assert done.code in allowed, done.err
    assert "unexpected" not in done.err
    if as_json:
        assert [json.loads(line) for line in done.out.splitlines()]
    assert "CANARY-HEADER" not in done.out or "--reveal" in line
