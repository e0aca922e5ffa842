"""A delivery whose envelope the adapter could not read is a fault of that message."""

from __future__ import annotations

import pytest

from outboxkit.brokers import Delivery
from outboxkit.consumer.reading import message_of
from outboxkit.errors import DecodeError


def test_an_envelope_that_cannot_be_read_says_why() -> None:
    delivery = Delivery(topic="t", key=None, headers=(), payload=b"x", origin="t[0]@1", fault="no header can be read")

    with pytest.raises(DecodeError, match="no header can be read"):
        message_of(delivery)
