"""A real PgBouncer in transaction mode, before the session's PostgreSQL."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

from sqlalchemy import make_url

from tests.deadlines import DEADLINE
from tests.servers import postgres, processes
from tests.servers.local import LocalServer
from tests.servers.server import Unavailable

__all__ = ["find"]

# Few server sessions for many clients, so that whoever relies on a session of its own meets another one's state.
_SETTINGS = """
[databases]
* = host={host} port={server_port} user={user}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
"""


@functools.cache
def find(postgres_url: str) -> LocalServer:
    """The session's pooler before that server, started on first use; it serves every database there."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        msg = "no PgBouncer: install it (Debian: pgbouncer)"
        raise Unavailable(msg)
    user = processes.drop_to("postgres", "nobody")  # it refuses to be root
    folder = processes.owned_folder(processes.session_folder() / "pgbouncer", user)
    (port,) = processes.free_ports(1)
    behind = make_url(postgres_url)
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        _SETTINGS.format(host=behind.host, server_port=behind.port, user=behind.username or "postgres", port=port)
    )
    url = behind.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
    pooler = LocalServer(
        name="PgBouncer",
        url=url,
        version=_version(program),
        source=f"installed, {Path(program).parent}",
        argv=[program, settings],
        folder=folder,
        user=user,
        ready=lambda: postgres.server_version(url),
    )
    pooler.start()
    return pooler


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
    return said.split()[1]
