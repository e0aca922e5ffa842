"""Six database roles, each with the least that its part needs. PostgreSQL only.

The roles cannot log in: grant them to those that do (``GRANT outboxkit_app TO web``). An application adds messages, and
cannot read, change or delete one: a compromised web process cannot erase the evidence of what it did. An operator
decides without seeing what messages hold: views leave it out, and functions (`operate.sql`) carry out each decision
and write down who took it. Who repairs messages must read them, and has a role for that. A relay cleans up through a
function, too: it deletes what has ended and is old, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final

from sqlalchemy import JSON, Column, Connection, LargeBinary, Select, Table, func, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from outboxkit import tables
from outboxkit.migrations.row_policies import PREFIX, keep_readers_to_consumers

__all__ = [
    "COLUMNS",
    "FUNCTIONS",
    "GRANTS",
    "LAG",
    "NEVER_GIVEN",
    "PREFIX",
    "VIEWS",
    "create_roles",
    "foreign_grants",
    "is_hidden",
    "missing_roles",
]

NEVER_GIVEN: Final = ("xid", "position")  # the database alone writes these columns of the hot table
#: What writers may read of it, for `outboxkit.outbox.lag`: how many messages wait, and since when, but not which.
LAG: Final = ("position", "recorded_at")


def is_hidden(column: Column[Any]) -> bool:
    """True if it shows what a message holds or whom it is about: all bytes, and the marks of what is being handled."""
    return isinstance(column.type, LargeBinary | JSON) and column.name != "problems"


#: Tables that have such columns -> the view that leaves them out.
VIEWS: Final = {
    table.name: f"{table.name}_redacted" for table in tables.METADATA.sorted_tables if any(map(is_hidden, table.c))
}
#: role -> the functions that it may call, with the types of their arguments.
FUNCTIONS: Final[dict[str, dict[str, str]]] = {
    "operator": {
        "outboxkit_pause": "text, text, text, interval",
        "outboxkit_resume": "text, text, text",
        "outboxkit_ask": "text, bigint, text, text",
        "outboxkit_discard": "uuid, text",
        "outboxkit_replay": "uuid, text",
    },
    "relay": {"outboxkit_prune": "text, interval, integer"},
    "consumer": {"outboxkit_is_replay": "uuid, bytea, bytea, bytea"},
}

S, SD, SI, SU, SID, SIU, SIUD = (
    "SELECT",
    "SELECT, DELETE",
    "SELECT, INSERT",
    "SELECT, UPDATE",
    "SELECT, INSERT, DELETE",
    "SELECT, INSERT, UPDATE",
    ("SELECT, INSERT, UPDATE, DELETE"),
)
_APP: Final = {
    "outbox_version": S,
    "outbox_schemas": SI,
    "outbox_idempotency": SIUD,
}

#: role -> table -> privileges on all of it; INSERT into the hot table without what only the database writes.
GRANTS: Final[dict[str, dict[str, str]]] = {
    "app": _APP,
    "relay": {
        "outbox_messages": SID,
        "outbox_waiting": SIUD,
        "outbox_stopped_keys": SIUD,
        "outbox_relays": SIUD,
        "outbox_shards": SI,
        "outbox_ledger": SI,
        "dead_letters": SI,
        "outbox_audit": "INSERT",
        "outbox_control": S,
        "outbox_version": S,
    },
    "consumer": {
        **_APP,
        "inbox_messages": SIUD,
        "inbox_waiting": SIUD,
        "inbox_batches": SIUD,
        "inbox_suspects": SIUD,
        "inbox_consumers": SIUD,
        "outbox_sagas": SIU,
        "dead_letters": SI,
        "outbox_audit": "INSERT",
        "outbox_schemas": SIUD,
    },
    "operator": dict.fromkeys((name for name in tables.METADATA.tables if name not in VIEWS), S),
    "repairer": {
        **dict.fromkeys(tables.METADATA.tables, S),
        "outbox_messages": SID,
        "outbox_waiting": SD,
        "outbox_control": SIUD,
        "outbox_audit": SI,
        "dead_letters": SI,
        "dead_letter_groups": SIU,
        "dead_letter_replays": SIU,
        "dead_letter_replay_items": SIU,
        "inbox_messages": SIUD,
        "inbox_waiting": "SELECT, UPDATE, DELETE",
    },
}
_WRITTEN: Final = tuple(
    column.name for column in tables.outbox_messages.c if column.name not in (*NEVER_GIVEN, "recorded_at")
)
_EMIT: Final = {
    ("outbox_messages", "INSERT"): _WRITTEN,
    ("outbox_messages", "SELECT"): LAG,
    ("outbox_waiting", "INSERT"): (*_WRITTEN, "reason", "due_at"),
}
_CLOSE: Final = {("dead_letters", "UPDATE"): ("state", "closed_at")}
#: role -> (table, privilege) -> the columns that it is for. A letter's original never changes, and no application says
#: when its message was recorded.
COLUMNS: Final[dict[str, dict[tuple[str, str], tuple[str, ...]]]] = {
    "app": _EMIT,
    "relay": {**_CLOSE, ("outbox_shards", "UPDATE"): ("owner",)},
    "consumer": {**_EMIT, **_CLOSE},
    "repairer": {
        ("dead_letters", "UPDATE"): ("state", "closed_at", "replay_to", "replaying_since"),
        ("outbox_stopped_keys", "UPDATE"): ("request", "requested_by"),
        ("outbox_waiting", "UPDATE"): ("topic", "shard"),
    },
}


_TO_ROLE: Final = "GRANT {words} ON {table} TO {role}"
_FOREIGN: Final = text(
    """
    SELECT c.relname AS relation,
           CASE WHEN acl.grantee = 0 THEN 'PUBLIC' ELSE acl.grantee::regrole::text END AS grantee,
           string_agg(DISTINCT acl.privilege_type, ', ' ORDER BY acl.privilege_type) AS privileges
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_roles owner ON owner.oid = c.relowner
    CROSS JOIN LATERAL (
        SELECT * FROM aclexplode(c.relacl)
        UNION ALL
        SELECT exploded.* FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) AS exploded
        WHERE a.attrelid = c.oid AND NOT a.attisdropped
    ) AS acl
    LEFT JOIN pg_roles granted ON granted.oid = acl.grantee
    WHERE n.nspname = current_schema() AND c.relname = ANY(:tables) AND acl.grantee <> c.relowner
      AND (acl.grantee = 0 OR (owner.rolname LIKE '%migrator' AND granted.rolname <> ALL(
          SELECT regexp_replace(owner.rolname, 'migrator$', '') || ours.name
          FROM unnest(CAST(:roles AS text[])) AS ours (name)
      )))
    GROUP BY 1, 2 ORDER BY 1, 2
    """
)


def foreign_grants(connection: Connection) -> list[str]:
    """Lists the rights on our tables that nobody of ours has given, one sentence each.

    Rights of PUBLIC always; those of named roles where `create_roles` has made the owner.

    Transaction: joins the caller's; only reads.
    """
    if connection.dialect.name != "postgresql":
        return []
    known = {"tables": [*tables.METADATA.tables, *VIEWS.values()], "roles": [*GRANTS, "migrator"]}
    return [
        f"{row.grantee} may {row.privileges} on {row.relation}: REVOKE it, or run `outboxkit db roles`"
        for row in connection.execute(_FOREIGN, known)
    ]


def missing_roles(connection: Connection, prefix: str = PREFIX) -> list[str]:
    """Lists the roles that the cluster lacks.

    Transaction: joins the caller's; only reads.
    """
    names = [prefix + role for role in (*GRANTS, "migrator")]
    known = text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:names)")
    there = set(connection.scalars(known, {"names": names}))
    return [name for name in names if name not in there]


def create_roles(connection: Connection, prefix: str = PREFIX) -> None:
    """Creates the roles that are missing and gives each exactly what `GRANTS` says; ``migrator`` owns the tables.

    Transaction: joins the caller's; does not commit. Running it again changes nothing.

    Args:
        connection: as a role that may create roles, and owns the tables or is superuser.
        prefix: of the roles' names, which are shared by all databases of a cluster.
    """
    for role in missing_roles(connection, prefix):
        connection.execute(_Ddl("CREATE ROLE {role} NOLOGIN", role=role))
    for role, grants in GRANTS.items():
        for table in tables.METADATA.sorted_tables:
            _grant(connection, prefix + role, table, grants.get(table.name, ""))
    for role, columns in COLUMNS.items():
        for (name, privilege), given in columns.items():
            table = tables.METADATA.tables[name]
            connection.execute(_Ddl(_TO_ROLE, privilege, given, role=prefix + role, table=table))
    for table in tables.METADATA.sorted_tables:
        connection.execute(_Ddl("REVOKE ALL ON {table} FROM PUBLIC", table=table))
        connection.execute(_Ddl("ALTER TABLE {table} OWNER TO {role}", table=table, role=prefix + "migrator"))
    keep_readers_to_consumers(connection, prefix)
    _create_views(connection, prefix)
    _create_functions(connection, prefix)


def _create_views(connection: Connection, prefix: str) -> None:
    for name, view in VIEWS.items():
        shown = select(*(column for column in tables.METADATA.tables[name].c if not is_hidden(column)))
        # Not CREATE OR REPLACE, which takes no new column in the middle.
        connection.execute(_Ddl("DROP VIEW IF EXISTS {what}", what=view))
        connection.execute(_Ddl("CREATE VIEW {what} AS {shown}", what=view, shown=shown))
        connection.execute(_Ddl("ALTER VIEW {what} OWNER TO {role}", what=view, role=prefix + "migrator"))
        connection.execute(_Ddl("REVOKE ALL ON {what} FROM PUBLIC", what=view))
        connection.execute(_Ddl("GRANT SELECT ON {what} TO {role}", what=view, role=prefix + "operator"))


def _create_functions(connection: Connection, prefix: str) -> None:
    schema = connection.dialect.identifier_preparer.quote(connection.scalar(select(func.current_schema())) or "public")
    script = files(__package__).joinpath("operate.sql").read_text("utf-8").replace("{schema}", schema)
    statements = [f"{function.strip()}\n$$" for function in script.split("\n$$;\n")[:-1]]
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
    for role, functions in FUNCTIONS.items():
        for name, arguments in functions.items():
            what = f"{name}({arguments})"
            connection.execute(_Ddl("REVOKE ALL ON FUNCTION {what} FROM PUBLIC", what=what))
            connection.execute(_Ddl("GRANT EXECUTE ON FUNCTION {what} TO {role}", what=what, role=prefix + role))
            connection.execute(_Ddl("ALTER FUNCTION {what} OWNER TO {role}", what=what, role=prefix + "migrator"))


def _grant(connection: Connection, role: str, table: Table, privileges: str) -> None:
    connection.execute(_Ddl("REVOKE ALL ON {table} FROM {role}", table=table, role=role))
    for privilege in filter(None, privileges.split(", ")):
        by_column = table.name == "outbox_messages" and privilege == "INSERT"
        columns = [column.name for column in table.columns if column.name not in NEVER_GIVEN] if by_column else []
        connection.execute(_Ddl(_TO_ROLE, privilege, columns, table=table, role=role))


class _Ddl(ExecutableDDLElement):
    """A statement about roles, whose names the dialect quotes. ``what`` is one of the names that stand above."""

    def __init__(
        self,
        template: str,
        privilege: str = "",
        columns: Sequence[str] = (),
        *,
        role: str = "",
        table: Table | None = None,
        what: str = "",
        shown: Select[Any] | None = None,
    ) -> None:
        self.template, self.privilege, self.columns, self.role, self.table = template, privilege, columns, role, table
        self.what, self.shown = what, shown


@compiles(_Ddl)
def _compile(element: _Ddl, compiler: Any, **_: Any) -> str:
    prepare = compiler.preparer
    columns = f" ({', '.join(map(prepare.quote, element.columns))})" if element.columns else ""
    return element.template.format(
        words=element.privilege + columns,
        role=prepare.quote(element.role) if element.role else "",
        table="" if element.table is None else prepare.format_table(element.table),
        what=element.what,
        shown="" if element.shown is None else compiler.sql_compiler.process(element.shown),
    )
