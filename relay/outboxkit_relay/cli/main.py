"""The program: global options, and the table of commands. A command's module is imported when the command is used.

A new command is one module with ``command`` and one line in `COMMANDS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from outboxkit_relay.settings import Settings

__all__ = ["COMMANDS", "Invocation", "program"]

#: name -> (module with ``command``, what the list of commands says about it)
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("outboxkit_relay.demo", "See a relay die, a message fail, and nothing be lost."),
    "demo-broker": ("outboxkit_relay.demo.cluster", "Serve a Kafka-protocol broker in memory, to try things out."),
    "init": ("outboxkit_relay.cli.init", "Create the tables, and what the broker needs."),
    "db": ("outboxkit_relay.cli.db", "Create, print or check the tables, and the database roles."),
    "relay": ("outboxkit_relay.cli.relay", "Publish what is in the outbox."),
    "consume": ("outboxkit_relay.cli.consume", "Run the handlers of consumers until SIGTERM or SIGINT."),
    "status": ("outboxkit_relay.cli.status", "Is anything stuck? Exit code 3 when something is."),
    "doctor": ("outboxkit_relay.cli.diagnose.doctor", "Is this set-up right? Exit code 3 when it is not."),
    "trace": ("outboxkit_relay.cli.diagnose.trace", "Follow a message, a key or a conversation."),
    "audit": (
        "outboxkit_relay.cli.diagnose.audit",
        "Is every message accounted for? Exit code 3 when something contradicts itself.",
    ),
    "healthcheck": (
        "outboxkit_relay.cli.healthcheck",
        "Is the relay or consumer on this machine well? Exit code 3 when it is not.",
    ),
    "dlq": ("outboxkit_relay.cli.dlq.commands", "Understand, replay, repair or discard dead letters."),
    "quarantine": ("outboxkit_relay.cli.quarantine", "See stopped keys, let them go on, or skip their heads."),
    "consumer": ("outboxkit_relay.cli.consumer.commands", "Rename a consumer."),
    "saga": ("outboxkit_relay.cli.saga", "See sagas; send a step again, or undo what was done."),
    "schema": ("outboxkit_relay.cli.schema.commands", "Check, compare and register Avro schemas; look into messages."),
    "messages": (
        "outboxkit_relay.cli.messages.commands",
        "See what waits in the outbox; cancel what is scheduled, send elsewhere or give up what is pending.",
    ),
    "dashboard": (
        "outboxkit_relay.cli.dashboard.command",
        "Serve a page that shows what the commands show, until SIGTERM or SIGINT.",
    ),
    "log": ("outboxkit_relay.cli.log", "List what operators did: pauses, replays, discards, everything."),
    "prune": ("outboxkit_relay.cli.prune", "Delete what its retention no longer keeps."),
}


@dataclass
class Invocation:
    """Global options of a command line."""

    config: Path | None = None
    database_url: str | None = None
    broker_url: str | None = None

    @cached_property
    def settings(self) -> Settings:
        """Settings from flags, environment and file; logging is set up with them.

        Raises:
            ConfigurationError: a setting is wrong, or a flag carries a secret.
        """
        from outboxkit_relay import logs, settings
        from outboxkit_relay.cli.console import secret_flags

        secret_flags.refuse_in_flag("--database-url", self.database_url, "OUTBOXKIT_DATABASE_URL")
        secret_flags.refuse_in_flag("--broker-url", self.broker_url, "OUTBOXKIT_BROKER_URL")
        found = settings.load(self.config, database_url=self.database_url, broker_url=self.broker_url)
        if settings.colourless():
            click.get_current_context().color = False
        logs.configure(found.log.level, found.log.format, secrets=secret_flags.of(found))
        return found


class _Lazy(click.Group):
    """A group that imports the module of a command when it is used; the list of commands needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's signature
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"outboxkit {version('outboxkit')}")
        ctx.exit()


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from flags, OUTBOXKIT_… variables, and outboxkit.toml or [tool.outboxkit] in pyproject.toml. "
    "Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 a check found problems, 4 partly done.",
)
@click.option("--config", type=click.Path(path_type=Path), help="The settings file.")
@click.option("--database-url", metavar="URL", help="The database, without a password.")
@click.option("--broker-url", metavar="URL", help="The broker, without a password.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
@click.pass_context
def program(ctx: click.Context, config: Path | None, database_url: str | None, broker_url: str | None) -> None:
    """Transactional outbox and inbox: from the database commit to the handler's effect."""
    ctx.obj = Invocation(config, database_url, broker_url)
