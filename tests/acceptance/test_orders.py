"""The order flow of docs/examples, with its failing paths: embedded, and on real servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql
from sqlalchemy import make_url

from tests import servers
from tests.servers.postgres import connect, create_database, drop_database

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "orders"
SERVICES = ("shop", "inventory", "payments", "shipping", "recommendations")
FAULTS = ("--payment-down", "12", "--declined", "2", "--shipment-fails", "3", "--recommendations-off")
BALANCED = "✓ every order ended, what was undone left nothing, the books balance"


def run(*options: str) -> str:
    program = [sys.executable, str(EXAMPLE), *options]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_faults_every_order_is_confirmed() -> None:
    assert run("--orders", "10").splitlines()[-2:] == [
        "confirmed 10   cancelled 0   held at the bank 550",
        BALANCED,
    ]


def test_with_faults_what_fails_is_undone_and_the_rest_goes_through() -> None:
    told = run(*FAULTS)

    page = (EXAMPLE / "README.md").read_text().partition("```text\n")[2].partition("```")[0]
    same = [line for line in told.splitlines() if not line.startswith("guard bank")]
    assert same[:2] == page.splitlines()[:2]
    assert same[-2:] == page.splitlines()[-2:]
    assert "guard bank: 23 succeeded, 12 failed" in told
    assert "pay: undo sent to payments\n  reserve: undo sent to inventory\n  compensated" in told


def test_what_is_out_of_stock_is_cancelled() -> None:
    assert "confirmed 24   cancelled 0" in run("--orders", "24")


@pytest.fixture
def databases(postgres: servers.Server) -> Iterator[str]:
    """A database for each service, as a URL with ``{service}`` in it."""
    first = create_database(postgres.url, f"_{SERVICES[0]}")
    pattern = first.removesuffix(SERVICES[0]) + "{service}"
    created = [first]
    for service in SERVICES[1:]:
        with connect(postgres.url) as connection:
            name = sql.Identifier(make_url(pattern.format(service=service)).database or "")
            connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        created.append(pattern.format(service=service))
    yield pattern
    for url in created:
        drop_database(url)


@pytest.mark.parametrize("broker", ["kafka", "rabbitmq"])
def test_the_flow_is_the_same_on_real_servers(broker: str, databases: str, request: pytest.FixtureRequest) -> None:
    server: servers.Server = request.getfixturevalue(broker)

    told = run(*FAULTS, "--broker", server.url, "--databases", databases)

    assert told.splitlines()[-2:] == ["confirmed 15   cancelled 5   held at the bank 1950", BALANCED]
