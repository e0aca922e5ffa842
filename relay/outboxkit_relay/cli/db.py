"""``outboxkit db``: the tables for people without Alembic, the roles, and a check for everybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from outboxkit import migrations, tables
from outboxkit.migrations.roles import GRANTS, PREFIX, create_roles, missing_roles
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]


@click.group()
def command() -> None:
    """Create, print or check the tables, and the database roles."""


@command.command()
@click.option("--dry-run", is_flag=True, help="Show the versions, and change nothing.")
@click.pass_obj
def upgrade(invocation: Invocation, *, dry_run: bool) -> None:
    """Bring the tables to the newest version.

    Running it again changes nothing. A database that is newer than this outboxkit is refused.
    """
    with (
        database.opened(invocation, creates=True) as engine,
        database.connect(engine) as connection,
        connection.begin(),
    ):
        before = migrations.current(connection)
        if not dry_run:
            if invocation.settings.database_schema:
                migrations.create_schema(connection, invocation.settings.database_schema)
            migrations.upgrade(connection)
    click.echo(f"version {before or 'none'}, {'would become' if dry_run else 'now'} {tables.VERSION}")


@command.command()
@click.option(
    "--dialect",
    type=click.Choice(["postgresql", "sqlite"]),
    default="postgresql",
    show_default=True,
    help="For which database.",
)
def sql(dialect: str) -> None:
    """Print what `db upgrade` runs on an empty database, for people who run it themselves."""
    click.echo(migrations.sql(dialect), nl=False)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def check(invocation: Invocation, *, as_json: bool) -> Exit:
    """Are the tables as they should be? Exit code 3 when they are not."""
    with database.opened(invocation) as engine, database.connect(engine) as connection:
        problems = migrations.check(connection)
    if as_json:
        output.print_json({"version": tables.VERSION, "problems": problems})
    else:
        click.echo("\n".join(problems) or f"the tables are right, version {tables.VERSION}")
    return Exit.PROBLEMS if problems else Exit.OK


@command.command()
@click.option("--prefix", default=PREFIX, show_default=True, help="Begins the names: roles are the whole cluster's.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@click.pass_obj
def roles(invocation: Invocation, *, prefix: str, dry_run: bool) -> None:
    """Create the database roles, or give them exactly their rights again. PostgreSQL only.

    They cannot log in: grant them to those that do, as in GRANT outboxkit_relay TO relay. It needs a login that may
    create roles and owns the tables.
    """
    with database.writing(invocation) as connection:
        if connection.dialect.name != "postgresql":
            click.echo(f"{connection.dialect.name} has no roles: nothing to do")
            return
        new = missing_roles(connection, prefix)
        if not dry_run:
            entry = {"who": who(), "action": "db.roles", "target": prefix}
            connection.execute(tables.outbox_audit.insert().values(**entry))
            create_roles(connection, prefix)
    for name in (prefix + role for role in (*GRANTS, "migrator")):
        plan, done = ("create", "created") if name in new else ("renew the rights of", "renewed the rights of")
        click.echo(f"{'would ' + plan if dry_run else done} {name}")
