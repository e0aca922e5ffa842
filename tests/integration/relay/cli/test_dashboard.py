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
        place = str(page.url).rstrip("/")
        form = {"scope": "destination", "name": "orders", "why": "x", FIELD: client.cookies[COOKIE]}
        assert client.post(f"{place}/do/pause", data=form, headers={"origin": root}).status_code == 403
        stranger = httpx2.get(f"{place}/")
        assert stranger.status_code == 401, "the path is no secret that would do"

        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
        _, err = process.communicate()
        assert "token" not in err


def test_its_cookies_are_not_for_other_ports_and_do_not_hold_the_token(engine: Engine) -> None:
    """A browser sends the cookies of this machine to every port of it, with the paths for which they are."""
    with serving() as (address, _), httpx2.Client(follow_redirects=True) as client:
        place = client.get(address).url.path.rstrip("/")

        cookies = {cookie.name: cookie for cookie in client.cookies.jar}
        assert len(cookies) == 2
        assert {cookie.path.rstrip("/") for cookie in cookies.values()} == {place}
        assert len(place) > 16
        assert address.partition("token=")[2] not in {cookie.value for cookie in cookies.values()}
        assert client.get(address.replace("127.0.0.1", "localhost")).status_code == 200
        for host in ("[::1", "127.0.0.1:abc", "evil.example"):
            assert httpx2.get(address, headers={"host": host}).status_code == 401
            assert client.get(f"{address.partition('/enter')[0]}{place}/", headers={"host": host}).status_code == 421


def test_what_is_done_there_is_in_the_audit_log_under_the_name_of_who_started_it(engine: Engine) -> None:
    with serving("--access", "operate") as (address, _), httpx2.Client(follow_redirects=True) as client:
        root = address.partition("/enter")[0]
        place = str(client.get(address).url).rstrip("/")
        form = {"scope": "destination", "name": "orders", "why": "night", "lasts": "", FIELD: client.cookies[COOKIE]}
        assert client.post(f"{place}/do/pause", data=form, headers={"origin": root}).status_code == 200

    with engine.connect() as connection:
        (entry,) = connection.execute(select(tables.outbox_audit)).all()
    assert entry.who.endswith("(page)")
    assert (entry.action, entry.why) == ("control.pause", "night")


def test_a_database_without_tables_is_told_at_the_start(outboxkit: Outboxkit, tmp_path: Path) -> None:
    (tmp_path / "app.db").touch()

    done = outboxkit("dashboard", "--port", "0")

    assert done.code == 2
    assert "run `outboxkit init`" in done.err
