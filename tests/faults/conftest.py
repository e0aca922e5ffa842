"""The faults' world: the acceptance tests' own. A test says on which brokers it runs in the short profile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outboxkit import migrations
from tests import servers
from tests.acceptance.world import QUICK_GROUP, AcceptanceEnvironment, Kafka, RabbitMQ, declare, forget
from tests.faults.traffic import is_kafka

_SCORES = pytest.StashKey[list[str]]()


@pytest.fixture
def scores(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed at the end of the run."""
    return pytestconfig.stash.setdefault(_SCORES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(_SCORES, []):
        terminalreporter.write_line(line)


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """Up at the beginning, whatever the test before did to it."""
    found: servers.Server = request.getfixturevalue(request.param)
    found.heal()
    yield found
    found.heal()


@pytest.fixture
def reader(broker: servers.Server) -> Kafka | RabbitMQ:
    return Kafka(broker) if is_kafka(broker) else RabbitMQ(broker)


@pytest.fixture
def world(
    database_url: str, broker: servers.Server, reader: Kafka | RabbitMQ, tmp_path: Path
) -> Iterator[AcceptanceEnvironment]:
    """Tables, topology and an audit of what is published."""
    forget(broker)
    made = AcceptanceEnvironment(database_url, broker.url + QUICK_GROUP if is_kafka(broker) else broker.url, tmp_path)
    made.create_tables()
    with made.engine.begin() as connection:
        migrations.upgrade(connection)
    declare(broker.url)
    reader.prepare()
    yield made
    made.close()
