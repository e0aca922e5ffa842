"""The story of the demo, from the first order to the verdict."""

from __future__ import annotations

import json
import random
import signal
import textwrap
import time
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click
from sqlalchemy import Engine, TextClause, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay.demo import judge, world
from outboxkit_relay.demo.world import Failed

if TYPE_CHECKING:
    from types import FrameType

    from outboxkit_relay.demo.judge import Verdict
    from outboxkit_relay.demo.world import Child, World

__all__ = ["tell"]

_SERVICES: Final = "outboxkit_relay.demo.order_flow"
_CHILD: Final = "outboxkit_relay.demo.child"
_TOPICS: Final = ("orders", "stock", "payments", "shipments")
_INDENT: Final = "  "
_CONSUMERS: Final = ("inventory", "payments", "shipping", "confirmation")
# The in-process cluster takes no notice when a member leaves its group: it waits until the session has timed out.
_GROUP_OPTIONS: Final = "?session.timeout.ms=6000&heartbeat.interval.ms=500"
_OUTAGE_SECONDS: Final = 1.5
_SETTLE_SECONDS: Final = 0.03  # until the broker has stored what a stopped relay had sent
_RUN_ON_SECONDS: Final = 0.01  # a relay that was stopped between two batches gets on with the next

_PLACED: Final = text("SELECT count(*) FROM demo_orders")
_PENDING: Final = text("SELECT count(*) FROM outbox_messages WHERE topic = 'orders'")
_UNSENT: Final = text("SELECT count(*) FROM outbox_messages")
_CONFIRMED: Final = text("SELECT count(*) FROM demo_confirmations")
_DEAD: Final = text("SELECT count(*) FROM dead_letters")
_LETTER: Final = text("SELECT id FROM dead_letters")


def tell(orders: int, seed: int, *, keep: bool, as_json: bool) -> int:
    """Tells the story; returns the exit code."""
    began = time.monotonic()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with world.opened(keep=keep, relay__lease="2s", relay__batch_size="20") as place:
            story = _Story(place, orders, seed, quiet=as_json)
            verdict = story.run()
            _conclude(verdict, time.monotonic() - began, as_json=as_json)
            if keep:
                _say_how_to_look(place)
    except Failed as error:
        click.echo(f"outboxkit demo: {error}", err=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if verdict.failures else 0


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo like Ctrl-C: by the way that leaves no process behind."""
    raise KeyboardInterrupt(number)


class _Story:
    """One telling."""

    def __init__(self, place: World, orders: int, seed: int, *, quiet: bool) -> None:
        self.world, self.orders, self.seed, self.quiet = place, orders, seed, quiet
        self.half = orders // 2
        self.poison = random.Random(seed).randint(1, self.half)  # noqa: S311  a story, not a secret
        self.began = time.monotonic()
        self.engine: Engine = open_engine(place.settings["database_url"], patience=timedelta(seconds=10))
        self.address = ""
        self.consumers: dict[str, Child] = {}
        self.duplicates = 0

    def run(self) -> Verdict:
        """From the first process to the last."""
        try:
            cluster, shop, relay = self._start()
            relay = self._lose_a_relay(shop, relay)
            self._lose_the_broker(cluster, shop)
            letter = self._see_what_died()
            self._repair(letter)
            self._stop(relay)
            records = judge.read_all(self.address, _TOPICS)
            return judge.judge(self.engine, records, self.duplicates, self.poison)
        finally:
            self.engine.dispose()

    # --- the chapters --------------------------------------------------------------------------------------------

    def _start(self) -> tuple[Child, Child, Child]:
        cluster = self.world.run("cluster", "outboxkit_relay.demo.cluster", *_TOPICS, answers=True)
        with self.engine.begin() as connection:
            migrations.upgrade(connection)
        url = cluster.read_line()
        self.address = url.partition("://")[2]
        self.world.settings["broker_url"] = url + _GROUP_OPTIONS
        shop = self.world.run("shop", "outboxkit_relay.demo.shop", str(self.seed), str(self.poison), answers=True)
        relay = self._outboxkit("relay-1", "relay", "run")
        for name in _CONSUMERS:
            self.consumers[name] = self._outboxkit(name, "consume", f"{_SERVICES}:{name}")
        shop.read_line()
        self._say("a shop, four services and a relay are up: SQLite and an in-process Kafka cluster, no Docker")
        return cluster, shop, relay

    def _lose_a_relay(self, shop: Child, relay: Child) -> Child:
        shop.say(f"1 {self.half}")
        unsettled = self._kill_in_mid_batch(relay)
        self._say(f"relay killed (SIGKILL) with {unsettled} messages published and not yet settled")
        relay = self._outboxkit("relay-2", "relay", "run")
        shop.read_line()
        self._until_confirmed(self.half - 1, "the first half of the orders is confirmed")
        self._say(
            f"a second relay took over: {self.half - 1} of {self.half} orders are confirmed, one message cannot be read"
        )
        return relay

    def _lose_the_broker(self, cluster: Child, shop: Child) -> None:
        cluster.send(signal.SIGSTOP)
        gone = time.monotonic()
        shop.say(f"{self.half + 1} {self.orders}")
        shop.read_line()
        waiting = self._count(_UNSENT)
        self.world.watch()
        time.sleep(max(0.0, _OUTAGE_SECONDS - (time.monotonic() - gone)))
        cluster.send(signal.SIGCONT)
        self._say(f"the broker was away for {time.monotonic() - gone:.1f} s: orders went on, {waiting} messages waited")
        self._until_confirmed(self.orders - 1, "the other orders are confirmed")

    def _see_what_died(self) -> str:
        world.until(lambda: self._count(_DEAD) == 1, self.world, "one message is dead")
        with self.engine.connect() as connection:
            letter = str(connection.execute(_LETTER).scalar_one()).replace("-", "")[:8]
        self._show("dlq", "show", letter)
        self._show("dlq", "replay", letter, "--yes")
        return letter

    def _repair(self, letter: str) -> None:
        self._retire("inventory")
        self.consumers["inventory"] = self._outboxkit("inventory-2", "consume", f"{_SERVICES}:inventory_repaired")
        started = self.consumers["inventory"]
        world.until(lambda: bool(started.events("consumer.started")), self.world, "the repaired inventory is up")
        self._say("the inventory was repaired: its contract has the default now")
        self._show("dlq", "replay", letter, "--yes", "--why", "the contract has its default now")
        self._until_confirmed(self.orders, "the last order is confirmed")

    def _stop(self, relay: Child) -> None:
        world.until(lambda: self._count(_UNSENT) == 0, self.world, "the outbox is empty")
        for name in list(self.consumers):
            self._retire(name)
        if code := self.world.end(relay):
            raise Failed(f"the relay ended with exit code {code}: {relay.last_words()}")

    # --- their parts ---------------------------------------------------------------------------------------------

    def _kill_in_mid_batch(self, relay: Child) -> int:
        """Stops the relay again and again until the broker has something that the database does not know yet."""
        while True:
            world.until(lambda: self._count(_PENDING) > 0, self.world, "there is something to publish")
            relay.send(signal.SIGSTOP)
            time.sleep(_SETTLE_SECONDS)
            stored = judge.number_of_records(self.address, "orders")
            unsettled = stored - (self._count(_PLACED) - self._count(_PENDING))
            if unsettled > 0:
                self.world.kill(relay)
                return unsettled
            relay.send(signal.SIGCONT)
            time.sleep(_RUN_ON_SECONDS)

    def _outboxkit(self, name: str, *arguments: str) -> Child:
        return self.world.run(name, _CHILD, *arguments)

    def _retire(self, name: str) -> None:
        """Stops a consumer and takes down how many duplicates it caught."""
        child = self.consumers.pop(name)
        if code := self.world.end(child):
            raise Failed(f"{name} ended with exit code {code}: {child.last_words()}")
        (stopped,) = child.events("consumer.stopped")
        counts = stopped["counts"]
        self.duplicates += int(counts.get("duplicate", 0)) if isinstance(counts, dict) else 0

    def _until_confirmed(self, orders: int, what: str) -> None:
        world.until(lambda: self._count(_CONFIRMED) >= orders, self.world, what)

    def _count(self, query: TextClause) -> int:
        with self.engine.connect().execution_options(outboxkit_reading=True) as connection:
            return int(connection.execute(query).scalar_one())

    def _show(self, *arguments: str) -> None:
        """Runs a command for the reader to see."""
        done = self.world.command(*arguments)
        if not self.quiet:
            quoted = " ".join(f'"{part}"' if " " in part else part for part in arguments)
            shown = f"$ outboxkit {quoted}\n{done.stdout}{done.stderr}".rstrip()
            click.echo(f"\n{textwrap.indent(shown, _INDENT)}\n")

    def _say(self, line: str) -> None:
        if not self.quiet:
            click.echo(f"{time.monotonic() - self.began:5.1f} s  {line}")


def _conclude(verdict: Verdict, seconds: float, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(verdict) | {"seconds": round(seconds, 1), "ok": not verdict.failures}))
        return
    click.echo(
        f"\nplaced {verdict.placed}   published {verdict.published}   redelivered {verdict.redelivered}   "
        f"duplicates caught {verdict.duplicates_caught}   handled {verdict.handled}   replayed {verdict.replayed}"
    )
    for failure in verdict.failures:
        click.echo(click.style("FAILED", fg="red", bold=True) + f"  {failure}")
    if not verdict.failures:
        good = click.style("✓", fg="green", bold=True)
        click.echo(f"{good} nothing lost, nothing doubled, order kept per key, books balance ({seconds:.0f} s)")


def _say_how_to_look(place: World) -> None:
    click.echo(f"\nkept in {place.folder}; look at it:")
    click.echo(f"  export OUTBOXKIT_DATABASE_URL={place.settings['database_url']}")
    click.echo("  outboxkit status")
    click.echo("  outboxkit dlq list --state all")
