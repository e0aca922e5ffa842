"""Correlation, causation, source and trace: what a message inherits from where it is emitted."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from outboxkit import context, correlation
from outboxkit.message import Message

TRACE = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


def came(**fields: Any) -> Message:
    return Message(**{"id": "m-1", "type": "t", "topic": "t", "payload": b"", **fields})


def test_outside_of_everything_there_is_nothing_but_a_default_source() -> None:
    assert (context.correlation_id(), context.causation_id(), context.trace_headers()) == ("", "", ())
    assert context.current_message() is None
    assert context.source() == "outboxkit"


def test_a_handled_message_gives_its_conversation_and_is_the_cause() -> None:
    with context.handling(came(correlation_id="c-1", headers=(TRACE, ("other", b"x")))):
        assert (context.correlation_id(), context.causation_id()) == ("c-1", "m-1")
        assert context.trace_headers() == (TRACE,)
    assert context.causation_id() == ""


def test_a_message_without_a_conversation_begins_one() -> None:
    with context.handling(came()):
        assert context.correlation_id() == "m-1"


def test_an_explicit_correlation_wins_inside_and_does_not_leak_into_a_handler() -> None:
    with correlation("outer"):
        assert context.correlation_id() == "outer"
        with context.handling(came(correlation_id="c-1")):
            assert context.correlation_id() == "c-1"
            with correlation("inner"):
                assert context.correlation_id() == "inner"
        assert context.correlation_id() == "outer"


def test_an_error_in_the_block_restores_what_was() -> None:
    with pytest.raises(RuntimeError), context.producing("shop"):
        raise RuntimeError
    assert context.source() == "outboxkit"


def test_another_thread_starts_empty() -> None:
    found: list[str] = []
    with correlation("mine"):
        thread = threading.Thread(target=lambda: found.append(context.correlation_id()))
        thread.start()
        thread.join()

    assert found == [""]
