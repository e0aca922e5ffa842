"""What the tests of diagnosis share: settings, and a dead letter of a consumer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection

from outboxkit import dead_letters
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, Stage
from outboxkit.headers import wire_headers
from outboxkit.policy import Failure
from outboxkit_relay.settings import Settings
from tests.consumer_fixture import order

__all__ = ["PATIENCE", "dead_letter_of_billing", "settings_of"]

PATIENCE = timedelta(seconds=20)


def settings_of(url: str, at: str = "memory://doctor", **others: Any) -> Settings:
    return Settings(database_url=SecretStr(url), broker_url=SecretStr(at), **others)


def dead_letter_of_billing(connection: Connection) -> DeadLetter:
    sent = order(1)
    delivery = Delivery(
        topic="orders", key=b"k", headers=wire_headers(sent), payload=sent.payload, origin="orders[0]@1"
    )
    letter = dead_letters.of_delivery(
        delivery,
        sent,
        consumer="billing",
        kind="event",
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=KeyError("x"),
        attempts=1,
    )
    assert dead_letters.bury(connection, letter) is not None
    return letter
