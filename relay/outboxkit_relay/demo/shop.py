"""The shop as a process: reads lines ``first last seconds``, places these orders within that time, says ``placed``.

It ends when its standard input does, so it never outlives the demo.
"""

from __future__ import annotations

import random
import sys
import time

from outboxkit_relay.demo.contracts import OldOrderPlaced, OrderPlaced
from outboxkit_relay.demo.order_flow import Base, Order, engine, sessions

__all__ = ["main"]

_CUSTOMERS = 10


def main(seed: int, old: int) -> None:
    """Places orders as asked; the one with the number ``old`` speaks the previous release's language."""
    rng = random.Random(seed)  # noqa: S311  a demo, not a secret
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
    print("ready", flush=True)
    for line in sys.stdin:
        first, last, seconds = map(int, line.split())
        for number in range(first, last + 1):
            _place(number, rng, as_old=number == old)
            time.sleep(seconds / (last - first + 1))  # customers do not come all at once
        print("placed", flush=True)


def _place(number: int, rng: random.Random, *, as_old: bool) -> None:
    customer, quantity = f"customer-{rng.randrange(_CUSTOMERS)}", rng.randint(1, 5)
    order = Order(id=number, customer=customer, quantity=quantity, total=quantity * rng.randint(100, 9_999))
    said = OldOrderPlaced(number, customer, quantity, order.total)
    with sessions.begin() as session:
        session.add(order)
        order.emit(said if as_old else OrderPlaced(number, customer, quantity, order.total, warehouse="north"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
