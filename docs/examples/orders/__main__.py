"""Runs the shop and its services in one process, with faults on request, and checks the books at the end.

python docs/examples/orders --help
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import click
from bank import bank
from checkout import Order, checkout
from services import (
    STOCK,
    Base,
    Payment,
    Recommendation,
    Reservation,
    Shipment,
    inventory,
    payments,
    recommendations,
    shipping,
    unroadworthy,
)
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import Consumer, correlation, guards, migrations, saga
from outboxkit.brokers import Subscription, open_subscriber
from outboxkit.dialects import open_engine
from outboxkit.outbox import pauses
from outboxkit_relay import Relay, load

SERVICES: dict[str, Callable[[sessionmaker[Session]], Consumer]] = {
    "shop": checkout,
    "inventory": inventory,
    "payments": payments,
    "shipping": shipping,
    "recommendations": recommendations,
}
PRODUCED = ("confirmations", "cancellations")  # topics of which nobody here is the only reader
RECOMMENDED = pauses.Target(pauses.Scope.DESTINATION, "confirmations")
PATIENCE = 60.0  # seconds until an order must have ended


@dataclass
class World:
    """The services' databases."""

    engines: dict[str, Engine]

    def read(self, service: str, query: object) -> list[tuple[object, ...]]:
        with Session(self.engines[service]) as session:
            return [tuple(row) for row in session.execute(query)]  # type: ignore[call-overload]

    def statuses(self) -> Counter[str]:
        return Counter(dict(self.read("shop", select(Order.status, func.count()).group_by(Order.status))))


@asynccontextmanager
async def running(databases: str, broker: str) -> AsyncIterator[World]:
    """Every service with its consumer and its relay, for as long as the block runs."""
    engines, stop = {}, asyncio.Event()
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        consumers = []
        for name, make in SERVICES.items():
            url = databases.format(service=name)
            engines[name] = open_engine(url, patience=timedelta(seconds=10))
            stack.callback(engines[name].dispose)
            with engines[name].begin() as connection:
                Base.metadata.create_all(connection)
                migrations.upgrade(connection)
            consumers.append(make(sessionmaker(engines[name])))
        for subscription in (*(one.subscription for one in consumers), Subscription(consumer="", topics=PRODUCED)):
            subscriber = open_subscriber(broker, subscription)
            await subscriber.declare(subscription)
            await subscriber.close()
        for name in SERVICES:
            await stack.enter_async_context(
                Relay(load(None, database_url=databases.format(service=name), broker_url=broker))
            )
        for consumer in consumers:
            group.create_task(consumer.run(broker, stop))
        stack.callback(stop.set)
        yield World(engines)


async def until(fact: Callable[[], bool], what: str) -> None:
    """Waits for a fact."""
    end = time.monotonic() + PATIENCE
    while not fact():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not happen within {PATIENCE:.0f} s")
        await asyncio.sleep(0.02)


def check(world: World, orders: int) -> None:
    """Compares the books of all services."""
    ended = dict(world.read("shop", select(Order.id, Order.status)))
    confirmed = {order for order, status in ended.items() if status == "confirmed"}
    totals = dict(world.read("shop", select(Order.id, Order.total)))
    books = {
        "reservations": {order for (order,) in world.read("inventory", select(Reservation.order_id))},
        "payments": {order for (order,) in world.read("payments", select(Payment.order_id))},
        "shipments": {order for (order,) in world.read("shipping", select(Shipment.order_id))},
    }
    wrong = {name: found ^ confirmed for name, found in books.items() if found != confirmed}
    money = sum(totals[order] for order in confirmed)
    if wrong or sum(bank.held.values()) != money or len(ended) != orders:
        raise SystemExit(f"the books do not balance: {wrong}, {sum(bank.held.values())} held for {money}")
    click.echo(f"confirmed {len(confirmed)}   cancelled {len(ended) - len(confirmed)}   held at the bank {money}")
    click.echo("✓ every order ended, what was undone left nothing, the books balance")


async def tell(databases: str, broker: str, orders: int, *, switched_off: bool) -> None:
    """Places orders, waits until each has ended, and checks."""
    async with running(databases, broker) as world:
        if switched_off:
            with world.engines["shop"].begin() as connection:
                pauses.pause(connection, RECOMMENDED, by="example", reason="under load", lasts=timedelta(hours=1))
            click.echo("recommendations are switched off: their topic is paused")
        for number in range(1, orders + 1):
            with correlation(f"checkout-{number}"), Session(world.engines["shop"]) as session, session.begin():
                session.add(Order(id=number, item="anvil" if number % 2 else "rope", total=10 * number).place())
        click.echo(f"{orders} orders placed")
        await until(lambda: world.statuses()["placed"] == 0, "the end of every order")
        await undone(world)
        for one in guards.report():
            click.echo(f"guard {one.name}: {one.succeeded} succeeded, {one.failed} failed, {one.refused} refused")
        await recommended(world, switched_off=switched_off)
        show(world)
        check(world, orders)


async def undone(world: World) -> None:
    """Waits until what was undone is undone everywhere."""

    def same() -> bool:
        found = {order for order, status in world.read("shop", select(Order.id, Order.status)) if status == "confirmed"}
        books = (("inventory", Reservation), ("payments", Payment), ("shipping", Shipment))
        return all({order for (order,) in world.read(name, select(book.order_id))} == found for name, book in books)

    await until(same, "the end of every compensation")


async def recommended(world: World, *, switched_off: bool) -> None:
    """Waits until every confirmed order has its recommendation; switches that on again where it was off."""
    if switched_off:
        waiting = len(world.read("recommendations", select(Recommendation.order_id)))
        click.echo(f"recommendations made: {waiting}; the others wait")
        with world.engines["shop"].begin() as connection:
            pauses.resume(connection, RECOMMENDED, by="example", why="the load is gone")
    await until(
        lambda: len(world.read("recommendations", select(Recommendation.order_id))) == world.statuses()["confirmed"],
        "every recommendation",
    )


def show(world: World) -> None:
    """Shows the history of one order that was undone: of the one that had come furthest."""
    with world.engines["shop"].connect() as connection:
        found = saga.find(connection, saga="checkout", status=saga.Status.COMPENSATED)
    for one in sorted(found, key=lambda row: (-len(row.history), int(row.key)))[:1]:
        click.echo(f"order {one.key} ({one.correlation_id}):")
        for _, text in one.history:
            click.echo(f"  {text}")


@click.command()
@click.option("--orders", default=20, show_default=True, type=click.IntRange(1, 2 * STOCK), help="Orders to place.")
@click.option("--payment-down", default=0, type=click.IntRange(0, 100), help="Calls of the bank that get no answer.")
@click.option("--declined", default=0, type=click.IntRange(0), help="Orders that the bank declines.")
@click.option("--shipment-fails", default=0, type=click.IntRange(0), help="Orders that cannot be shipped.")
@click.option("--recommendations-off", is_flag=True, help="Switch work that can wait off, and on again at the end.")
@click.option("--broker", default="memory://orders", show_default=True, help="Any broker of outboxkit.")
@click.option("--databases", metavar="URL", help="With {service} in it. Default: SQLite files that go at the end.")
def main(
    *,
    orders: int,
    payment_down: int,
    declined: int,
    shipment_fails: int,
    recommendations_off: bool,
    broker: str,
    databases: str | None,
) -> None:
    """Orders through four services: reserved, paid and shipped, or undone."""
    logging.basicConfig(level=logging.ERROR)
    bank.outage = payment_down
    bank.poor = frozenset(range(1, declined + 1))
    unroadworthy.update(range(declined + 1, declined + shipment_fails + 1))
    with tempfile.TemporaryDirectory() as folder:
        url = databases or f"sqlite:///{folder}/{{service}}.db"
        asyncio.run(tell(url, broker, orders, switched_off=recommendations_off))


if __name__ == "__main__":
    main()
    sys.exit()
