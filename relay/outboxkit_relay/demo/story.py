"""The story of the demo, from the first order to the verdict."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click
from sqlalchemy import Engine, TextClause, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay.demo import audit, detour, servers, world
from outboxkit_relay.demo.screen import Screen
from outboxkit_relay.demo.witness import READER, witness
from outboxkit_relay.demo.world import Failed

if TYPE_CHECKING:
    from types import FrameType

    from outboxkit_relay.demo.audit import Verdict
    from outboxkit_relay.demo.witness import Witness
    from outboxkit_relay.demo.world import Child, World

__all__ = ["Plan", "tell"]

_FLOW: Final = "outboxkit_relay.demo.order_flow"
_CHILD: Final = "outboxkit_relay.demo.child"
_TOPICS: Final = ("orders", "stock", "payments", "shipments")
_CONSUMERS: Final = ("inventory", "payments", "shipping", "confirmation")
# The in-process cluster takes no notice when a member leaves its group: it waits until the session has timed out.
_GROUP_OPTIONS: Final = "?session.timeout.ms=6000&heartbeat.interval.ms=500"
_OUTAGE_SECONDS: Final = 1.5
_OPENING_SECONDS: Final = 2  # orders come one by one, so that there are many batches
_MID_BATCH: Final = "settle.before_commit=stop:3"  # so that the kill never comes a moment too late
_CUSTOMER_SECONDS: Final = 1.0  # between two orders of a world that is kept

_SETTLED: Final = text(
    "SELECT (SELECT count(*) FROM demo_orders) + (SELECT count(*) FROM demo_reservations) "
    "+ (SELECT count(*) FROM demo_payments) + (SELECT count(*) FROM demo_shipments) "
    "- (SELECT count(*) FROM outbox_messages)"
)
_UNSENT: Final = text("SELECT count(*) FROM outbox_messages")
_CONFIRMED: Final = text("SELECT count(*) FROM demo_confirmations")
_DEAD: Final = text("SELECT count(*) FROM dead_letters")
_LETTER: Final = text("SELECT id FROM dead_letters")
_PROGRESS: Final = text(
    "SELECT (SELECT count(*) FROM demo_orders) AS placed, (SELECT count(*) FROM demo_reservations) AS reserved, "
    "(SELECT count(*) FROM demo_payments) AS paid, (SELECT count(*) FROM demo_shipments) AS shipped, "
    "(SELECT count(*) FROM demo_confirmations) AS confirmed"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the person asked for; an empty URL means the demo's own."""

    orders: int
    seed: int
    keep: bool = False
    as_json: bool = False
    postgres: bool = False
    database: str = ""
    broker: str = ""


@dataclass(frozen=True, slots=True)
class Outage:
    """How the broker is taken from the relay, and given back."""

    begin: Callable[[], None]
    end: Callable[[], None]


def tell(plan: Plan) -> int:
    """Tells the story; returns the exit code."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _tell(plan, Screen(quiet=plan.as_json))
    except Failed as error:
        click.echo(f"outboxkit demo: {error}", err=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(plan: Plan, screen: Screen) -> int:
    began = time.monotonic()
    name = f"outboxkit_demo_{secrets.token_hex(4)}"
    prefix = f"{name}-" if plan.broker else ""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(world.opened(relay__lease="2s", relay__batch_size="100"))
        place.write_names(prefix=prefix)
        if server := servers.own_postgres(place) if plan.postgres else plan.database:
            place.settings["database_url"] = stack.enter_context(servers.own_database(server, name))
        if plan.broker:
            place.settings["broker_url"] = plan.broker
            topics, readers = ([f"{prefix}{part}" for part in parts] for parts in (_TOPICS, _CONSUMERS))
            stack.enter_context(servers.emptied(plan.broker, topics, [*readers, READER]))
            stack.callback(place.end_clients)
        story = _Story(place, plan, screen, prefix)
        stack.callback(story.engine.dispose)
        with story.staged():
            verdict = story.run()
            _conclude(verdict, time.monotonic() - began, screen, as_json=plan.as_json)
            if plan.keep:
                story.go_on()
    return 1 if verdict.failures else 0


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo like Ctrl-C: by the way that leaves no process behind."""
    raise KeyboardInterrupt(number)


class _Story:
    """One telling."""

    def __init__(self, place: World, plan: Plan, screen: Screen, prefix: str) -> None:
        self.world, self.plan, self.screen = place, plan, screen
        self.half = plan.orders // 2
        self.poison = random.Random(plan.seed).randint(1, self.half)  # noqa: S311  a story, not a secret
        self.topics = [f"{prefix}{name}" for name in _TOPICS]
        self.began = time.monotonic()
        self.engine: Engine = open_engine(place.settings["database_url"], patience=timedelta(seconds=10))
        self.consumers: dict[str, Child] = {}
        self.duplicates = 0
        self.outage: Outage | None = None
        self.way = ""  # the relays' URL of the broker, where it is not everybody's
        self.shop: Child
        self.watching: Witness

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Tables, topics, and a witness, for as long as the block runs."""
        with self.engine.begin() as connection:
            migrations.upgrade(connection)
        with contextlib.ExitStack() as stack:
            if self.plan.broker:
                self._declare()
                self._take_a_detour(stack)
            else:
                cluster, url = self.world.serve("cluster", "outboxkit_relay.demo.cluster", *self.topics)
                self.world.settings["broker_url"] = url + _GROUP_OPTIONS
                self.outage = Outage(
                    lambda: cluster.send(signal.SIGSTOP),
                    lambda: cluster.send(signal.SIGCONT),
                )
            self.watching = witness(self.world.settings["broker_url"], self.topics)
            stack.callback(self.watching.close)
            yield

    def run(self) -> Verdict:
        """From the first order to the last process."""
        relay = self._start()
        with self.screen.watching(self._progress, self.plan.orders):
            relay = self._lose_a_relay(relay)
            self._lose_the_broker()
            self._repair(self._see_what_died())
            self._stop(relay)
        return audit.judge(self.engine, self.watching.read_all(self.topics), self.duplicates, self.poison)

    def go_on(self) -> None:
        """Business as usual, an order a second, until somebody has seen enough."""
        relay = self._relay("relay-3")
        for name in _CONSUMERS:
            self._consumer(name, name if name != "inventory" else "inventory_repaired")
        world.until(lambda: bool(relay.events("relay.joined")), self.world, "the relay is up")
        self._say_how_to_look()
        with contextlib.suppress(KeyboardInterrupt):
            for number in itertools.count(self.plan.orders + 1):
                self._place(number, number, 0)
                self.shop.read_line()
                self.world.watch()
                time.sleep(_CUSTOMER_SECONDS)

    # --- the chapters --------------------------------------------------------------------------------------------

    def _declare(self) -> None:
        topology = [part for name in _CONSUMERS for part in ("--topology", f"{_FLOW}:{name}")]
        done = self.world.command("init", *topology)
        if done.returncode:
            raise Failed(done.stderr.strip().removeprefix("outboxkit: "))

    def _take_a_detour(self, stack: contextlib.ExitStack) -> None:
        if detour.is_possible(self.plan.broker):
            way = detour.Detour(self.plan.broker)
            stack.callback(way.end)
            self.outage, self.way = Outage(way.close, way.open), way.url

    def _start(self) -> Child:
        arguments = str(self.plan.seed), str(self.poison)
        self.shop = self.world.run("shop", "outboxkit_relay.demo.shop", *arguments, answers=True)
        relay = self._relay("relay-1", relay__batch_size="5", failpoints=_MID_BATCH)
        for name in _CONSUMERS:
            self._consumer(name, name)
        self.shop.read_line()
        own = "a PostgreSQL of its own" if self.plan.postgres else "SQLite"
        database = "your PostgreSQL" if self.plan.database else own
        broker = "your broker" if self.plan.broker else "an in-process Kafka cluster, no Docker"
        self._say(f"a shop, four services and a relay are up: {database} and {broker}")
        return relay

    def _lose_a_relay(self, relay: Child) -> Child:
        world.until(lambda: bool(relay.events("relay.joined")), self.world, "the relay is up")
        self._place(1, self.half, _OPENING_SECONDS)
        unsettled = self._kill_in_mid_batch(relay)
        self._say(f"relay killed (SIGKILL) in mid-batch; published and not yet settled: {unsettled}")
        relay = self._relay("relay-2")
        self.shop.read_line()
        self._until_confirmed(self.half - 1, "the first half of the orders is confirmed")
        self._say(
            f"a second relay took over: {self.half - 1} of {self.half} orders are confirmed, one message cannot be read"
        )
        return relay

    def _lose_the_broker(self) -> None:
        gone = time.monotonic()
        if self.outage:
            self.outage.begin()
        self._place(self.half + 1, self.plan.orders, 0)
        self.shop.read_line()
        if self.outage:
            waiting = self._count(_UNSENT)
            self.world.watch()
            time.sleep(max(0.0, _OUTAGE_SECONDS - (time.monotonic() - gone)))
            if waiting < self.plan.orders - self.half:
                raise Failed(f"the broker was to be away, but only {waiting} messages waited")
            self.outage.end()
            away = time.monotonic() - gone
            self._say(f"the broker was away for {away:.1f} s: orders went on, {waiting} messages waited")
        else:
            self._say("the connection to your broker is encrypted: no outage is played")
        self._until_confirmed(self.plan.orders - 1, "the other orders are confirmed")

    def _see_what_died(self) -> str:
        world.until(lambda: self._count(_DEAD) == 1, self.world, "one message is dead")
        with self.engine.connect() as connection:
            letter = str(connection.execute(_LETTER).scalar_one()).replace("-", "")[:8]
        self._show("dlq", "show", letter)
        self._show("dlq", "replay", letter, "--yes", code=1)  # it is refused: nothing is repaired yet
        return letter

    def _repair(self, letter: str) -> None:
        self._retire("inventory")
        started = self._consumer("inventory-2", "inventory_repaired")
        world.until(lambda: bool(started.events("consumer.started")), self.world, "the repaired inventory is up")
        self._say("the inventory was repaired: its contract has the default now")
        self._show("dlq", "replay", letter, "--yes", "--why", "the contract has its default now")
        self._until_confirmed(self.plan.orders, "the last order is confirmed")

    def _stop(self, relay: Child) -> None:
        world.until(lambda: self._count(_UNSENT) == 0, self.world, "the outbox is empty")
        self._say("the last order is confirmed: the relay and the services stop, and everything is counted")
        for name in list(self.consumers):
            self._retire(name)
        if code := self.world.end(relay):
            raise Failed(f"the relay ended with exit code {code}: {relay.last_words()}")

    # --- their parts ---------------------------------------------------------------------------------------------

    def _kill_in_mid_batch(self, relay: Child) -> int:
        """Kills the relay that stands still between the broker and the database; returns what only one of them has."""
        world.until(relay.stands_still, self.world, "the first relay is in mid-batch")
        world.until(lambda: self._unsettled() > 0, self.world, "the broker has what the database does not know yet")
        unsettled = self._unsettled()
        self.world.kill(relay)
        return unsettled

    def _unsettled(self) -> int:
        return sum(map(self.watching.count, self.topics)) - self._count(_SETTLED)

    def _place(self, first: int, last: int, seconds: int) -> None:
        """The shop places these orders within that time, and says so."""
        self.shop.say(f"{first} {last} {seconds}")

    def _relay(self, name: str, **settings: str) -> Child:
        if self.way:
            settings["broker_url"] = self.way
        return self.world.run(name, _CHILD, "relay", "run", settings=settings)

    def _consumer(self, name: str, which: str) -> Child:
        child = self.consumers[name] = self.world.run(name, _CHILD, "consume", f"{_FLOW}:{which}")
        return child

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

    def _progress(self) -> Mapping[str, int]:
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return dict(connection.execute(_PROGRESS).mappings().one())

    # --- what is said --------------------------------------------------------------------------------------------

    def _show(self, *arguments: str, code: int = 0) -> None:
        """Runs a command for the reader to see.

        Raises:
            Failed: it ends with another exit code than it should.
        """
        done = self.world.command(*arguments, columns=self.screen.columns)
        quoted = " ".join(f'"{part}"' if " " in part else part for part in arguments)
        self.screen.show(f"outboxkit {quoted}", f"{done.stdout}{done.stderr}")
        if done.returncode != code:
            raise Failed(f"outboxkit {quoted} ended with exit code {done.returncode}: {done.stderr.strip()}")

    def _say(self, line: str) -> None:
        self.screen.say(time.monotonic() - self.began, line)

    def _say_how_to_look(self) -> None:
        lines = [
            "",
            "the world goes on, with an order a second. Look at it from another terminal:",
            f"  . {self.world.write_settings()}",
            "  outboxkit status",
            "  outboxkit dlq list --state all",
            f"  tail -f {self.world.folder}/*.log",
            "Ctrl-C here ends it, and removes everything that it made.",
        ]
        click.echo("\n".join(lines), err=self.plan.as_json)


def _conclude(verdict: Verdict, seconds: float, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(verdict) | {"seconds": round(seconds, 1), "ok": not verdict.failures}))
        return
    counted = ("placed", "published", "redelivered", "duplicates_caught", "handled", "replayed")
    screen.say_facts({name.replace("_", " "): getattr(verdict, name) for name in counted})
    for failure in verdict.failures:
        screen.say_verdict("FAILED", failure, good=False)
    if not verdict.failures:
        screen.say_verdict("✓", f"nothing lost, nothing doubled, order kept per key, books balance ({seconds:.0f} s)")
