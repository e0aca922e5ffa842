"""``outboxkit db``."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from outboxkit import tables
from outboxkit_relay.exit_codes import Exit
from tests.unit.relay.cli.conftest import Outboxkit


def test_an_upgrade_creates_and_a_second_one_changes_nothing(outboxkit: Outboxkit) -> None:
    assert outboxkit("db", "upgrade", "--dry-run").out == f"version none, would become {tables.VERSION}\n"
    assert outboxkit("db", "check").code == Exit.PROBLEMS
    assert outboxkit("db", "upgrade").out == f"version none, now {tables.VERSION}\n"
    assert outboxkit("db", "upgrade").out == f"version {tables.VERSION}, now {tables.VERSION}\n"
    assert outboxkit("db", "check").code == Exit.OK


def test_the_printed_script_makes_tables_that_the_check_likes(outboxkit: Outboxkit, tmp_path: Path) -> None:
    script = outboxkit("db", "sql", "--dialect", "sqlite").out
    with sqlite3.connect(tmp_path / "app.db") as connection:
        connection.executescript(script)
    connection.close()

    assert json.loads(outboxkit("db", "check", "--json").out) == {"version": tables.VERSION, "problems": []}


def test_the_check_names_what_is_wrong(outboxkit: Outboxkit, tmp_path: Path) -> None:
    outboxkit("db", "upgrade")
    with sqlite3.connect(tmp_path / "app.db") as connection:
        connection.execute("DROP INDEX outbox_messages_xid")
    connection.close()

    found = outboxkit("db", "check")

    assert found.code == Exit.PROBLEMS
    assert "outbox_messages_xid" in found.out
