"""The pure parts of the Kafka adapter, and the cluster inside the process."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.brokers.kafka.progress import Progress
from outboxkit.brokers.kafka.publish import failure_of
from outboxkit.policy import Failure


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, Failure.TOO_LARGE),
        (KafkaError._PURGE_QUEUE, Failure.INDETERMINATE),
        (KafkaError._PURGE_INFLIGHT, Failure.INDETERMINATE),
        (KafkaError._MSG_TIMED_OUT, Failure.INDETERMINATE),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, Failure.UNAUTHORIZED),
        (KafkaError.INVALID_RECORD, Failure.INVALID),
        (KafkaError.POLICY_VIOLATION, Failure.REJECTED),
        (KafkaError._FENCED, Failure.FENCED),
    ],
)
def test_an_error_has_one_meaning(code: int, failure: Failure) -> None:
    assert failure_of(KafkaError(code)) is failure


def test_the_position_stops_at_the_first_unsettled_offset() -> None:
    progress = Progress()
    laps = {offset: progress.hand_out(offset) for offset in (10, 11, 13)}

    assert progress.settle(11, laps[11])
    assert progress.position == 10
    assert progress.settle(10, laps[10])
    assert progress.position == 13
    assert progress.settle(13, laps[13])
    assert progress.position == 14


def test_what_is_read_again_must_be_settled_again() -> None:
    progress = Progress()
    first = [progress.hand_out(offset) for offset in range(5)]
    progress.rewind(2)

    assert not progress.settle(3, first[3])
    assert progress.settle(0, first[0])
    assert progress.settle(1, first[1])
    assert progress.position == 2

    second = progress.hand_out(2)
    assert not progress.settle(2, first[2])
    assert progress.position == 2
    assert progress.settle(2, second)
    assert progress.position == 3


@given(
    st.lists(st.integers(0, 19), max_size=40), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 19)), max_size=3)
)
def test_no_position_is_past_an_unsettled_offset(settled: list[int], rewinds: list[tuple[int, int]]) -> None:
    progress = Progress()
    laps = {offset: progress.hand_out(offset) for offset in range(20)}
    open_offsets = set(range(20))

    for step, offset in enumerate(settled):
        for when, back in rewinds:
            if when == step:
                progress.rewind(back)
                laps.update({again: progress.hand_out(again) for again in range(back, 20)})
                open_offsets |= set(range(back, 20))
        progress.settle(offset, laps[offset])
        open_offsets.discard(offset)

        assert progress.position == min(open_offsets, default=20)
