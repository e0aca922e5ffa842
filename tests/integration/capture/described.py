"""A database's own description of its tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, inspect, text

__all__ = ["described"]


def described(engine: Engine) -> dict[str, Any]:
    """All that a database tells of its tables, whatever the order in which it came to be."""
    inspector = inspect(engine)
    return {
        name: {
            "columns": {
                column["name"]: (
                    str(column["type"]),
                    column["nullable"],
                    column["default"],
                    "identity" in column,
                )
                for column in inspector.get_columns(name)
            },
            "key": inspector.get_pk_constraint(name)["constrained_columns"],
            "indexes": {
                index["name"]: index.get("expressions", index["column_names"]) for index in inspector.get_indexes(name)
            },
            "checks": {check["name"]: check["sqltext"] for check in inspector.get_check_constraints(name)},
            "comment": None if engine.dialect.name == "sqlite" else inspector.get_table_comment(name)["text"],
            "options": _options(engine, name),
        }
        for name in inspector.get_table_names()
    }


def _options(engine: Engine, table: str) -> Any:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            return "AUTOINCREMENT" in str(
                connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": table})
            )
        return connection.scalar(
            text("SELECT reloptions FROM pg_class WHERE oid = to_regclass(:name)"), {"name": table}
        )
