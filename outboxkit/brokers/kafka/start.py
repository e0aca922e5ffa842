"""Start: where a group begins in partitions that it has never read. It is committed at once, so that it stays there."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final

from confluent_kafka import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import Consumer

    from outboxkit.brokers import Start

__all__ = ["begin"]

_ANSWER_SECONDS: Final = 5.0


def begin(consumer: Consumer, partitions: Sequence[TopicPartition], start: Start) -> None:
    """Commits where a new group begins; what it has committed before stays.

    Left to the client (``auto.offset.reset``), a group that ends before its first commit begins somewhere else the next
    time, and what was published in between is lost to it.

    Raises:
        KafkaException: the cluster did not answer.
    """
    if start == "earliest" or not partitions:
        return
    known = consumer.committed(list(partitions), timeout=_ANSWER_SECONDS)
    new = [TopicPartition(one.topic, one.partition) for one in known if one.offset < 0]
    if isinstance(start, datetime):
        asked = [TopicPartition(one.topic, one.partition, int(start.timestamp() * 1000)) for one in new]
        new = consumer.offsets_for_times(asked, timeout=_ANSWER_SECONDS) if asked else []
    offsets = [TopicPartition(one.topic, one.partition, _offset(consumer, one)) for one in new]
    if offsets:
        consumer.commit(offsets=offsets, asynchronous=False)


def _offset(consumer: Consumer, partition: TopicPartition) -> int:
    """The offset that was found; the end of the log where there is none, or none was asked for."""
    if partition.offset >= 0:
        return partition.offset
    bounds = consumer.get_watermark_offsets(partition, timeout=_ANSWER_SECONDS)
    return int(bounds[1])
