"""Who may do what: five database roles, each with the least that its part needs. PostgreSQL only.

The roles cannot log in: grant them to those that do (``GRANT outboxkit_app TO web``). An application adds messages, and
cannot read, change or delete one: a compromised web process cannot erase the evidence of what it did.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

from outboxkit import tables

__all__ = ["GRANTS", "NEVER_GIVEN", "create_roles"]

PREFIX: Final = "outboxkit_"
NEVER_GIVEN: Final = ("xid", "position")  # the database alone writes these columns of the hot table

S, SI, SU, SID, SIU, SIUD = (
    "SELECT",
    "SELECT, INSERT",
    "SELECT, UPDATE",
    "SELECT, INSERT, DELETE",
    "SELECT, INSERT, UPDATE",
    ("SELECT, INSERT, UPDATE, DELETE"),
)
_APP: Final = {"outbox_messages": "INSERT", "outbox_waiting": "INSERT", "outbox_version": S, "outbox_schemas": S}

#: role -> table -> privileges. INSERT into the hot table is by column, without those that only the database writes.
GRANTS: Final[dict[str, dict[str, str]]] = {
    "app": _APP,
    "relay": {
        "outbox_messages": SID,
        "outbox_waiting": SIUD,
        "outbox_stopped_keys": SIUD,
        "outbox_relays": SIUD,
        "outbox_shards": SU,
        "outbox_ledger": SID,
        "dead_letters": "INSERT",
        "outbox_audit": "INSERT",
        "outbox_control": S,
        "outbox_version": S,
    },
    "consumer": {
        **_APP,
        "inbox_messages": SIUD,
        "inbox_waiting": SIUD,
        "inbox_batches": SIUD,
        "dead_letters": "INSERT",
        "outbox_audit": "INSERT",
        "outbox_schemas": SI,
    },
    "operator": {
        **{name: S for name in tables.METADATA.tables if not name.startswith("inbox_")},
        "outbox_messages": SI,
        "outbox_stopped_keys": SU,
        "outbox_control": SIUD,
        "outbox_audit": SI,
        "dead_letters": SU,
    },
}


def create_roles(connection: Connection, prefix: str = PREFIX) -> None:
    """Creates the roles that are missing and gives each exactly what `GRANTS` says; ``migrator`` owns the tables.

    Transaction: joins the caller's; does not commit. Running it again changes nothing.

    Args:
        connection: as a role that may create roles, and owns the tables or is superuser.
        prefix: of the roles' names, which are shared by all databases of a cluster.
    """
    for role in (*GRANTS, "migrator"):
        _create(connection, prefix + role)
    for role, grants in GRANTS.items():
        for table in tables.METADATA.sorted_tables:
            _grant(connection, prefix + role, table.name, grants.get(table.name, ""))
    for table in tables.METADATA.sorted_tables:
        _run(connection, "ALTER TABLE {table} OWNER TO {role}", table=table.name, role=prefix + "migrator")


def _create(connection: Connection, role: str) -> None:
    if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}) is None:
        _run(connection, "CREATE ROLE {role} NOLOGIN", role=role)


def _grant(connection: Connection, role: str, table: str, privileges: str) -> None:
    _run(connection, "REVOKE ALL ON {table} FROM {role}", table=table, role=role)
    if table == "outbox_messages" and "INSERT" in privileges:
        columns = [column.name for column in tables.outbox_messages.columns if column.name not in NEVER_GIVEN]
        quote = connection.dialect.identifier_preparer.quote
        named = f"INSERT ({', '.join(map(quote, columns))})"
        privileges = privileges.replace("INSERT", named)
    if privileges:
        _run(connection, f"GRANT {privileges} ON {{table}} TO {{role}}", table=table, role=role)


def _run(connection: Connection, statement: str, **names: str) -> None:
    quote = connection.dialect.identifier_preparer.quote
    connection.exec_driver_sql(statement.format(**{key: quote(name) for key, name in names.items()}))
