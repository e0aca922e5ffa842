"""A real RabbitMQ: the distribution's programs, driven directly on a private node, port, cookie and epmd."""

from __future__ import annotations

import atexit
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from tests import canaries
from tests.deadlines import DEADLINE
from tests.servers import processes
from tests.servers.local import LocalServer
from tests.servers.server import Given, Unavailable

__all__ = ["control", "given", "local", "program", "server_version"]

# Debian's /usr/sbin wrappers change the user and lose the environment; these are what they call.
_ROOT = "OUTBOXKIT_TEST_RABBITMQ_ROOT"  # the folder of another system that has its own, as debootstrap makes one
_SCRIPTS = [Path("/usr/lib/rabbitmq/bin"), Path("/opt/homebrew/sbin"), Path("/usr/local/sbin")]


def given(url: str, source: str) -> Given:
    """The broker behind an amqp or amqps URL."""
    return Given(name="RabbitMQ", url=url, version=server_version(url), source=source)


def local() -> LocalServer:
    """One node without plugins; everything it opens is on loopback."""
    root = os.environ.get(_ROOT, "")
    script = _SCRIPTS[0] / "rabbitmq-server" if root else _script()
    user = None if root else processes.drop_to("rabbitmq", "nobody")
    folder = _folder_in(Path(root)) if root else processes.owned_folder(processes.session_folder() / "rabbitmq", user)
    port, distribution, epmd = processes.free_ports(3)
    seen = Path("/") / folder.relative_to(root) if root else folder
    environment = _environment(folder, seen, port=port, distribution=distribution, epmd=epmd)
    _start_epmd(folder, user, environment)
    url = f"amqp://guest:{canaries.PASSWORD}@127.0.0.1:{port}/"
    server = LocalServer(
        name="RabbitMQ",
        url=url,
        version="?",
        source=f"installed, {root}{script.parent}",
        argv=[*(_chroot(root) if root else []), script],
        folder=folder,
        user=user,
        env=environment,
        ready=lambda: _ready(server),
    )
    server.start()
    server.version = server_version(url)
    return server


def _chroot(root: str, user: str = "rabbitmq") -> list[str]:
    return ["chroot", f"--userspec={user}:{user}", root]


def _folder_in(root: Path) -> Path:
    """A folder for data inside another system, removed at the end; its user of that name owns it."""
    folder = root / "srv" / processes.session_folder().name
    folder.mkdir()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    inside = str(Path("/") / folder.relative_to(root))
    subprocess.run([*_chroot(str(root), "root"), "chown", "rabbitmq:rabbitmq", inside], check=True)
    return folder


def _script() -> Path:
    for folder in _SCRIPTS:
        if (folder / "rabbitmq-server").is_file():
            return folder / "rabbitmq-server"
    found = shutil.which("rabbitmq-server")
    if found is None:
        msg = "no RabbitMQ: install it (Debian: rabbitmq-server)"
        raise Unavailable(msg)
    return Path(found)


def _environment(folder: Path, seen: Path, *, port: int, distribution: int, epmd: int) -> dict[str, str]:
    """Writes the settings into the folder; a node in a system of its own sees it under another name."""
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\ndefault_pass = {canaries.PASSWORD}\n")
    (folder / "enabled_plugins").write_text("[].\n")
    (folder / "rabbitmq-env.conf").write_text("")  # an empty one keeps the system's own out
    for readable in folder.iterdir():
        readable.chmod(0o644)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")},
        "HOME": str(seen),  # the Erlang cookie is written there
        "RABBITMQ_NODENAME": f"outboxkit-{port}@localhost",
        "RABBITMQ_CONFIG_FILE": str(seen / "rabbitmq"),
        "RABBITMQ_CONF_ENV_FILE": str(seen / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(seen / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(seen / "mnesia"),
        "RABBITMQ_LOG_BASE": str(seen / "log"),
        "RABBITMQ_PID_FILE": str(seen / "node.pid"),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }


def _start_epmd(folder: Path, user: str | None, environment: dict[str, str]) -> None:
    """Erlang's name server as a child of ours: the one that a node starts by itself would outlive everything."""
    program = shutil.which("epmd")
    if program is None:
        msg = "no epmd beside RabbitMQ: install Erlang completely (Debian: erlang-base)"
        raise Unavailable(msg)
    processes.spawn([program], user=user, env=environment, log=folder.parent / "epmd.log")
    port = int(environment["ERL_EPMD_PORT"])
    processes.wait_until(lambda: processes.knock("127.0.0.1", port), within=10, alive=lambda: True, what="epmd")


# Seen on 3.10.8 after a SIGKILL: a quorum queue whose only member calls no election, until somebody asks it to. It then
# confirms nothing for ever.
_ELECT = """
lists:foreach(
    fun(Queue) ->
        Member = amqqueue:get_pid(Queue),
        case ra:members(Member, 1000) of {ok, _, _} -> ok; _ -> ra:trigger_election(Member) end
    end,
    [Queue || Queue <- rabbit_amqqueue:list(), amqqueue:get_type(Queue) =:= rabbit_quorum_queue]).
"""


def _ready(server: LocalServer) -> None:
    """It serves clients, and every quorum queue has a leader, or was told to elect one."""
    server_version(server.url)
    control(server, "eval", _ELECT)


def control(server: LocalServer, *command: str) -> None:
    """Runs rabbitmqctl as the node's own user."""
    program(server, "rabbitmqctl", *command)


def program(server: LocalServer, name: str, *command: str) -> None:
    """Runs one of RabbitMQ's programs as the node's own user."""
    user = server.user
    account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    *before, script = server.argv
    subprocess.run(  # type: ignore[call-overload]  # the three are given together or not at all
        [*before, Path(script).with_name(name), *command],
        env=dict(server.env),
        cwd="/",
        check=True,
        capture_output=True,
        timeout=DEADLINE,
        **account,
    )


def server_version(url: str) -> str:
    """As the server says it in the first frame of the protocol; raises while it does not serve clients.

    Spoken by hand: the client libraries leave open sockets behind after a refused connection, and log about it.
    """
    target = urlsplit(url)
    secure = target.scheme == "amqps"
    address = target.hostname or "127.0.0.1", target.port or (5671 if secure else 5672)
    with socket.create_connection(address, timeout=5) as plain:
        stream = ssl.create_default_context().wrap_socket(plain, server_hostname=address[0]) if secure else plain
        stream.sendall(b"AMQP\x00\x00\x09\x01")
        said = stream.recv(4096)
    version = re.search(rb"\x07versionS\x00\x00\x00.([0-9][0-9.a-z-]*[0-9])", said)
    if version is None:
        msg = f"no AMQP 0-9-1 server answers there: {said[:40]!r}"
        raise ConnectionError(msg)
    return version[1].decode()
