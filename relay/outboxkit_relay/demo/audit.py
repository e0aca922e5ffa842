"""The audit: counts from outside, in what was read from the topics and in the tables, by plain SQL.

Nothing here uses the library, so that the demo does not certify itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import Engine, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Findings", "Record", "audit"]


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a topic, as anybody would read it."""

    topic: str
    key: bytes
    id: str
    sequence: int
    is_replay: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Counts, and the checks that failed."""

    placed: int
    published: int
    redelivered: int
    replayed: int
    duplicates_caught: int
    handled: int
    dead_letters: int
    failures: tuple[str, ...]


def audit(engine: Engine, records: Sequence[Record], duplicates: int, poison: int) -> Findings:
    """Compares what was placed with what was published and with what came of it.

    Args:
        engine: of the database.
        records: of all topics.
        duplicates: what the consumers say that they caught.
        poison: the number of the order whose message was dead for a while.
    """
    orders = {int(str(number)): int(str(total)) for number, total in _rows(engine, _ORDERS)}
    copies = Counter((record.topic, record.id) for record in records if not record.is_replay)
    redelivered = sum(copies.values()) - len(copies)
    effects = {name: [order for (order,) in _rows(engine, query)] for name, query in _EFFECTS.items()}
    ((paid,),) = _rows(engine, _PAID)
    ((unsent,),) = _rows(engine, _UNSENT)
    replayed = sum(record.is_replay for record in records)
    letters = Counter(state for (state,) in _rows(engine, _LETTERS))
    checks = {
        "every message was published": len(copies) == _STEPS * len(orders) and not unsent,
        "nothing is lost": all(set(done) == set(orders) for done in effects.values()),
        "nothing is doubled": all(len(done) == len(set(done)) for done in effects.values()),
        "the books balance": paid == sum(orders.values()),
        "messages were redelivered": redelivered >= 1,
        "the inbox caught every duplicate": duplicates >= redelivered,
        "order is kept per key": _in_order(records) and _effects_in_order(engine, poison),
        "the dead letter was replayed once": letters == {"replayed": 1} and replayed == 1,
    }
    return Findings(
        placed=len(orders),
        published=len(copies),
        redelivered=redelivered,
        replayed=replayed,
        duplicates_caught=duplicates,
        handled=sum(len(done) for done in effects.values()),
        dead_letters=sum(letters.values()),
        failures=tuple(name for name, holds in checks.items() if not holds),
    )


_ORDERS: Final = text("SELECT id, total FROM demo_orders")
_PAID: Final = text("SELECT coalesce(sum(amount), 0) FROM demo_payments")
_UNSENT: Final = text("SELECT count(*) FROM outbox_messages")
_LETTERS: Final = text("SELECT state FROM dead_letters")
_RESERVED: Final = text("SELECT customer, order_id FROM demo_reservations WHERE order_id <> :poison ORDER BY id")
_EFFECTS: Final = {
    "reservations": text("SELECT order_id FROM demo_reservations"),
    "payments": text("SELECT order_id FROM demo_payments"),
    "shipments": text("SELECT order_id FROM demo_shipments"),
    "confirmations": text("SELECT order_id FROM demo_confirmations"),
}
_STEPS: Final = 4  # messages that an order causes


def _rows(engine: Engine, query: object, **values: object) -> list[tuple[object, ...]]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return [tuple(row) for row in connection.execute(query, values)]  # type: ignore[call-overload]


def _in_order(records: Sequence[Record]) -> bool:
    """First occurrences of each (topic, key), in the order of the producer's positions."""
    last: dict[tuple[str, bytes], int] = defaultdict(int)
    seen: set[tuple[str, str]] = set()
    for record in records:
        if record.is_replay or (record.topic, record.id) in seen:
            continue
        seen.add((record.topic, record.id))
        if record.sequence <= last[record.topic, record.key]:
            return False
        last[record.topic, record.key] = record.sequence
    return True


def _effects_in_order(engine: Engine, poison: int) -> bool:
    """Orders are placed in the order of their numbers; each customer's are handled so, but for the replayed one."""
    by_customer: Mapping[object, list[int]] = defaultdict(list)
    for customer, order in _rows(engine, _RESERVED, poison=poison):
        by_customer[customer].append(int(str(order)))
    return all(orders == sorted(orders) for orders in by_customer.values())
