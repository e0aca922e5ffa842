"""The scenario of the demo, from the first order to the audit."""

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
from outboxkit_relay.demo import audit, broker_proxy, processes, servers
from outboxkit_relay.demo.processes import Failed
from outboxkit_relay.demo.screen import Screen
from outboxkit_relay.demo.topic_reader import READER, open_reader

if TYPE_CHECKING:
    from types import FrameType

    from outboxkit_relay.demo.audit import Findings
    from outboxkit_relay.demo.processes import Child, Processes
    from outboxkit_relay.demo.topic_reader import TopicReader

__all__ = ["Plan", "run"]

_FLOW: Final = "outboxkit_relay.demo.order_flow"
_TOPICS: Final = ("orders", "stock", "payments", "shipments")
_CONSUMERS: Final = ("inventory", "payments", "shipping", "confirmation")
_OUTAGE_SECONDS: Final = 1.5
_OPENING_SECONDS: Final = 2  # orders come one by one, so that there are many batches
_MID_BATCH: Final = "settle.before_commit=stop:3"  # so that the kill never comes a moment too late
_CUSTOMER_SECONDS: Final = 1.0  # between two orders of a demo that goes on

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
    """Choices of the person; an empty URL means the demo's own server."""

    orders: int
    seed: int
    keep: bool = False
    as_json: bool = False
    postgres: bool = False
    database: str = ""
    broker: str = ""


@dataclass(frozen=True, slots=True)
class Outage:
    """Takes the broker from the relay, and gives it back."""

    begin: Callable[[], None]
    end: Callable[[], None]


def run(plan: Plan) -> int:
    """Runs the scenario; returns the exit code."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(plan, Screen(quiet=plan.as_json))
    except Failed as error:
        click.echo(f"outboxkit demo: {error}", err=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(plan: Plan, screen: Screen) -> int:
    began = time.monotonic()
    name = f"outboxkit_demo_{secrets.token_hex(4)}"
    prefix = f"{name}-" if plan.broker else ""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(processes.started(relay__lease="2s", relay__batch_size="100"))
        place.write_names(prefix=prefix)
        if server := servers.own_postgres(place) if plan.postgres else plan.database:
            place.settings["database_url"] = stack.enter_context(servers.own_database(server, name))
        if plan.broker:
            place.settings["broker_url"] = plan.broker
            topics, readers = ([f"{prefix}{part}" for part in parts] for parts in (_TOPICS, _CONSUMERS))
            stack.enter_context(servers.emptied(plan.broker, topics, [*readers, READER]))
            stack.callback(place.end_clients)
        scenario = _Scenario(place, plan, screen, prefix)
        stack.callback(scenario.engine.dispose)
        with scenario.staged():
            findings = scenario.run()
            _conclude(findings, time.monotonic() - began, screen, as_json=plan.as_json)
            if plan.keep:
                scenario.keep_on()
    return 1 if findings.failures else 0


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demo like Ctrl-C: by the way that leaves no process behind."""
    raise KeyboardInterrupt(number)


class _Scenario:
    """One run."""

    def __init__(self, place: Processes, plan: Plan, screen: Screen, prefix: str) -> None:
        self.processes, self.plan, self.screen = place, plan, screen
        self.half = plan.orders // 2
        self.poison = random.Random(plan.seed).randint(1, self.half)  # noqa: S311  a demo, not a secret
        self.topics = [f"{prefix}{name}" for name in _TOPICS]
        self.began = time.monotonic()
        self.engine: Engine = open_engine(place.settings["database_url"], patience=timedelta(seconds=10))
        self.consumers: dict[str, Child] = {}
        self.duplicates = 0
        self.outage: Outage | None = None
        self.proxied = ""  # the relays' URL of the broker, where it is not everybody's
        self.shop: Child
        self.reader: TopicReader

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Tables, topics, and a reader of the topics, for as long as the block runs."""
        with self.engine.begin() as connection:
            migrations.upgrade(connection)
        with contextlib.ExitStack() as stack:
            if self.plan.broker:
                self._declare()
                self._put_a_proxy_before_it(stack)
            else:
                cluster, url = self.processes.serve("cluster", "outboxkit_relay.demo.cluster", *self.topics)
                self.processes.settings["broker_url"] = url
                self.outage = Outage(
                    lambda: cluster.send(signal.SIGSTOP),
                    lambda: cluster.send(signal.SIGCONT),
                )
            self.reader = open_reader(self.processes.settings["broker_url"], self.topics)
            stack.callback(self.reader.close)
            yield

    def run(self) -> Findings:
        """From the first order to the last process."""
        relay = self._start()
        with self.screen.watching(self._progress, self.plan.orders):
            relay = self._lose_a_relay(relay)
            self._lose_the_broker()
            self._repair(self._see_what_died())
            self._stop(relay)
        return audit.audit(self.engine, self.reader.read_all(self.topics), self.duplicates, self.poison)

    def keep_on(self) -> None:
        """Business as usual, an order a second, until somebody has seen enough."""
        relay = self._relay("relay-3")
        for name in _CONSUMERS:
            self._consumer(name, name if name != "inventory" else "inventory_repaired")
        processes.until(lambda: bool(relay.events("relay.joined")), self.processes, "the relay is up")
        self._say_how_to_look()
        with contextlib.suppress(KeyboardInterrupt):
            for number in itertools.count(self.plan.orders + 1):
                self._place(number, number, 0)
                self.shop.read_line()
                self.processes.watch()
                time.sleep(_CUSTOMER_SECONDS)

    # --- the chapters --------------------------------------------------------------------------------------------

    def _declare(self) -> None:
        topology = [part for name in _CONSUMERS for part in ("--topology", f"{_FLOW}:{name}")]
        done = self.processes.command("init", *topology)
        if done.code:
            raise Failed(done.out.strip().rpartition("\n")[2].removeprefix("outboxkit: "))

    def _put_a_proxy_before_it(self, stack: contextlib.ExitStack) -> None:
        if broker_proxy.is_possible(self.plan.broker):
            proxy = broker_proxy.BrokerProxy(self.plan.broker)
            stack.callback(proxy.close)
            self.outage, self.proxied = Outage(proxy.cut, proxy.restore), proxy.url

    def _start(self) -> Child:
        arguments = str(self.plan.seed), str(self.poison)
        self.shop = self.processes.run("shop", "outboxkit_relay.demo.shop", *arguments, answers=True)
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
        processes.until(lambda: bool(relay.events("relay.joined")), self.processes, "the relay is up")
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
            self.processes.watch()
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
        processes.until(lambda: self._count(_DEAD) == 1, self.processes, "one message is dead")
        with self.engine.connect() as connection:
            letter = str(connection.execute(_LETTER).scalar_one()).replace("-", "")[:8]
        self._show("dlq", "show", letter)
        self._show("dlq", "replay", letter, "--yes", code=1)  # it is refused: nothing is repaired yet
        return letter

    def _repair(self, letter: str) -> None:
        self._retire("inventory")
        started = self._consumer("inventory-2", "inventory_repaired")
        processes.until(
            lambda: bool(started.events("consumer.started")), self.processes, "the repaired inventory is up"
        )
        self._say("the inventory was repaired: its contract has the default now")
        self._show("dlq", "replay", letter, "--yes", "--why", "the contract has its default now")
        self._until_confirmed(self.plan.orders, "the last order is confirmed")

    def _stop(self, relay: Child) -> None:
        processes.until(lambda: self._count(_UNSENT) == 0, self.processes, "the outbox is empty")
        self._say("the last order is confirmed: the relay and the services stop, and everything is counted")
        for name in list(self.consumers):
            self._retire(name)
        if code := self.processes.end(relay):
            raise Failed(f"the relay ended with exit code {code}: {relay.last_words()}")

    # --- their parts ---------------------------------------------------------------------------------------------

    def _kill_in_mid_batch(self, relay: Child) -> int:
        """Kills the relay that stands still between the broker and the database; returns what only one of them has."""
        processes.until(relay.stands_still, self.processes, "the first relay is in mid-batch")
        processes.until(
            lambda: self._unsettled() > 0, self.processes, "the broker has what the database does not know yet"
        )
        unsettled = self._unsettled()
        self.processes.kill(relay)
        return unsettled

    def _unsettled(self) -> int:
        return sum(map(self.reader.count, self.topics)) - self._count(_SETTLED)

    def _place(self, first: int, last: int, seconds: int) -> None:
        """The shop places these orders within that time, and says so."""
        self.shop.say(f"{first} {last} {seconds}")

    def _relay(self, name: str, **settings: str) -> Child:
        if self.proxied:
            settings["broker_url"] = self.proxied
        return self.processes.run(name, "outboxkit_relay", "relay", "run", settings=settings)

    def _consumer(self, name: str, which: str) -> Child:
        child = self.consumers[name] = self.processes.run(name, "outboxkit_relay", "consume", f"{_FLOW}:{which}")
        return child

    def _retire(self, name: str) -> None:
        """Stops a consumer and takes down how many duplicates it caught."""
        child = self.consumers.pop(name)
        if code := self.processes.end(child):
            raise Failed(f"{name} ended with exit code {code}: {child.last_words()}")
        (stopped,) = child.events("consumer.stopped")
        counts = stopped["counts"]
        self.duplicates += int(counts.get("duplicate", 0)) if isinstance(counts, dict) else 0

    def _until_confirmed(self, orders: int, what: str) -> None:
        processes.until(lambda: self._count(_CONFIRMED) >= orders, self.processes, what)

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
        done = self.processes.command(*arguments, columns=self.screen.columns)
        quoted = " ".join(f'"{part}"' if " " in part else part for part in arguments)
        self.screen.show(f"outboxkit {quoted}", done.out)
        if done.code != code:
            raise Failed(f"outboxkit {quoted} ended with exit code {done.code}: {done.out.strip()}")

    def _say(self, line: str) -> None:
        self.screen.say(time.monotonic() - self.began, line)

    def _say_how_to_look(self) -> None:
        lines = [
            "",
            "the demo goes on, with an order a second. Look at it from another terminal:",
            f"  . {self.processes.write_settings()}",
            "  outboxkit status",
            "  outboxkit dlq list --state all",
            f"  tail -f {self.processes.folder}/*.log",
            "Ctrl-C here ends it, and removes everything that it made.",
        ]
        click.echo("\n".join(lines), err=self.plan.as_json)


def _conclude(findings: Findings, seconds: float, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(findings) | {"seconds": round(seconds, 1), "ok": not findings.failures}))
        return
    counted = ("placed", "published", "redelivered", "duplicates_caught", "handled", "replayed")
    screen.say_facts({name.replace("_", " "): getattr(findings, name) for name in counted})
    for failure in findings.failures:
        screen.say_verdict("FAILED", failure, good=False)
    if not findings.failures:
        screen.say_verdict("✓", f"nothing lost, nothing doubled, order kept per key, books balance ({seconds:.0f} s)")
