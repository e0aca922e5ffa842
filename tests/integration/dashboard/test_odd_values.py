"""A value that PostgreSQL refuses is told as that: the database is not away, and the page has no fault."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from outboxkit import tables
from tests.conftest import PROFILE
from tests.unit.relay.dashboard.odd_values import outages
from tests.unit.relay.dashboard.world import Browser, furnish, rows


@pytest.fixture
def furnished(engine: Engine) -> Engine:
    with engine.begin() as connection:
        furnish(connection)
    return engine


def test_no_value_of_an_address_a_field_or_a_header_is_an_outage(furnished: Engine) -> None:
    assert outages(furnished, every=1 if PROFILE == "full" else 23) == []


@pytest.mark.parametrize(
    "path",
    ["/messages/%00", "/failures/%00", "/replay?group=%00", "/sagas/show?saga=%00&key=%00", "/messages?q=key:a%00"],
)
def test_an_address_with_a_nul_is_refused(furnished: Engine, path: str) -> None:
    answer = Browser(furnished).client.get(path)

    assert answer.status_code == 400
    assert "NUL" in answer.text


@pytest.mark.parametrize(
    "wrong", [{"position": str(10**30)}, {"position": str(-(10**30))}, {"topic": "orders\0"}, {"why": "\0"}]
)
def test_a_field_that_can_hold_no_such_value_is_refused(furnished: Engine, wrong: dict[str, str]) -> None:
    browser = Browser(furnished)
    form = {**browser.fields("/quarantine", "release"), "why": "x", **wrong}

    answer = browser.send("skip", **form)

    assert answer.status_code == 400
    assert "That was not done" in answer.text
    assert [row["request"] for row in rows(furnished, tables.outbox_stopped_keys)] == [None]
