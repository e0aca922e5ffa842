"""Where the demo plays: a file and an in-process cluster, or servers that a person has."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import DDL, create_engine, make_url

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["own_database"]


@contextlib.contextmanager
def own_database(url: str, name: str, *, keep: bool) -> Iterator[str]:
    """A database of the demo's own on the server of a URL, gone at the end; the URL of a file is taken as it is."""
    server = make_url(url)
    if server.get_backend_name() == "sqlite":
        yield url
        return
    admin = create_engine(server.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    names = {"name": admin.dialect.identifier_preparer.quote(name)}
    try:
        with admin.connect() as connection:
            connection.execute(DDL("CREATE DATABASE %(name)s", context=names))  # type: ignore[no-untyped-call]
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        if not keep:
            with admin.connect() as connection:
                connection.execute(DDL("DROP DATABASE IF EXISTS %(name)s WITH (FORCE)", context=names))  # type: ignore[no-untyped-call]
        admin.dispose()
