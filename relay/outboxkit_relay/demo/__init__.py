"""``outboxkit demo``: a story that ends in a checked statement. No Docker, no server, seconds.

Orders are placed, a relay is killed in mid-batch, the broker goes away, a message dies of a schema mistake, is
understood, and is replayed after the repair. Every part is its own process; the judge counts from outside.
"""

from __future__ import annotations

from typing import Any

import click

__all__ = ["command"]


@click.command("demo")
@click.option("--orders", default=200, show_default=True, type=click.IntRange(20, 100_000), help="How many are placed.")
@click.option("--seed", default=1, show_default=True, help="Chooses customers, amounts, and the order that fails.")
@click.option("--keep", is_flag=True, help="Leave the folder with database and logs, and say how to look at it.")
@click.option("--database", metavar="URL", default="", help="A PostgreSQL: a database is made there, and dropped.")
@click.option("--broker", metavar="URL", default="", help="A Kafka or RabbitMQ; its topics stay. No outage is played.")
@click.option("--json", "as_json", is_flag=True, help="Print the statement as JSON.")
def command(**asked: Any) -> int:
    """See a relay die, a message fail, and nothing be lost.

    Orders go through four services, each a process of its own. One relay is killed in mid-batch, the broker goes away
    for a while, one message cannot be read. At the end everything is counted from outside; exit code 0 means that all
    checks hold.
    """
    from outboxkit.errors import ConfigurationError
    from outboxkit_relay import logs
    from outboxkit_relay.demo import story

    for name in ("database", "broker"):
        if any(logs.secrets_of(asked[name])):
            raise ConfigurationError(f"--{name} carries a secret, and every user of this machine can read arguments")
    return story.tell(story.Plan(**asked))
