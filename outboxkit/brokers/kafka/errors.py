"""Meaning of the client's errors to a consumer: one table, by code, never by text. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from confluent_kafka import KafkaError

from outboxkit.errors import ConfigurationError, OutboxKitError, PermanentBrokerError, TransientBrokerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["MOVED", "Meaning", "error_of", "login_trouble", "meaning_of"]


class Meaning(Enum):
    """Reaction to an error."""

    LOGIN = "the login or TLS is refused"
    REFUSED = "reading is not allowed"
    MISSING = "the topic is not there"
    GONE = "the position is not there any more"
    AWAY = "no broker answers"
    FINAL = "this member can never go on"
    MOVED = "the membership moved on: the client joins again"
    PASSING = "the client tries again by itself"
    UNKNOWN = "it is in no table"


_INCONSISTENT_TOPIC_ID: Final = 103  # the oldest client that we support has no name for it

_BY_MEANING: Final[Mapping[Meaning, Iterable[int]]] = {
    Meaning.LOGIN: (
        KafkaError._AUTHENTICATION,
        KafkaError._SSL,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.ILLEGAL_SASL_STATE,
        KafkaError.SECURITY_DISABLED,
        KafkaError.DELEGATION_TOKEN_EXPIRED,
        KafkaError.DELEGATION_TOKEN_NOT_FOUND,
        KafkaError.DELEGATION_TOKEN_AUTHORIZATION_FAILED,
        KafkaError.PRINCIPAL_DESERIALIZATION_FAILURE,
    ),
    Meaning.REFUSED: (
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    ),
    Meaning.MISSING: (
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_ID,
        _INCONSISTENT_TOPIC_ID,
    ),
    # auto.offset.reset=error: going on would skip messages in silence.
    Meaning.GONE: (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION),
    Meaning.AWAY: (KafkaError._ALL_BROKERS_DOWN, KafkaError._UNKNOWN_BROKER, KafkaError.REBOOTSTRAP_REQUIRED),
    Meaning.FINAL: (
        KafkaError._FATAL,
        KafkaError._FENCED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.UNRELEASED_INSTANCE_ID,
        KafkaError.GROUP_MAX_SIZE_REACHED,
        KafkaError.INCONSISTENT_GROUP_PROTOCOL,
        KafkaError.INVALID_GROUP_ID,
        KafkaError.INVALID_SESSION_TIMEOUT,
        KafkaError.UNSUPPORTED_ASSIGNOR,
        KafkaError.UNSUPPORTED_VERSION,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError._UNSUPPORTED_FEATURE,
        KafkaError._CRIT_SYS_RESOURCE,
    ),
    # What was settled here is handed out again elsewhere, and the inbox knows it.
    Meaning.MOVED: (
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.MEMBER_ID_REQUIRED,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError._ASSIGNMENT_LOST,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError._NO_OFFSET,
        KafkaError._STATE,
    ),
    Meaning.PASSING: (
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._WAIT_COORD,
        KafkaError._WAIT_CACHE,
        KafkaError._IN_PROGRESS,
        KafkaError._PREV_IN_PROGRESS,
        KafkaError._RETRY,
        KafkaError._OUTDATED,
        KafkaError._PARTITION_EOF,
        KafkaError._NODE_UPDATE,
        KafkaError._DESTROY,
        KafkaError._DESTROY_BROKER,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.FETCH_SESSION_ID_NOT_FOUND,
        KafkaError.INVALID_FETCH_SESSION_EPOCH,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
    ),
}
_MEANINGS: Final = {code: meaning for meaning, codes in _BY_MEANING.items() for code in codes}
MOVED: Final = frozenset(_BY_MEANING[Meaning.MOVED])


def meaning_of(error: KafkaError) -> Meaning:
    """Returns what to do about an error; what the client calls fatal is final, whatever its code."""
    return Meaning.FINAL if error.fatal() else _MEANINGS.get(error.code(), Meaning.UNKNOWN)


def error_of(error: KafkaError, address: str, consumer: str) -> OutboxKitError | None:
    """Returns what `outboxkit.brokers.Subscriber.receive` raises for an error of the client; None when nothing."""
    text = f"{error.str()} ({error.name()})"
    match meaning_of(error):
        case Meaning.LOGIN:
            return ConfigurationError(login_trouble(error, address))
        case Meaning.REFUSED:
            return ConfigurationError(f"consumer {consumer} may not read from Kafka at {address}: {text}")
        case Meaning.MISSING:
            # It was there when we joined: a broker that starts again may not know it yet, a deleted one may come back.
            return TransientBrokerError(f"{text}; is the topic gone? create it: outboxkit init --topology")
        case Meaning.GONE:
            return ConfigurationError(
                f"the position of consumer {consumer} is gone from the topic: {text}; "
                "messages were removed before they were read",
            )
        case Meaning.AWAY:
            return TransientBrokerError(f"Kafka at {address} is away")
        case Meaning.FINAL:
            return PermanentBrokerError(f"consumer {consumer} cannot go on as a member of its group: {text}")
        case _:
            return None


def login_trouble(error: KafkaError, address: str) -> str:
    """Returns a text when the error says that the cluster refused us, else an empty one. Never holds a secret."""
    if _MEANINGS.get(error.code()) is not Meaning.LOGIN:
        return ""
    if error.code() == KafkaError._SSL:
        return (
            f"TLS with Kafka at {address} failed: give the file of the authority of its certificate (ssl.ca.location), "
            "check that host and port are the ones for TLS, and the client's own certificate where it asks for one"
        )
    return f"the login was refused by Kafka at {address}: check the credentials, sasl.mechanism and security.protocol"
