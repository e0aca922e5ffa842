"""The proxy in front of somebody's broker: which connections it can forward."""

from __future__ import annotations

import pytest

from outboxkit_relay.demo.broker_proxy import is_possible


@pytest.mark.parametrize(
    ("url", "possible"),
    [
        ("kafka://a:1,b:2", True),
        ("amqp://guest@localhost/", True),
        ("rabbitmq://localhost", True),
        ("kafka+ssl://a", False),
        ("kafka://user:word@a", False),
        ("kafka://a?security.protocol=SSL", False),
        ("amqps://a", False),
    ],
)
def test_a_connection_that_is_encrypted_cannot_take_it(url: str, *, possible: bool) -> None:
    assert is_possible(url) is possible
