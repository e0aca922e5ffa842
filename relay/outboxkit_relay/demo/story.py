"""The story of the demo, from the first order to the verdict."""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import signal
import textwrap
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click
from sqlalchemy import Engine, TextClause, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay.demo import judge, servers, world
from outboxkit_relay.demo.witness import witness
from outboxkit_relay.demo.world import Failed

if TYPE_CHECKING:
    from types import FrameType

    from outboxkit_relay.demo.judge import Verdict
    from outboxkit_relay.demo.witness import Witness
    from outboxkit_relay.demo.world import Child, World

__all__ = ["Plan", "tell"]

_FLOW: Final = "outboxkit_relay.demo.order_flow"
_CHILD: Final = "outboxkit_relay.demo.child"
_TOPICS: Final = ("orders", "stock", "payments", "shipments")
_INDENT: Final = "  "
_CONSUMERS: Final = ("inventory", "payments", "shipping", "confirmation")
# The in-process cluster takes no notice when a member leaves its group: it waits until the session has timed out.
_GROUP_OPTIONS: Final = "?session.timeout.ms=6000&heartbeat.interval.ms=500"
_OUTAGE_SECONDS: Final = 1.5
_ARRIVAL_SECONDS: Final = 0.03  # until the broker has stored what a stopped relay had sent
_OPENING_SECONDS: Final = 2  # orders come one by one, so that there are many batches to be caught in
_PATIENCE_SECONDS: Final = 60.0

_SETTLED: Final = text(
    "SELECT (SELECT count(*) FROM demo_orders) - (SELECT count(*) FROM outbox_messages WHERE topic LIKE '%orders')"
)
_UNSENT: Final = text("SELECT count(*) FROM outbox_messages")
_CONFIRMED: Final = text("SELECT count(*) FROM demo_confirmations")
_DEAD: Final = text("SELECT count(*) FROM dead_letters")
_LETTER: Final = text("SELECT id FROM dead_letters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the person asked for; an empty URL means the demo's own."""

    orders: int
    seed: int
    keep: bool
    as_json: bool
    database: str = ""
    broker: str = ""


def tell(plan: Plan) -> int:
    """Tells the story; returns the exit code."""
    began = time.monotonic()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        verdict = _tell(plan)
    except Failed as error:
        click.echo(f"outboxkit demo: {error}", err=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    _conclude(verdict, time.monotonic() - began, as_json=plan.as_json)
    return 1 if verdict.failures else 0


def _tell(plan: Plan) -> Verdict:
    name = f"outboxkit_demo_{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(world.opened(keep=plan.keep, relay__lease="2s", relay__batch_size="100"))
        prefix = f"{name}-" if plan.broker else ""
        place.write_names(prefix=prefix)
        if plan.database:
            place.settings["database_url"] = stack.enter_context(
                servers.own_database(plan.database, name, keep=plan.keep)
            )
        if plan.broker:
            place.settings["broker_url"] = plan.broker
        verdict = _Story(place, plan, prefix).run()
        if plan.keep:
            _say_how_to_look(place)
        return verdict


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo like Ctrl-C: by the way that leaves no process behind."""
    raise KeyboardInterrupt(number)


class _Story:
    """One telling."""

    def __init__(self, place: World, plan: Plan, prefix: str) -> None:
        self.world, self.plan = place, plan
        self.half = plan.orders // 2
        self.poison = random.Random(plan.seed).randint(1, self.half)  # noqa: S311  a story, not a secret
        self.topics = [f"{prefix}{name}" for name in _TOPICS]
        self.began = time.monotonic()
        self.engine: Engine = open_engine(place.settings["database_url"], patience=timedelta(seconds=10))
        self.consumers: dict[str, Child] = {}
        self.duplicates = 0

    def run(self) -> Verdict:
        """From the first process to the last."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.engine.dispose)
            cluster = self._open_broker()
            watching = witness(self.world.settings["broker_url"], self.topics)
            stack.callback(watching.close)
            shop, relay = self._start()
            relay = self._lose_a_relay(shop, relay, watching)
            self._lose_the_broker(cluster, shop)
            self._repair(self._see_what_died())
            self._stop(relay)
            return judge.judge(self.engine, watching.read_all(self.topics), self.duplicates, self.poison)

    # --- the chapters --------------------------------------------------------------------------------------------

    def _open_broker(self) -> Child | None:
        """Tables and topics; the in-process cluster unless there is another broker."""
        own = None
        if not self.plan.broker:
            own = self.world.run("cluster", "outboxkit_relay.demo.cluster", *self.topics, answers=True)
        with self.engine.begin() as connection:
            migrations.upgrade(connection)
        if own:
            self.world.settings["broker_url"] = own.read_line() + _GROUP_OPTIONS
            return own
        topology = [part for name in _CONSUMERS for part in ("--topology", f"{_FLOW}:{name}")]
        done = self.world.command("init", *topology)
        if done.returncode:
            raise Failed(done.stderr.strip())
        return None

    def _start(self) -> tuple[Child, Child]:
        shop = self.world.run("shop", "outboxkit_relay.demo.shop", str(self.plan.seed), str(self.poison), answers=True)
        relay = self._outboxkit("relay-1", "relay", "run", relay__batch_size="5")
        for name in _CONSUMERS:
            self.consumers[name] = self._outboxkit(name, "consume", f"{_FLOW}:{name}")
        shop.read_line()
        database = "your PostgreSQL" if self.plan.database else "SQLite"
        broker = "your broker" if self.plan.broker else "an in-process Kafka cluster, no Docker"
        self._say(f"a shop, four services and a relay are up: {database} and {broker}")
        return shop, relay

    def _lose_a_relay(self, shop: Child, relay: Child, watching: Witness) -> Child:
        world.until(lambda: bool(relay.events("relay.joined")), self.world, "the relay is up")
        shop.say(f"1 {self.half} {_OPENING_SECONDS}")
        unsettled = self._kill_in_mid_batch(relay, watching)
        self._say(f"relay killed (SIGKILL) with {unsettled} messages published and not yet settled")
        relay = self._outboxkit("relay-2", "relay", "run")
        shop.read_line()
        self._until_confirmed(self.half - 1, "the first half of the orders is confirmed")
        self._say(
            f"a second relay took over: {self.half - 1} of {self.half} orders are confirmed, one message cannot be read"
        )
        return relay

    def _lose_the_broker(self, cluster: Child | None, shop: Child) -> None:
        gone = time.monotonic()
        if cluster:
            cluster.send(signal.SIGSTOP)
        shop.say(f"{self.half + 1} {self.plan.orders} 0")
        shop.read_line()
        if cluster:
            self._bring_the_broker_back(cluster, gone)
        self._until_confirmed(self.plan.orders - 1, "the other orders are confirmed")

    def _bring_the_broker_back(self, cluster: Child, gone: float) -> None:
        waiting = self._count(_UNSENT)
        self.world.watch()
        time.sleep(max(0.0, _OUTAGE_SECONDS - (time.monotonic() - gone)))
        cluster.send(signal.SIGCONT)
        self._say(f"the broker was away for {time.monotonic() - gone:.1f} s: orders went on, {waiting} messages waited")

    def _see_what_died(self) -> str:
        world.until(lambda: self._count(_DEAD) == 1, self.world, "one message is dead")
        with self.engine.connect() as connection:
            letter = str(connection.execute(_LETTER).scalar_one()).replace("-", "")[:8]
        self._show("dlq", "show", letter)
        self._show("dlq", "replay", letter, "--yes")
        return letter

    def _repair(self, letter: str) -> None:
        self._retire("inventory")
        self.consumers["inventory"] = self._outboxkit("inventory-2", "consume", f"{_FLOW}:inventory_repaired")
        started = self.consumers["inventory"]
        world.until(lambda: bool(started.events("consumer.started")), self.world, "the repaired inventory is up")
        self._say("the inventory was repaired: its contract has the default now")
        self._show("dlq", "replay", letter, "--yes", "--why", "the contract has its default now")
        self._until_confirmed(self.plan.orders, "the last order is confirmed")

    def _stop(self, relay: Child) -> None:
        world.until(lambda: self._count(_UNSENT) == 0, self.world, "the outbox is empty")
        for name in list(self.consumers):
            self._retire(name)
        if code := self.world.end(relay):
            raise Failed(f"the relay ended with exit code {code}: {relay.last_words()}")

    # --- their parts ---------------------------------------------------------------------------------------------

    def _kill_in_mid_batch(self, relay: Child, watching: Witness) -> int:
        """Kills the relay when the broker has something that the database does not know yet; returns how much."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if self._unsettled(watching) <= 0:
                self.world.watch()
                continue
            # It may settle before it stands still: what counts is what is true then.
            relay.send(signal.SIGSTOP)
            time.sleep(_ARRIVAL_SECONDS)
            if (unsettled := self._unsettled(watching)) > 0:
                self.world.kill(relay)
                return unsettled
            relay.send(signal.SIGCONT)
        raise Failed("no relay could be caught in mid-batch; try again with more --orders")

    def _unsettled(self, watching: Witness) -> int:
        stored = watching.count(self.topics[0])  # first: what is settled later only makes the difference smaller
        return stored - self._count(_SETTLED)

    def _outboxkit(self, name: str, *arguments: str, **settings: str) -> Child:
        return self.world.run(name, _CHILD, *arguments, settings=settings)

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
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return int(connection.execute(query).scalar_one())

    def _show(self, *arguments: str) -> None:
        """Runs a command for the reader to see."""
        done = self.world.command(*arguments)
        if not self.plan.as_json:
            quoted = " ".join(f'"{part}"' if " " in part else part for part in arguments)
            shown = f"$ outboxkit {quoted}\n{done.stdout}{done.stderr}".rstrip()
            click.echo(f"\n{textwrap.indent(shown, _INDENT)}\n")

    def _say(self, line: str) -> None:
        if not self.plan.as_json:
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
