"""Letters that died of one cause are one group, whatever their values; another cause is another group."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import IntegrityError

from outboxkit import dead_letters, tables
from outboxkit.brokers import Delivery
from outboxkit.codecs import codec_named
from outboxkit.dead_letters import DeadLetter, Filter, Stage
from outboxkit.dead_letters.cause import details_of
from outboxkit.errors import CodecError
from outboxkit.events import event_type
from outboxkit.headers import from_wire, wire_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from outboxkit.signals import DeadLetterRequested
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, order, row_of

CONTRACT = event_type(OrderPlaced)


def _decode(message: Message) -> None:
    codec_named("json").decode(message, CONTRACT, _no_schema)


def _no_schema(_name: str) -> str:
    raise AssertionError


def _not_json(number: int) -> Exception:
    return _raised(_decode, order(number, payload=b'{"number": %d' % number + b" " * number + b"]"))


def _not_text(number: int) -> Exception:
    return _raised(_decode, order(number, payload=b'"' + b"a" * number + b'\xff"'))


def _no_currency(number: int) -> Exception:
    return _raised(lambda: {"EUR": 1}[f"currency {number}"])


def _negative(number: int) -> Exception:
    def handle() -> None:
        raise ValueError(f"{-number} is not an amount")

    return _raised(handle)


def _asked(number: int) -> Exception:
    return DeadLetterRequested(f"order {number} is a test")


def _no_such_field(number: int) -> Exception:
    return CodecError("expected an integer, got text", path=f"lines[{number}].amount")


CAUSES: dict[str, tuple[Callable[[int], Exception], Failure, Stage]] = {
    "not JSON": (_not_json, Failure.POISON, Stage.DECODE),
    "not text": (_not_text, Failure.POISON, Stage.DECODE),
    "field": (_no_such_field, Failure.POISON, Stage.DECODE),
    "KeyError": (_no_currency, Failure.HANDLER, Stage.HANDLER),
    "ValueError": (_negative, Failure.HANDLER, Stage.HANDLER),
    "asked": (_asked, Failure.POISON, Stage.HANDLER),
}


def _raised(function: Callable[..., Any], *arguments: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def letter(number: int, cause: str, **others: Any) -> DeadLetter:
    make, failure, stage = CAUSES[cause]
    sent = order(number)
    delivery = Delivery(topic="orders", key=sent.key, headers=wire_headers(sent), payload=sent.payload, origin="o")
    values: dict[str, Any] = {"consumer": "billing", "kind": "event", "attempts": 1}
    return dead_letters.of_delivery(
        delivery, from_wire("orders", sent.key, delivery.headers, sent.payload), failure=failure, stage=stage,
        error=make(number), **values | others,
    )  # fmt: skip


def test_six_causes_are_six_groups(world: ConsumerFixture) -> None:
    names = [name for name in CAUSES for _ in range(20)]
    random.Random(3).shuffle(names)
    by_cause: dict[str, set[str]] = {}
    with world.engine.begin() as connection:
        for number, name in enumerate(names, 1):
            died = letter(number, name)
            by_cause.setdefault(name, set()).add(died.group)
            dead_letters.bury(connection, died)

        found = dead_letters.groups(connection, Filter())

    assert {name: len(groups) for name, groups in by_cause.items()} == dict.fromkeys(CAUSES, 1)
    assert Counter({group.group: group.count for group in found}) == Counter(dict.fromkeys(_first(by_cause), 20))
    assert all(group.last_hour == 20 and group.hour_before == 0 for group in found)
    assert {group.consumer for group in found} == {"billing"}
    assert all(group.first_seen <= group.last_seen for group in found)


def _first(groups: dict[str, set[str]]) -> list[str]:
    return [next(iter(one)) for one in groups.values()]


@pytest.mark.parametrize("other", [{"consumer": "shipping"}])
def test_another_consumer_is_another_group(other: dict[str, str]) -> None:
    assert letter(1, "KeyError").group != letter(1, "KeyError", **other).group
    assert letter(1, "KeyError").group == letter(2, "KeyError").group


def _raise_at(line: int) -> Exception:
    """The same handler after a deploy that moved it down."""
    source = "\n" * line + "def handle():\n    raise ValueError\n"
    names: dict[str, Any] = {}
    exec(compile(source, "/srv/app/billing.py", "exec"), names)
    return _raised(names["handle"])


def test_a_deploy_that_moves_lines_splits_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAUSES, "deployed", (_raise_at, Failure.HANDLER, Stage.HANDLER))

    before, after = letter(3, "deployed"), letter(30, "deployed")

    assert before.error == "ValueError at billing.py:5 in handle"
    assert after.error == "ValueError at billing.py:32 in handle"
    assert before.group == after.group


@pytest.fixture
def accounts() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE account (id INTEGER PRIMARY KEY, iban TEXT UNIQUE, owner TEXT NOT NULL)"))
        connection.execute(text("INSERT INTO account VALUES (1, 'DE1', 'ana')"))
    yield engine
    engine.dispose()


def test_a_database_error_tells_its_constraint_and_no_value(accounts: Engine) -> None:
    def insert(values: str) -> None:
        with accounts.begin() as connection:
            connection.execute(text(f"INSERT INTO account VALUES ({values})"))

    found = {}
    for values in ("1, 'DE2', 'ben'", "2, 'DE1', 'ben'", "3, 'DE3', NULL"):
        error = _raised(insert, values)
        assert isinstance(error, IntegrityError)
        found[values] = details_of(error)
        assert "ben" not in str(found[values])

    assert [one["constraint"] for one in found.values()] == [
        "UNIQUE account.id",
        "UNIQUE account.iban",
        "NOT NULL account.owner",
    ]
    assert {one["table"] for one in found.values()} == {"account"}
    assert all(one["chain"] == ["IntegrityError", "IntegrityError"] for one in found.values())
    assert all("test_groups.py" in one["places"][0] for one in found.values())


def test_each_constraint_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def violate(number: int) -> Exception:
        error = sqlite3.IntegrityError(f"UNIQUE constraint failed: account.{'iban' if number % 2 else 'name'}")
        return IntegrityError("INSERT", {"iban": number}, error)

    monkeypatch.setitem(CAUSES, "constraint", (violate, Failure.HANDLER, Stage.HANDLER))

    groups = [letter(number, "constraint").group for number in range(4)]

    assert groups[0] == groups[2] != groups[1] == groups[3]


def test_the_text_of_a_foreign_error_is_kept_only_where_it_is_asked_for() -> None:
    assert "currency 7" not in str(letter(7, "KeyError").details)
    assert "currency 7" in str(letter(7, "KeyError", keep_error_text=True).details)


def test_a_group_has_a_note_and_an_owner(world: ConsumerFixture) -> None:
    died = letter(1, "KeyError")
    with world.engine.begin() as connection:
        dead_letters.bury(connection, died)
        dead_letters.annotate(connection, died.group, by="ana", note="OPS-7: currency is missing")
        dead_letters.annotate(connection, died.group, by="ben", owner="team billing")

        (found,) = dead_letters.groups(connection, Filter())

    assert (found.note, found.owner) == ("OPS-7: currency is missing", "team billing")
    assert [row.set_by for row in world.rows(tables.dead_letter_groups)] == ["ben"]


def test_a_relays_failure_is_a_group_by_failure_type_and_topic() -> None:
    def group(failure: Failure, number: int, **others: Any) -> str:
        return dead_letters.of_row(row_of(order(number, **others), position=number), failure, f"no {number}", 1).group

    assert group(Failure.TOO_LARGE, 1) == group(Failure.TOO_LARGE, 2)
    assert group(Failure.TOO_LARGE, 1) != group(Failure.REJECTED, 1)
    assert group(Failure.TOO_LARGE, 1) != group(Failure.TOO_LARGE, 1, topic="invoices")
