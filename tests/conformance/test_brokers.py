"""Every broker of ours passes the suite that ships for others."""

from __future__ import annotations

from urllib.parse import urlsplit

import pika
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from outboxkit.brokers import memory
from outboxkit.testing.broker_conformance import BrokerConformance, BrokerHarness
from outboxkit.testing.broker_harness import await_fact
from tests import servers

# Every wait in the suite ends when nothing moves any more; this is for a machine that has eight other things to do.
pytestmark = pytest.mark.timeout(600)


async def _exists_anyway(destination: str) -> None:
    """Topics that need no receiver."""


class TestMemory(BrokerConformance):
    @pytest.fixture
    def harness(self) -> BrokerHarness:
        name = "conformance"

        def set_away(*, away: bool) -> None:
            memory.exchange(name).away = away

        return BrokerHarness(
            url=f"memory://{name}",
            lonely=_exists_anyway,
            creates_topics=True,
            kill=lambda: set_away(away=True),
            start=lambda: set_away(away=False),
        )


class TestKafka(BrokerConformance):
    @pytest.fixture
    def harness(self, kafka: servers.Server) -> BrokerHarness:
        async def lonely(destination: str) -> None:
            admin = AdminClient({"bootstrap.servers": urlsplit(kafka.url).netloc})
            for future in admin.create_topics([NewTopic(destination, 3, 1)]).values():
                future.result(10)
            await_fact(lambda: destination in admin.list_topics(timeout=10).topics)  # the brokers hear of it later

        return BrokerHarness(url=kafka.url, lonely=lonely, kill=kafka.kill, start=kafka.start)


class TestRabbitMQ(BrokerConformance):
    @pytest.fixture
    def harness(self, rabbitmq: servers.Server) -> BrokerHarness:
        async def lonely(destination: str) -> None:
            with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
                connection.channel().exchange_declare(destination, exchange_type="topic", durable=True)

        # A quorum queue that is killed within seconds of its declaration may come back without a leader.
        return BrokerHarness(
            url=rabbitmq.url,
            lonely=lonely,
            kill=rabbitmq.kill,
            start=rabbitmq.start,
            settle_seconds=5.0,
        )
