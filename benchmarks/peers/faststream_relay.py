"""faststream-outbox as a relay to Kafka, for `benchmarks.relay`: in an environment of its own, as its README shows it.

    python benchmarks/peers/faststream_relay.py DATABASE BROKER MESSAGES

It fills a table of its own, drains it with 64 workers, and prints seconds of wall clock and of CPU as JSON. A
message has a key, the payload and the 13 headers of the other contenders, beside those that FastStream adds.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any

from faststream import FastStream
from faststream.confluent import KafkaBroker, KafkaResponse
from faststream_outbox import OutboxBroker, make_outbox_table
from faststream_outbox.annotations import OutboxMessage
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine

WORKERS, BATCH = 64, 1_000
TABLE = make_outbox_table(MetaData(), table_name="peer_outbox")
HEADERS = {
    "ce_specversion": "1.0",
    "ce_id": "0198c5d2-7f00-7000-8000-000000000001",
    "ce_type": "order.placed",
    "ce_source": "bench",
    "ce_time": "2026-11-24T08:30:00.000000Z",
    "ce_partitionkey": "key-1",
    "tenant": "a",
    "region": "eu",
    "trace": "0af7651916cd43dd",
    "user": "42",
    "ce_sequence": "00000000000000000001",
    "ce_recordedtime": "2026-11-24T08:30:00.000000Z",
}
FILL = text(
    """
    INSERT INTO peer_outbox (queue, payload, headers)
    SELECT 'bench', :payload, CAST(:headers AS jsonb) || jsonb_build_object('key', 'key-' || mod(n, 10000))
    FROM generate_series(1, :count) AS n
    """,
)
PAYLOAD = b'{"filler": "' + b"x" * 286 + b'"}'


async def drain(database: str, address: str, count: int) -> tuple[float, float]:
    engine = create_async_engine(database.replace("+psycopg", "+asyncpg"), pool_size=WORKERS + 2)
    async with engine.begin() as connection:
        await connection.run_sync(TABLE.metadata.drop_all)
        await connection.run_sync(TABLE.metadata.create_all)
        headers = {**HEADERS, "content-type": "application/json"}
        await connection.execute(FILL, {"payload": PAYLOAD, "headers": json.dumps(headers), "count": count})
    outbox, kafka = OutboxBroker(engine, outbox_table=TABLE, logger=None), KafkaBroker(address, logger=None)
    published, done = 0, asyncio.Event()

    @kafka.publisher("bench")
    @outbox.subscriber("bench", max_workers=WORKERS, fetch_batch_size=BATCH, min_fetch_interval=0.01)
    async def relay(body: Any, message: OutboxMessage) -> KafkaResponse:
        nonlocal published
        published += 1
        if published == count:
            done.set()
        headers = {name: str(message.headers[name]) for name in HEADERS}
        return KafkaResponse(body, key=str(message.headers["key"]).encode(), headers=headers)

    app = FastStream(outbox, on_startup=[kafka.connect], logger=None)
    began, cpu = time.perf_counter(), _cpu()
    running = asyncio.create_task(app.run())
    await done.wait()
    async with engine.connect() as connection:
        while await connection.scalar(text("SELECT count(*) FROM peer_outbox")):  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0.05)
    found = time.perf_counter() - began, _cpu() - cpu
    app.exit()
    await running
    await kafka.stop()
    await engine.dispose()
    return found


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    _database, _broker, _count = sys.argv[1:]
    seconds, cpu_seconds = asyncio.run(drain(_database, _broker.removeprefix("kafka://"), int(_count)))
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds}))
