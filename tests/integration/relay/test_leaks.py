"""Nothing leaks: payloads, keys and passwords are searched in all that a relay says, at every level, in every form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, insert, make_url

from outboxkit import tables
from outboxkit_relay import settings
from tests.integration.relay.world import count, message, write

CANARIES = ("CANARY-PAYLOAD", "CANARY-KEY", "CANARY-PASSWORD", "CANARY-HEADER")


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_no_level_and_no_form_of_the_log_shows_what_passes_through(
    engine: Engine, tmp_path: Path, level: str, form: str
) -> None:
    write(engine, message(1, key="CANARY-KEY", payload=b"CANARY-PAYLOAD"))
    with engine.begin() as connection:
        damaged = {"shard": 0, "message_id": uuid4(), "topic": "orders", "key": b"CANARY-KEY 2", "type": "t"}
        told = {
            "kind": "event",
            "content_type": "x",
            "payload": b"CANARY-PAYLOAD",
            "headers": b"\3CANARY-HEADER\0\0a\0b",
        }
        now = tables.outbox_messages.c.recorded_at.server_default.arg  # type: ignore[union-attr]
        connection.execute(insert(tables.outbox_messages).values(**damaged, **told, occurred_at=now))
    url = make_url(engine.url)
    if engine.dialect.name == "postgresql":
        url = url.set(password="CANARY-PASSWORD")
    names = {
        "database_url": url.render_as_string(hide_password=False),
        "broker_url": f"memory://{uuid4().hex}",
        "log__level": level,
        "log__format": form,
        "relay__retry_base": "10ms",
    }
    command = [sys.executable, "-X", "dev", "-m", "outboxkit_relay", "relay", "run", "--once"]

    done = subprocess.run(
        command, env=settings.environment(**names), capture_output=True, text=True, cwd=tmp_path, check=False
    )

    assert done.returncode == 0, done.stderr
    assert count(engine, tables.outbox_messages) == 0
    assert count(engine, tables.dead_letters) == 1
    assert not [canary for canary in CANARIES if canary in done.stdout + done.stderr]
