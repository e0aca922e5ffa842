"""``outboxkit demo``: a story that ends in a checked statement. No Docker, no server, seconds.

Orders are placed, a relay is killed in mid-batch, the broker goes away, a message dies of a schema mistake, is
understood, and is replayed after the repair. Every part is its own process; the judge counts from outside.
"""

from __future__ import annotations

import click

__all__ = ["command"]

_FAILED = 1


@click.command("demo")
@click.option("--orders", default=200, show_default=True, type=click.IntRange(20, 100_000), help="How many are placed.")
@click.option("--seed", default=1, show_default=True, help="Chooses customers, amounts, and the order that fails.")
@click.option("--keep", is_flag=True, help="Leave the folder with database and logs, and say how to look at it.")
@click.option("--json", "as_json", is_flag=True, help="Print the statement as JSON.")
def command(orders: int, seed: int, *, keep: bool, as_json: bool) -> int:
    """See a relay die, a message fail, and nothing be lost.

    Orders go through four services, each a process of its own. One relay is killed in mid-batch, the broker goes away
    for a while, one message cannot be read. At the end everything is counted from outside; exit code 0 means that all
    checks hold.
    """
    from outboxkit_relay.demo import story

    return story.tell(orders, seed, keep=keep, as_json=as_json)
