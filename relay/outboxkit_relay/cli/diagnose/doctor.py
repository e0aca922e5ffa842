"""``outboxkit doctor``: is this set-up right?"""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy import MetaData

from outboxkit.errors import ConfigurationError
from outboxkit.findings import Finding, FindingSeverity
from outboxkit_relay import redaction
from outboxkit_relay.cli.console import import_string, output
from outboxkit_relay.diagnose.doctor import doctor
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_PATIENCE: Final = timedelta(seconds=10)  # a person is waiting
_COLOURS: Final = {FindingSeverity.PROBLEM: "red", FindingSeverity.WARNING: "yellow", FindingSeverity.NOTE: "cyan"}
_ROLES: Final = ("relay", "consumer", "app", "repairer")


@click.command()
@click.argument("apps", metavar="[APP]...", nargs=-1)
@click.option(
    "--metadata", metavar="MODULE:NAME", help="The metadata that Alembic compares, as app.models:Base.metadata."
)
@click.option(
    "--role", type=click.Choice(_ROLES), default="relay", show_default=True, help="Whose rights the login should have."
)
@click.option("--notes", is_flag=True, help="Also what is fine on a development machine, or could not be examined.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one finding a line.")
@click.pass_obj
def command(
    invocation: Invocation, apps: tuple[str, ...], metadata: str | None, role: str, *, notes: bool, as_json: bool
) -> Exit:
    """Is this set-up right? Exit code 3 when it is not.

    Examines the database, its tables, the brokers and the settings, and prints each finding with what mends it; when
    there is none, it says so on standard error. Nothing is changed. With APP (app:billing) also what that consumer
    reads.
    """
    found = doctor(
        invocation.settings,
        patience=_PATIENCE,
        metadata=_metadata(metadata),
        subscriptions=[import_string.subscription(import_string.load(name)) for name in apps],
        role=role,
    )
    wrong = [one for one in found if one.severity is not FindingSeverity.NOTE]
    for one in found if notes else wrong:
        if as_json:
            output.print_json({name: _cleaned(value) for name, value in asdict(one).items()})
        else:
            _show(one)
    if not wrong and not as_json:
        them = "it" if len(found) == 1 else "them"
        left = f"; {output.count(len(found), 'note')}: --notes shows {them}" if found and not notes else ""
        click.echo(f"nothing is wrong{left}", err=True)
    return Exit.PROBLEMS if wrong else Exit.OK


def _metadata(name: str | None) -> MetaData | None:
    if name is None:
        return None
    module, _, path = name.partition(":")
    first, *rest = path.split(".")
    found: Any = import_string.load_any(f"{module}:{first}", "a metadata, for example app.models:Base.metadata")
    for attribute in rest:
        found = getattr(found, attribute, None)
    if not isinstance(found, MetaData):
        raise ConfigurationError(f"{name} is no MetaData; give one, for example app.models:Base.metadata")
    return found


def _show(one: Finding) -> None:
    output.verdict(one.severity.value.capitalize(), one.check, _COLOURS[one.severity])
    output.field("  seen", _cleaned(one.seen), 6)
    output.field("  fix", _cleaned(one.fix), 6)


def _cleaned(value: Any) -> str:
    return redaction.redacted(str(value))
