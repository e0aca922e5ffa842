"""``outboxkit relay run``: the daemon."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

import click

from outboxkit import _failpoints
from outboxkit_relay.cli import pause
from outboxkit_relay.daemon import lifecycle
from outboxkit_relay.daemon.build import build_relay

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_log: Final = logging.getLogger(__name__)


@click.group()
def command() -> None:
    """Publish what is in the outbox."""


for _one in (pause.pause, pause.resume, pause.listing):
    command.add_command(_one)


@command.command("run")
@click.option("--once", is_flag=True, help="Publish what is there and leave.")
@click.pass_obj
def run(invocation: Invocation, *, once: bool) -> None:
    """Publish until SIGTERM or SIGINT.

    Several relays share the work. Killed at any moment, nothing is lost: what was in flight is published again.

    With --once it leaves when nothing is left: it waits for messages that are tried again, and for those of other
    relays, also of dead ones; not for what is paused, parked, or scheduled for later.
    """
    settings = invocation.settings
    if settings.failpoints:
        _log.warning("failpoints.enabled", extra={"failpoints": settings.failpoints})
    _failpoints.enable(settings.failpoints)
    lifecycle.tune_interpreter()
    stop = threading.Event()
    with lifecycle.stop_on_signals(stop.set), build_relay(settings, once=once) as built:
        built.run(stop)
