"""``outboxkit healthcheck``: asks a relay or consumer on this machine, for hosts that run a command as a probe."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.policy import duration
from outboxkit_relay.cli.console import output
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.settings import ProbeSettings

__all__ = ["command"]

_PATHS: Final = {"minimal": "/livez", "complete": "/readyz"}
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared with, not listened on
_LONGEST_ANSWER: Final = 1_000_000  # bytes


@click.command()
@click.option(
    "--level", type=click.Choice(list(_PATHS)), default="complete", show_default=True, help="What must be well."
)
@click.option("--timeout", default="5s", show_default=True, help="How long to wait for the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(invocation: Invocation, level: str, timeout: str, *, as_json: bool) -> int:
    """Is the relay or consumer on this machine well? Exit code 3 when it is not.

    It must run with `probes.port`. Minimal: it moves; what it depends on may be away. Complete: it can publish, or
    handle messages.
    """
    status, answer = _ask(invocation.settings.probes, _PATHS[level], duration(timeout).total_seconds())
    if as_json:
        output.print_json(answer)
    else:
        click.echo("well" if status == HTTPStatus.OK else output.safe(answer.get("reason", f"HTTP {status}")))
        for paused in answer.get("paused", []):
            click.echo(output.safe(f"{paused['topic']} is paused: {paused['failure']}: {paused['reason']}"))
    return Exit.OK if status == HTTPStatus.OK else Exit.PROBLEMS


def _ask(settings: ProbeSettings, path: str, patience: float) -> tuple[int, dict[str, Any]]:
    if not settings.port:
        raise ConfigurationError("probes.port is not set: give the relay or consumer and this command the same one")
    host = _ANY.get(settings.host, settings.host)
    connection = HTTPConnection(host, settings.port, timeout=patience)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(json.loads(answer.read(_LONGEST_ANSWER)))
    except (OSError, HTTPException, ValueError) as error:
        raise OutboxKitError(
            f"nothing answers on {host} port {settings.port} ({type(error).__name__}): is it running?"
        ) from None
    finally:
        connection.close()
