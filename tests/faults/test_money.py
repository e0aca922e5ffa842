"""Two services move money through outbox, broker and inbox, while all that runs is killed at random: none is lost."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

from outboxkit import migrations
from outboxkit.brokers import Subscription, open_subscriber
from tests import servers
from tests.acceptance import bank
from tests.acceptance.world import QUICK_GROUP, AcceptanceEnvironment
from tests.faults.traffic import LEFT, is_kafka
from tests.servers.postgres import create_database, drop_database

SECONDS = float(os.environ.get("OUTBOXKIT_TEST_SECONDS", "120"))
SEED = int(os.environ.get("OUTBOXKIT_TEST_SEED", "4711"))
SIDES = ("north", "south")
DRAIN = 180.0
BOOKS = "SELECT (SELECT sum(balance) FROM accounts) - (SELECT coalesce(sum(amount), 0) FROM bookings)"
SENT = "SELECT count(*) FROM bookings WHERE amount < 0"
CAME = "SELECT count(*) FROM bookings WHERE amount > 0"


class Branch:
    """One bank: its database, and the processes that are killed and started again."""

    def __init__(self, side: str, run: str, world: AcceptanceEnvironment) -> None:
        self.side, self.run, self.world, self.kills = side, run, world, 0
        world.environment |= {"BANK_SIDE": side, "BANK_RUN": run}
        with world.engine.begin() as connection:
            bank.Base.metadata.create_all(connection)
            migrations.upgrade(connection)
            values = [{"number": number, "balance": bank.BALANCE} for number in range(bank.ACCOUNTS)]
            connection.execute(bank.Account.__table__.insert(), values)  # type: ignore[attr-defined]
        self._commands = {"relay": ("relay", "run"), "consumer": ("consume", "tests.acceptance.bank:branch")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in self._commands:
            self.start(name)

    def start(self, name: str) -> None:
        self._processes[name] = self.world.start(*self._commands[name])

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()
        self.kills += 1

    def stop(self) -> None:
        for process in self._processes.values():
            self.world.stop(process)

    def balances(self) -> int:
        return self.world.scalar("SELECT sum(balance) FROM accounts")

    def pay(self, stop: threading.Event) -> None:
        """Sends money until it is told to stop."""
        rng = random.Random(self.side)
        while not stop.wait(0.01):
            sent = bank.MoneySent(rng.randrange(bank.ACCOUNTS), rng.randrange(1, 100), rng.randrange(3))
            with Session(self.world.engine) as session, session.begin():
                bank.send(session, self.side, sent, self.run)


@pytest.fixture(params=["kafka", "rabbitmq"])
def branches(request: pytest.FixtureRequest, postgres: servers.Server, tmp_path: Path) -> Iterator[list[Branch]]:
    broker, run = request.getfixturevalue(request.param), uuid4().hex[:8]
    broker.heal()
    postgres.heal()
    for side in SIDES:
        asyncio.run(_declare(broker.url, side, run))
    url = broker.url + QUICK_GROUP if is_kafka(broker) else broker.url
    with ExitStack() as stack:
        made = []
        for side in SIDES:
            database = create_database(postgres.url)
            stack.callback(drop_database, database)
            (tmp_path / side).mkdir()
            world = AcceptanceEnvironment(database, url, tmp_path / side)
            stack.callback(world.close)
            made.append(Branch(side, run, world))
        yield made


async def _declare(url: str, side: str, run: str) -> None:
    wanted = Subscription(consumer=bank.consumer_of(side, run), topics=(bank.topic_of(bank.OTHER[side], run),))
    subscriber = open_subscriber(url, wanted, {})
    await subscriber.declare(wanted)
    await subscriber.close()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_money_is_neither_made_nor_lost_though_relays_and_consumers_are_killed_at_random(
    branches: list[Branch], scores: list[str]
) -> None:
    stop, rng = threading.Event(), random.Random(SEED)
    payers = [threading.Thread(target=branch.pay, args=(stop,)) for branch in branches]
    for payer in payers:
        payer.start()
    end, checks, pause = time.monotonic() + SECONDS, 0, threading.Event()
    try:
        while time.monotonic() < end:
            pause.wait(rng.uniform(1.0, 6.0))
            victim, name = rng.choice(branches), rng.choice(["relay", "consumer"])
            victim.kill(name)
            for branch in branches:  # in one snapshot, in the midst of it all
                assert branch.world.scalar(BOOKS) == bank.ACCOUNTS * bank.BALANCE
                checks += 1
            pause.wait(rng.uniform(0.0, 2.0))
            victim.start(name)
    finally:
        stop.set()
        for payer in payers:
            payer.join()
    _drain(branches)

    north, south = branches
    sent, came = (sum(branch.world.scalar(what) for branch in branches) for what in (SENT, CAME))
    assert north.balances() + south.balances() == 2 * bank.ACCOUNTS * bank.BALANCE
    assert sent == came > 1_000
    assert all(branch.world.scalar("SELECT count(*) FROM dead_letters") == 0 for branch in branches)
    kills = north.kills + south.kills
    assert kills >= SECONDS / 10, "void: nothing was killed"
    scores.append(f"money: {sent:,} transfers, {kills} kills, {checks} checks on the way; 0 lost, 0 made")


def _drain(branches: list[Branch]) -> None:
    """Until all that was sent has come, and what came has been answered."""
    for branch in branches:
        branch.world.until(lambda: _is_calm(branches), f"{branch.side} is calm", DRAIN)
    for branch in branches:
        branch.stop()


def _is_calm(branches: list[Branch]) -> bool:
    if any(branch.world.scalar(LEFT) for branch in branches):
        return False
    sent = [branch.world.scalar(SENT) for branch in branches]
    came = [branch.world.scalar(CAME) for branch in reversed(branches)]
    return sent == came
