"""``outboxkit dashboard`` as a process: who has its address may look, nobody else; a signal ends it well."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import Engine, select

from outboxkit import tables
from outboxkit_relay.dashboard.access import COOKIE, FIELD
from tests.deadlines import DEADLINE
from tests.unit.relay.cli.conftest import Outboxkit

PROGRAM = Path(sys.executable).with_name("outboxkit")


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address that the command prints, and its process."""
    command = [str(PROGRAM), "dashboard", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/enter\?token=[\w-]{32}", address), address
        yield address, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_to_its_address_alone_and_ends_with_zero(engine: Engine, number: signal.Signals) -> None:
    with serving() as (address, process), httpx2.Client(follow_redirects=True) as client:
        root = address.partition("/enter")[0]
        assert client.get(root).status_code == 401
        assert client.get(f"{root}/enter?token=x").status_code == 401
        assert client.get(f"{root}/static/page.css").status_code == 401
        assert client.get(address, headers={"host": "evil.example"}).status_code in (401, 421)

        page = client.get(address)
        assert "Healthy" in page.text
        assert "may read" in page.text
        assert "token" not in str(page.url)
        form = {"scope": "destination", "name": "orders", "why": "x", FIELD: client.cookies[COOKIE]}
        assert client.post(f"{root}/do/pause", data=form, headers={"origin": root}).status_code == 403

        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
        _, err = process.communicate()
        assert "token" not in err


def test_what_is_done_there_is_in_the_audit_log_under_the_name_of_who_started_it(engine: Engine) -> None:
    with serving("--access", "operate") as (address, _), httpx2.Client(follow_redirects=True) as client:
        root = address.partition("/enter")[0]
        client.get(address)
        form = {"scope": "destination", "name": "orders", "why": "night", "lasts": "", FIELD: client.cookies[COOKIE]}
        assert client.post(f"{root}/do/pause", data=form, headers={"origin": root}).status_code == 200

    with engine.connect() as connection:
        (entry,) = connection.execute(select(tables.outbox_audit)).all()
    assert entry.who.endswith("(page)")
    assert (entry.action, entry.why) == ("control.pause", "night")


def test_a_database_without_tables_is_told_at_the_start(outboxkit: Outboxkit) -> None:
    done = outboxkit("dashboard", "--port", "0")

    assert done.code == 2
    assert "run `outboxkit init`" in done.err
