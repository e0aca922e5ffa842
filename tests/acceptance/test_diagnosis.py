"""An order is followed from its emit to its invoice, and the set-up that it took is found to be right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outboxkit import migrations
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, declare, forget
from tests.conftest import PROFILE


@pytest.fixture(params=["kafka", "rabbitmq"] if PROFILE == "full" else ["rabbitmq"])
def broker(request: pytest.FixtureRequest) -> servers.Server:
    found: servers.Server = request.getfixturevalue(request.param)
    return found


def _lines(world: AcceptanceEnvironment, code: int, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "outboxkit_relay", *arguments, "--json"]
    done = subprocess.run(command, env=world.environment, cwd=world.folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.usefixtures("durable")
def test_an_order_is_followed_and_its_set_up_is_right(
    database_url: str, broker: servers.Server, tmp_path: Path
) -> None:
    forget(broker)
    world = AcceptanceEnvironment(database_url, broker.url, tmp_path)
    try:
        world.create_tables()
        with world.engine.begin() as connection:
            migrations.upgrade(connection)
        writer = world.writer(5, 1)
        writer.start(5)
        writer.join()
        broken = _lines(world, 3, "doctor", "tests.acceptance.shop:billing")
        pending = _lines(world, 0, "trace", "c0")
        declare(broker.url)
        world.run("relay", "run", "--once")
        consumer = world.start("consume", "tests.acceptance.shop:billing")
        world.until(lambda: world.scalar("SELECT count(*) FROM invoices") == 5, "all billed")
        world.stop(consumer)

        healthy = _lines(world, 0, "doctor", "tests.acceptance.shop:billing")
        followed = _lines(world, 0, "trace", pending[0]["message"])
        (audited,) = _lines(world, 0, "audit")
    finally:
        world.close()

    assert {"topic-missing", "relay-absent"} <= {one["check"] for one in broken}
    assert all(one["fix"] for one in broken)
    assert len({step["message"] for step in pending}) == 5
    assert healthy == []
    assert [step["what"] for step in followed] == ["published", "handled"]
    assert "billing" in followed[1]["text"]
    assert audited["emitted"] == audited["accounts"]["published"] == 5
