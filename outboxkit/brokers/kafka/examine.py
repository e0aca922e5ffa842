"""Examines a Kafka cluster: whether its topics keep what the relay hands over, and consumers read all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec

from outboxkit.brokers.kafka.login import connection_settings
from outboxkit.brokers.kafka.topics import LookupFailed, Topics, open_client, unknown
from outboxkit.findings import Finding, note, problem, warning

if TYPE_CHECKING:
    from outboxkit.brokers import Expected
    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["TopicFacts", "evaluate", "examine"]

_SECONDS: Final = 5.0
_ROOM: Final = 64 * 1024  # bytes that headers, key and framing may add to a payload
_CONFIG: Final = (
    "kafka-configs --bootstrap-server … --alter --entity-type topics --entity-name {name} --add-config {to}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicFacts:
    """Facts about one topic, as the cluster tells them.

    Attributes:
        name: of the topic.
        replicas: of each partition, how many there are.
        in_sync: of each partition, how many of them are in sync.
        config: the topic's settings in force; empty when they may not be read.
    """

    name: str
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]
    config: Mapping[str, str]


def examine(settings: Settings, expected: Expected) -> Iterator[Finding]:
    """Yields what is wrong with the cluster for these topics and consumers. Blocks for some seconds at most."""
    topics = Topics(settings)
    try:
        missing = topics.look_up(expected.topics, _SECONDS)
    except LookupFailed as error:
        yield problem("broker", str(error), "start the broker, or correct broker_url and its login")
        return
    finally:
        topics.close()
    for name in sorted(missing):
        yield problem("topic-missing", unknown(name), f"outboxkit init --topic {name}")
    admin = open_client(AdminClient, connection_settings(settings))
    cluster = admin.list_topics(timeout=_SECONDS)
    if len(cluster.brokers) == 1:
        yield note("single-broker", "the cluster has one broker: what it loses is lost", "run three in production")
    for facts in _facts(admin, cluster, sorted(set(expected.topics) - missing)):
        yield from evaluate(facts, expected, brokers=len(cluster.brokers))
    for consumer in expected.consumers:
        yield from _unread(admin, consumer)
    if settings.subscriber.get("auto.offset.reset") in {"latest", "end", "largest"}:
        seen = "auto.offset.reset is latest: a consumer that starts for the first time skips what is in the topic"
        yield warning("start-position", seen, "remove auto.offset.reset from [broker], or set it to earliest")


def evaluate(facts: TopicFacts, expected: Expected, *, brokers: int) -> Iterator[Finding]:
    """Yields what is wrong with a topic. Pure."""
    yield from _durability(facts, brokers)
    yield from _partitions(facts, expected)
    yield from _limits(facts, expected)


def _durability(facts: TopicFacts, brokers: int) -> Iterator[Finding]:
    replicas, needed = min(facts.replicas, default=0), int(facts.config.get("min.insync.replicas", 1))
    if needed > replicas:
        seen = f"{facts.name} has {replicas} replicas and min.insync.replicas {needed}: it takes no message"
        yield problem("min-insync-replicas", seen, _to(facts, f"min.insync.replicas={max(1, replicas - 1)}"))
    elif any(count < needed for count in facts.in_sync):
        seen = f"{facts.name} has a partition with {min(facts.in_sync)} replicas in sync, and needs {needed}"
        yield problem("under-replicated", seen, "bring the brokers back that hold its replicas")
    elif replicas > 1 and needed == 1:
        seen = f"{facts.name} acknowledges with one replica in sync: that broker's loss loses messages"
        yield warning("min-insync-replicas", seen, _to(facts, "min.insync.replicas=2"))
    if replicas == 1 and brokers > 1:
        seen = f"{facts.name} has one replica on a cluster of {brokers} brokers"
        yield warning("replication-factor", seen, "raise it to 3 with kafka-reassign-partitions")
    if facts.config.get("unclean.leader.election.enable") == "true":
        seen = f"{facts.name} may elect a leader that lacks acknowledged messages"
        yield warning("unclean-leader-election", seen, _to(facts, "unclean.leader.election.enable=false"))


def _partitions(facts: TopicFacts, expected: Expected) -> Iterator[Finding]:
    count, wanted = len(facts.replicas), expected.partitions.get(facts.name)
    used = expected.used_partitions.get(facts.name, 0)
    if wanted is not None and wanted != count:
        seen = f"{facts.name} has {count} partitions, the settings say {wanted}: keys have moved between partitions"
        yield problem("partitions-changed", seen, "follow docs/how-to/change-key.md, then correct the setting")
    elif used > count:
        seen = f"{facts.name} has {count} partitions, messages were published to {used}: it was made anew, smaller"
        yield problem("partitions-changed", seen, "look whether its consumers had read the old topic to its end")


def _limits(facts: TopicFacts, expected: Expected) -> Iterator[Finding]:
    limit = int(facts.config.get("max.message.bytes", expected.payload_bytes + _ROOM))
    if limit < expected.payload_bytes:
        seen = f"{facts.name} takes {limit:,} bytes a message, applications may emit {expected.payload_bytes:,}"
        yield warning("message-size", seen, _to(facts, f"max.message.bytes={expected.payload_bytes + _ROOM}"))
    policy = facts.config.get("cleanup.policy", "delete")
    if "compact" in policy and facts.name not in expected.compacted:
        seen = f"{facts.name} is compacted: of each key only the latest message stays for who reads late"
        yield warning("compacted-topic", seen, _to(facts, "cleanup.policy=delete"))
    kept = int(facts.config.get("retention.ms", 0))
    remembered = expected.remembered
    if "delete" in policy and not 0 <= kept <= remembered.total_seconds() * 1000:
        age = "for ever" if kept < 0 else f"{timedelta(milliseconds=kept).days} days"
        seen = f"{facts.name} keeps messages {age}, inboxes remember {remembered.days} days: after a rewind to the "
        yield warning(
            "retention-broker",
            f"{seen}beginning what they have forgotten takes effect twice",
            f"raise retention.inbox, or {_to(facts, f'retention.ms={int(remembered.total_seconds() * 1000)}')}",
        )


def _to(facts: TopicFacts, setting: str) -> str:
    return _CONFIG.format(name=facts.name, to=setting)


# --- asking ------------------------------------------------------------------------------------------------------


def _facts(admin: AdminClient, cluster: object, names: list[str]) -> Iterator[TopicFacts]:
    configs = _configs(admin, names)
    for name in names:
        partitions = cluster.topics[name].partitions.values()  # type: ignore[attr-defined]  # it ships no types
        yield TopicFacts(
            name=name,
            replicas=tuple(len(one.replicas) for one in partitions),
            in_sync=tuple(len(one.isrs) for one in partitions),
            config=configs.get(name, {}),
        )


def _configs(admin: AdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    """The settings of each topic; of those that may not be described none."""
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    asked = admin.describe_configs(resources, request_timeout=_SECONDS) if resources else {}
    found: dict[str, dict[str, str]] = {}
    for resource, future in asked.items():
        try:
            found[resource.name] = {name: entry.value for name, entry in future.result(_SECONDS).items()}
        except (KafkaException, FutureTimeoutError):
            continue
    return found


def _unread(admin: AdminClient, consumer: str) -> Iterator[Finding]:
    """Compares how far a consumer has read with where the log begins now."""
    try:
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(consumer)], request_timeout=_SECONDS)
        places = [one for one in asked[consumer].result(_SECONDS).topic_partitions if one.offset >= 0]
        wanted = {TopicPartition(one.topic, one.partition): OffsetSpec.earliest() for one in places}  # type: ignore[no-untyped-call]
        first = admin.list_offsets(wanted, request_timeout=_SECONDS) if wanted else {}
        begins = {(at.topic, at.partition): found.result(_SECONDS).offset for at, found in first.items()}
    except (KafkaException, FutureTimeoutError):
        return  # it has no group yet, or its offsets may not be seen
    for one in places:
        begin = begins.get((one.topic, one.partition), 0)
        if begin > one.offset:
            yield problem(
                "deleted-unread",
                f"{consumer} has read {one.topic}[{one.partition}] up to {one.offset:,}, and the log begins at "
                f"{begin:,}: {begin - one.offset:,} messages were deleted unread",
                "emit them again from the ledger's time, raise the topic's retention, and run more of the consumer",
            )
