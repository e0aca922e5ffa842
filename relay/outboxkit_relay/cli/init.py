"""``outboxkit init``: the tables, and topics, exchanges and queues."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import click
from sqlalchemy import inspect

from outboxkit import dialects, migrations, tables
from outboxkit.brokers import Subscription, open_subscriber
from outboxkit_relay import redaction
from outboxkit_relay.cli.console import database, import_string

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_SOON: Final = 1.0  # seconds; a person who waits longer is told for what


@click.command()
@click.option("--topology", metavar="APP", multiple=True, help="Also what the consumer app:name needs at the broker.")
@click.option("--topic", metavar="NAME", multiple=True, help="Also this topic at the broker, for producers.")
@click.option("--dry-run", is_flag=True, help="Show what would be created.")
@click.pass_obj
def command(invocation: Invocation, topology: tuple[str, ...], topic: tuple[str, ...], *, dry_run: bool) -> None:
    """Create the tables, and what the broker needs.

    Running it again adds what is missing and changes nothing else.
    """
    subscriptions = [import_string.subscription(import_string.load(name)) for name in topology]
    if topic:
        subscriptions.append(Subscription(consumer="", topics=topic))
    _create_tables(invocation, dry_run=dry_run)
    for subscription in subscriptions:
        if dry_run:
            for name in (*subscription.topics, *subscription.queues):
                click.echo(f"would declare {name}" + (f" for {subscription.consumer}" if subscription.consumer else ""))
        else:
            for line in asyncio.run(_declare(invocation, subscription)):
                click.echo(line)


def _create_tables(invocation: Invocation, *, dry_run: bool) -> None:
    with database.opened(invocation, creates=True) as engine, database.connect(engine) as connection:
        if (schema := invocation.settings.database_schema) and not dry_run:
            migrations.create_schema(connection, schema)
        known = set(inspect(connection).get_table_names())
        missing = [name for name in tables.METADATA.tables if name not in known]
        if not dry_run:
            migrations.upgrade(connection)
            connection.commit()
        for name in sorted(missing):
            click.echo(f"{'would create' if dry_run else 'created'} table {name}")
        count = len(tables.METADATA.tables)
        click.echo(f"{count - len(missing)} of {count} tables were there already; version {tables.VERSION}")
        where = dialects.schema_of(connection)
        for other in dialects.schemas(connection):
            if other != where:
                click.echo(f"note: there are outbox tables in the schema {other}, too; these are in {where}")


async def _declare(invocation: Invocation, subscription: Subscription) -> list[str]:
    url = invocation.settings.broker_address()
    subscriber = open_subscriber(url, subscription, invocation.settings.broker)
    declared = asyncio.ensure_future(subscriber.declare(subscription))
    try:
        if not (await asyncio.wait([declared], timeout=_SOON))[0]:
            click.echo(f"waiting for the broker at {redaction.redacted(url)}", err=True)
        return list(await declared)
    finally:
        await subscriber.close()
