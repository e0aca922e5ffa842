"""The roles of outboxkit belong to the whole cluster: a test that has made some takes them away again."""

from __future__ import annotations

from sqlalchemy import Connection

from outboxkit.migrations.roles import GRANTS

__all__ = ["drop_roles"]


def drop_roles(connection: Connection, prefix: str, *logins: str) -> None:
    """Drops the roles of that prefix and further ones of it; what they owned goes to who asks."""
    for role in (*GRANTS, "migrator", *logins):
        for statement in ("REASSIGN OWNED BY {} TO CURRENT_USER", "DROP OWNED BY {}", "DROP ROLE {}"):
            connection.exec_driver_sql(statement.format(prefix + role))
