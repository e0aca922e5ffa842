"""Questions to the cluster about its topics: whether they exist, and how large a message they take."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec

from outboxkit.brokers.kafka.errors import login_trouble
from outboxkit.brokers.kafka.login import connection_settings
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["CLIENT_LOG", "LookupFailed", "Topics", "open_client", "prove", "unknown"]

CLIENT_LOG: Final = logging.getLogger("outboxkit.brokers.kafka.client")

Client = TypeVar("Client")

DEFAULT_LIMIT: Final = 1_048_588  # Kafka's default for max.message.bytes
_DESCRIBE_SECONDS: Final = 5.0
_IDS_SECONDS: Final = 1.0  # an acknowledgement may wait behind it
_EMBEDDED_PARTITIONS: Final = 4  # whatever is asked of the embedded cluster
_CREATE_SECONDS: Final = 15.0
_KNOCK_SECONDS: Final = 0.5
_LOOK_AGAIN_SECONDS: Final = 0.02
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_MOCK_CLUSTER: Final = "mockCluster"


class LookupFailed(Exception):
    """The cluster did not answer; says why."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure

    def seen_by_users(self) -> ConfigurationError | TransientBrokerError:
        """The same as what callers of a subscriber know."""
        kind = ConfigurationError if self.failure is Failure.UNAUTHORIZED else TransientBrokerError
        return kind(str(self))


def open_client(kind: Callable[..., Client], conf: Mapping[str, object]) -> Client:
    """A client of librdkafka; what it would print goes to our log.

    Raises:
        ConfigurationError: a setting has a value that librdkafka does not take.
    """
    try:
        return kind(dict(conf), logger=CLIENT_LOG)
    except KafkaException as error:
        raise ConfigurationError(f"a kafka setting is wrong: {error.args[0].str()}") from error


def prove(kind: Callable[..., object], conf: Mapping[str, object]) -> None:
    """Has librdkafka read the settings, without an address: nothing is connected.

    Raises:
        ConfigurationError: a setting has a value that librdkafka does not take.
    """
    open_client(kind, {**conf, "log_level": 0})


class Topics:
    """Looks topics up and remembers those that were found, with the size of a message that each takes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits: dict[str, int] = {}
        self._lock = threading.Lock()
        self._admin: AdminClient | None = None
        self._login = ""
        self._is_mock = False

    def limit(self, name: str) -> int | None:
        """The largest record batch that the topic takes; None when the topic was not seen."""
        return self._limits.get(name)

    @property
    def smallest_limit(self) -> int:
        """Over all topics that were seen."""
        return min(self._limits.values(), default=DEFAULT_LIMIT)

    def forget(self, name: str) -> None:
        """It may be gone: look again before the next message."""
        self._limits.pop(name, None)

    def look_up(self, names: Iterable[str], timeout_seconds: float) -> set[str]:
        """Asks the cluster; returns the names that it does not have.

        Raises:
            LookupFailed: the cluster did not answer, or refused the login.
        """
        admin = self._client()
        try:
            # The list of all topics: asking for one by name would create it where brokers create topics on demand.
            cluster = admin.list_topics(timeout=timeout_seconds)
        except KafkaException as error:
            admin.poll(0)  # brings the event that says whether it was the login
            refused, self._login = self._login, ""
            if refused:
                self.close()  # the next question comes with the credentials of that moment
                raise LookupFailed(Failure.UNAUTHORIZED, refused) from error
            raise LookupFailed(Failure.BROKER_DOWN, self._unanswered()) from error
        wanted = set(names)
        found = wanted & cluster.topics.keys()
        # The mock cluster does not answer to requests about configurations.
        self._is_mock = str(cluster.cluster_id).startswith(_MOCK_CLUSTER)
        self._limits.update(dict.fromkeys(found, DEFAULT_LIMIT) if self._is_mock else self._describe(admin, found))
        return wanted - found

    def create(self, names: Iterable[str]) -> Sequence[str]:
        """Creates topics that are missing; returns a line for each.

        Raises:
            LookupFailed: the cluster did not answer, or refused the login.
            ConfigurationError: it refuses to create one.
        """
        wanted = sorted(set(names))
        missing = self.look_up(wanted, _CREATE_SECONDS)
        for name in missing:
            self._create(name)
        self._await(missing)
        made = f"created with {_EMBEDDED_PARTITIONS if self._is_mock else self._settings.partitions} partitions"
        return [f"topic {name} {made if name in missing else 'exists'}" for name in wanted]

    def _await(self, names: set[str]) -> None:
        """Waits until the brokers tell of topics that the controller has created: some time later."""
        deadline = time.monotonic() + _CREATE_SECONDS
        while self.look_up(names, _CREATE_SECONDS):
            if time.monotonic() > deadline:
                raise LookupFailed(Failure.BROKER_DOWN, f"{', '.join(sorted(names))} created, but not to be seen")
            time.sleep(_LOOK_AGAIN_SECONDS)

    def _create(self, name: str) -> None:
        admin = self._client()
        if self._is_mock:
            admin.list_topics(name, timeout=_CREATE_SECONDS)  # it cannot be asked to create; naming a topic is enough
            return
        topic = NewTopic(name, self._settings.partitions, self._settings.replication)
        (future,) = admin.create_topics([topic], operation_timeout=_CREATE_SECONDS).values()
        try:
            future.result(_CREATE_SECONDS)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise ConfigurationError(f"cannot create the topic {name}: {error.args[0].str()}") from error
        except FutureTimeoutError as error:
            raise LookupFailed(Failure.BROKER_DOWN, f"no answer to the creation of the topic {name}") from error

    def close(self) -> None:
        """Drops the client; a later question opens a new one."""
        with self._lock:
            self._admin = None

    def _client(self) -> AdminClient:
        with self._lock:
            if self._admin is None:
                conf = {**connection_settings(self._settings), "error_cb": self._on_error}
                self._admin = open_client(AdminClient, conf)
            return self._admin

    def _unanswered(self) -> str:
        """Words for silence; one look tells a host that is away from one that speaks something else."""
        text = f"Kafka at {self._settings.address} did not answer"
        if "SSL" in self._settings.common.get("security.protocol", "") or not _accepts(self._settings.address):
            return text
        return f"{text}, though it takes connections (is it a TLS port? then use kafka+ssl://)"

    def ids(self, names: Collection[str]) -> dict[str, str]:
        """Returns the cluster's own ids of topics: a topic that is deleted and created again has another one.

        What is not told (an old broker, no permission, no answer) is left out.
        """
        if self._is_mock or not names:
            return {}
        admin = self._client()
        admin.poll(0)  # nobody else serves its events
        futures = admin.describe_topics(TopicCollection(list(names)), request_timeout=_IDS_SECONDS)
        found = {}
        for name, future in futures.items():
            with suppress(KafkaException, FutureTimeoutError):
                found[name] = str(future.result(_IDS_SECONDS).topic_id)
        return found

    def ends(self, places: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], Future[Any]]:
        """Asks for the ends of partitions, and waits for nothing: each future gives an ``offset``."""
        admin = self._client()
        admin.poll(0)  # nobody else serves its events
        asked = {TopicPartition(*place): OffsetSpec.latest() for place in places}  # type: ignore[no-untyped-call]
        futures = admin.list_offsets(asked, request_timeout=_IDS_SECONDS)
        return {(place.topic, place.partition): future for place, future in futures.items()}

    def _on_error(self, error: KafkaError) -> None:
        self._login = login_trouble(error, self._settings.address) or self._login

    def _describe(self, admin: AdminClient, names: Collection[str]) -> dict[str, int]:
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
        futures = admin.describe_configs(resources, request_timeout=_DESCRIBE_SECONDS) if resources else {}
        limits = {}
        for resource, future in futures.items():
            try:
                limits[resource.name] = int(future.result(_DESCRIBE_SECONDS)["max.message.bytes"].value)
            except (KafkaException, FutureTimeoutError, KeyError):  # not allowed to describe: assume the default
                limits[resource.name] = DEFAULT_LIMIT
        return limits


def unknown(topic: str) -> str:
    """Words for a topic that the cluster does not have: missing, or of a name that it can never have."""
    if _NAME.fullmatch(topic) and topic not in {".", ".."}:
        return f"Kafka has no topic {topic}; create it: outboxkit init --topology"
    return (
        f"topic {topic}: no broker allows this name; Kafka takes letters, digits, '.', '_' and '-', "
        "at most 249 of them: correct the destination"
    )


def _accepts(address: str) -> bool:
    """Whether any of the hosts takes a connection."""
    for place in address.split(","):
        host, _, port = place.rpartition(":")
        with suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS):
            return True
    return False
