"""Fixtures for every kind of test: the real servers, and a fresh database for each test that wants one."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite(  # the suites that ship are tests, too: before anybody imports them
    "outboxkit.testing.broker_conformance",
    "outboxkit.testing.broker_harness",
    "outboxkit.testing.broker_reading",
    "outboxkit.testing.dialect_conformance",
)

from tests import canaries, servers  # noqa: E402
from tests.servers.postgres import (  # noqa: E402
    Templates,
    create_database,
    drop_database,
    forget_the_disk,
    minding_the_disk,
)

_NEEDS = {"database_url": "postgres", "empty_database_url": "postgres", **{kind: kind for kind in servers.KINDS}}
_found: dict[str, Future[servers.Server]] = {}


# `scripts/test --full` asks for the large counts. No deadlines: a loaded machine is slow, not wrong.
PROFILE = os.environ.get("OUTBOXKIT_PROFILE", "short")
hypothesis.settings.register_profile("short", max_examples=100, deadline=None)
hypothesis.settings.register_profile("full", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(PROFILE)


def pytest_report_header() -> str:
    return f"outboxkit profile: {PROFILE}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `full` belong to the full profile only."""
    if PROFILE == "full":
        return
    large = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)


def _needed(item: pytest.Item) -> set[str]:
    return {_NEEDS[name] for name in getattr(item, "fixturenames", ()) if name in _NEEDS}


def pytest_report_collectionfinish(config: pytest.Config, start_path: Path, items: Sequence[pytest.Item]) -> list[str]:
    """Start what the collected tests need, side by side, and say in the header what they will run on."""
    del start_path
    kinds = sorted(set().union(*map(_needed, items))) if items else []
    if not kinds or config.option.collectonly:
        return []
    with ThreadPoolExecutor(len(kinds)) as pool:
        _found.update({kind: pool.submit(servers.find, kind) for kind in kinds})
    return [_headline(kind) for kind in kinds]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No test shows a secret, whatever it is about."""
    report = yield
    if report.when == "teardown":
        canaries.fails_where_one_is_shown(item, report)
    return report


def _headline(kind: str) -> str:
    error = _found[kind].exception()
    if error is not None:
        return f"test server: {kind} MISSING, every test that needs it fails: {error}"
    server = _found[kind].result()
    return f"test server: {server.name} {server.version} ({server.source}), {server.bootstrap}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test may kill, stop or pause a server; the next one finds it up."""
    for kind in _needed(item):
        if kind in _found and _found[kind].exception() is None:
            _found[kind].result().heal()


def pytest_sessionfinish() -> None:
    """Stop what was started; the watchdog does the same if we do not get here."""
    for future in _found.values():
        if future.exception() is None:
            future.result().close()
    _found.clear()
    servers.find.cache_clear()


def _server(kind: str) -> servers.Server:
    try:
        return _found[kind].result() if kind in _found else servers.find(kind)
    except servers.Unavailable as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def postgres() -> servers.Server:
    """The PostgreSQL server, to kill or pause; tests that only want to use it take `database_url`."""
    server = _server("postgres")
    if not isinstance(server, servers.Given):
        forget_the_disk(server.url)
    return server


@pytest.fixture
def durable(postgres: servers.Server) -> Iterator[None]:
    """The server waits for its disk meanwhile: `outboxkit doctor` looks whether it does."""
    with minding_the_disk(postgres.url):
        yield


@pytest.fixture(scope="session")
def templates(postgres: servers.Server) -> Iterator[Templates]:
    """Databases that have their tables already, for fixtures to lend."""
    found = Templates(postgres)
    yield found
    found.drop()


@pytest.fixture
def empty_database_url(postgres: servers.Server) -> Iterator[str]:
    """An empty database of its own, as `postgresql+psycopg://…`; dropped afterwards, whoever is still connected."""
    url = create_database(postgres.url)
    yield url
    postgres.heal()
    drop_database(url)


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """The database that a folder's tests start from: empty, where its conftest does not lend one with tables."""
    return empty_database_url


@pytest.fixture(scope="session")
def kafka() -> servers.Server:
    """The Kafka broker; `kafka.url` is `kafka://host:port`, `kafka.bootstrap` the part that other clients want."""
    return _server("kafka")


@pytest.fixture(scope="session")
def rabbitmq() -> servers.Server:
    """The RabbitMQ broker; `rabbitmq.url` is an amqp URL with its credentials."""
    return _server("rabbitmq")
