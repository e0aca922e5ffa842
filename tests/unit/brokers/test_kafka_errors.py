"""Every error of the client has a meaning, or is told once with its code."""

from __future__ import annotations

import logging

import pytest
from confluent_kafka import KafkaError

from outboxkit.brokers import Subscription, kafka
from outboxkit.brokers.kafka.errors import Meaning, error_of, meaning_of
from outboxkit.brokers.kafka.subscribe import KafkaSubscriber
from outboxkit.errors import ConfigurationError, OutboxKitError, PermanentBrokerError, TransientBrokerError


def raised(code: int, *, fatal: bool = False) -> OutboxKitError | None:
    return error_of(KafkaError(code, "said by the broker", fatal=fatal), "one:9092", "billing")


@pytest.fixture
def subscriber() -> KafkaSubscriber:
    return kafka.subscriber("kafka://127.0.0.1:1", Subscription(consumer="billing", topics=("t",)), {})


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError._FATAL, PermanentBrokerError),
        (KafkaError.FENCED_INSTANCE_ID, PermanentBrokerError),
        (KafkaError.GROUP_MAX_SIZE_REACHED, PermanentBrokerError),
        (KafkaError.INCONSISTENT_GROUP_PROTOCOL, PermanentBrokerError),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, ConfigurationError),
        (KafkaError.SASL_AUTHENTICATION_FAILED, ConfigurationError),
        (KafkaError._SSL, ConfigurationError),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, TransientBrokerError),
        (KafkaError.UNKNOWN_TOPIC_ID, TransientBrokerError),
        (KafkaError._ALL_BROKERS_DOWN, TransientBrokerError),
        (KafkaError._AUTO_OFFSET_RESET, ConfigurationError),
    ],
)
def test_what_stops_a_consumer_is_raised_with_its_code(code: int, kind: type[OutboxKitError]) -> None:
    error = raised(code)

    assert type(error) is kind
    login = code in {KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL, KafkaError._ALL_BROKERS_DOWN}
    assert login or KafkaError(code).name() in str(error)


def test_what_the_client_calls_fatal_is_final_whatever_its_code() -> None:
    error = raised(KafkaError.REQUEST_TIMED_OUT, fatal=True)

    assert type(error) is PermanentBrokerError


def test_tls_that_fails_names_the_setting_for_the_authority() -> None:
    assert "ssl.ca.location" in str(raised(KafkaError._SSL))


def test_an_error_that_is_in_no_table_is_logged_once_with_its_code(
    subscriber: KafkaSubscriber, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for _ in range(3):
        subscriber._on_error(KafkaError(KafkaError.POLICY_VIOLATION, "no"))
        subscriber._on_error(KafkaError(KafkaError._TRANSPORT, "a passing one"))
    subscriber._on_error(KafkaError(KafkaError._BAD_MSG, "another"))

    told = [record for record in caplog.records if record.message == "consumer.broker_error"]
    assert [record.__dict__["code"] for record in told] == [KafkaError.POLICY_VIOLATION, KafkaError._BAD_MSG]
    assert told[0].__dict__["code_name"] == "POLICY_VIOLATION"


def test_every_code_of_the_client_has_a_meaning() -> None:
    codes = {value for name, value in vars(KafkaError).items() if isinstance(value, int) and name.upper() == name}

    assert {meaning_of(KafkaError(code)) for code in codes} == set(Meaning)
