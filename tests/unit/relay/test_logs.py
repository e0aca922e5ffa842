"""What reaches the log: one parsable line an event, no secret, nothing that commands a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from typing import Any

import pytest

from outboxkit_relay import logs, redaction

HOSTILE = '\x1b[2J\x07\x9b31m\u202eevil\u2028\n{"level": "forged"}\r\x00'


def _lines(form: str, *secrets: str) -> tuple[io.StringIO, logging.Logger]:
    stream = io.StringIO()
    logs.configure("info", form, secrets=secrets, stream=stream)
    return stream, logging.getLogger("test")


def _event(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_line_of_json_holds_the_event_its_level_and_its_fields() -> None:
    stream, log = _lines("json")

    log.warning("destination.paused", extra={"topic": "orders", "attempts": 3})

    event = _event(stream)
    assert (event["event"], event["level"], event["topic"], event["attempts"]) == (
        "destination.paused",
        "warning",
        "orders",
        3,
    )


@pytest.mark.parametrize("form", ["json", "text"])
def test_hostile_text_makes_one_line_without_control_characters(form: str) -> None:
    stream, log = _lines(form)

    log.info("message.dead", extra={"error": HOSTILE, HOSTILE: "x", "nested": {"a": [HOSTILE]}})

    line = stream.getvalue()
    assert line.count("\n") == 1
    assert not [character for character in line[:-1] if not character.isprintable()]
    if form == "json":
        assert "forged" in json.loads(line)["error"]


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://app:CANARY@db/app",
        "postgresql+psycopg://app:CAN%41RY@db:5432/app?x=y",
        "amqp://app:CANARY/with@odd:signs@broker/vhost",
        "host=db password=CANARY dbname=app",
        "password='CANARY with blanks'",
        '{"sasl.password": "CANARY"}',
        "authorization: Bearer CANARY",
        "kafka://host?sasl.password=CANARY&x=1",
        "api_key=CANARY",
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str) -> None:
    masked = redaction.redacted(f"connecting to {text} failed")

    assert "CANARY" not in masked
    assert "CAN%41RY" not in masked
    assert masked.startswith("connecting to ")
    assert "***" in masked


@pytest.mark.parametrize("text", ["see postgresql://user@host/db", "orders[3]@1881", "the token was refused", "a: b@c"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redaction.redacted(text) == text


def test_a_known_secret_is_masked_wherever_it_appears() -> None:
    stream, log = _lines("json", "open sesame")

    log.error("odd", extra={"error": "the driver said: open sesame!", "password": "x"})

    assert "sesame" not in stream.getvalue()
    assert _event(stream)["password"] == "***"


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("postgresql://app:p%40ss@db/app", {"p%40ss", "p@ss"}),
        ("postgresql://app:pa/ss@word@db/app", {"pa/ss@word"}),
        ("kafka://db?sasl.password=s3cret&client.id=me", {"s3cret"}),
        ("postgresql://app@db/app", set()),
        ("nothing", set()),
    ],
)
def test_the_secrets_of_a_url_are_its_password_and_what_its_query_calls_so(url: str, secrets: set[str]) -> None:
    assert set(redaction.secrets_of(url)) == secrets


def test_a_traceback_is_kept_but_the_values_of_rows_are_not() -> None:
    stream, log = _lines("json")
    text = "duplicate key\nDETAIL:  Key (email)=(ana@example.com) already exists.\nCONTEXT:  COPY x: 4711"
    failed = ValueError(text)
    with contextlib.suppress(ValueError):
        raise failed
    log.error("odd", exc_info=failed)

    exception = _event(stream)["exception"]
    assert "duplicate key" in exception
    assert "test_logs.py" in exception
    assert "ana@example.com" not in exception
    assert "4711" not in exception


def test_a_very_long_text_is_cut() -> None:
    stream, log = _lines("json")

    log.info("odd", extra={"error": "x" * 1_000_000})

    assert len(stream.getvalue()) < 5_000


def test_text_is_for_people() -> None:
    stream, log = _lines("text")

    log.warning("broker.away", extra={"error": "no answer", "failures": 2})

    assert stream.getvalue()[9:] == 'warning broker.away error="no answer" failures=2\n'


def test_text_shows_no_syntax_of_python() -> None:
    stream, log = _lines("text")

    values: dict[str, object] = {
        "topics": ("orders", "stock"),
        "counts": {"handled": 3, "dead": 1},
        "lag": None,
        "once": True,
        "in": [],
    }
    log.info("consumer.stopped", extra=values)

    told = 'topics="orders, stock" counts="handled 3, dead 1" lag=- once=true in=""'
    assert stream.getvalue()[9:] == f"info    consumer.stopped {told}\n"


@pytest.fixture(autouse=True)
def _own_logging() -> Any:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    redaction._known.clear()
