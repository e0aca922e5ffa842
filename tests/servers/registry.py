"""A real schema registry with Confluent's API: Apicurio Registry, on the local JVM."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

from tests.servers import processes
from tests.servers.cache import cached
from tests.servers.local import LocalServer
from tests.servers.server import Given, Unavailable

__all__ = ["VERSION", "find", "given", "local"]

VERSION = "3.0.9"  # runs on Java 17; docker-compose.yml has the same
_VARIABLE = "OUTBOXKIT_TEST_REGISTRY"
_API = "/apis/ccompat/v7"


@functools.cache
def find() -> Given | LocalServer:
    """The session's registry: the one named by the environment, or one of our own, started on first use."""
    url = os.environ.get(_VARIABLE)
    return given(url, _VARIABLE) if url else local()


def given(url: str, source: str) -> Given:
    """The registry behind the root URL of its API."""
    _answers(url)
    return Given(name="schema registry", url=url, version="version unknown", source=source)


def local() -> LocalServer:
    """One registry with an in-memory database; it checks compatibility as Confluent's does: BACKWARD by default."""
    java = shutil.which("java")
    if java is None:
        msg = "no Java: install a JRE of version 17 or newer (Debian: default-jre-headless)"
        raise Unavailable(msg)
    program = cached(f"apicurio-{VERSION}", _download) / f"apicurio-registry-app-{VERSION}-runner.jar"
    port, management = processes.free_ports(2)
    url = f"http://127.0.0.1:{port}{_API}"
    settings = {
        "QUARKUS_HTTP_HOST": "127.0.0.1",
        "QUARKUS_HTTP_PORT": str(port),
        "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
        "QUARKUS_MANAGEMENT_PORT": str(management),
    }
    server = LocalServer(
        name="Apicurio Registry",
        url=url,
        version=VERSION,
        source="Maven Central archive, local JVM",
        argv=[java, "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-jar", program],
        folder=processes.owned_folder(processes.session_folder() / "registry", None),
        env={**os.environ, **settings},
        ready=lambda: _answers(url),
    )
    server.start()
    _put(f"{url}/config", {"compatibility": "BACKWARD"})
    return server


def _download(folder: Path) -> None:
    """The server's archive, by Maven (its own settings and mirrors apply)."""
    maven = shutil.which("mvn")
    if maven is None:
        msg = "no Maven to fetch Apicurio Registry with: install it (Debian: maven)"
        raise Unavailable(msg)
    artifact = f"-Dartifact=io.apicurio:apicurio-registry-app:{VERSION}:tar.gz:all"
    goal = ["dependency:copy", artifact, f"-DoutputDirectory={folder}"]
    done = subprocess.run(
        [maven, "-q", "-B", *goal], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        msg = f"Maven could not fetch Apicurio Registry {VERSION}: {(done.stdout + done.stderr).strip()[-1500:]}"
        raise Unavailable(msg)
    (archive,) = folder.glob("*.tar.gz")
    # Not tarfile: its safe way to extract came with Python 3.11.4, and Debian has 3.11.2.
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True, timeout=120)
    archive.unlink()


def _answers(url: str) -> None:
    with urllib.request.urlopen(f"{url}/subjects", timeout=2) as answer:
        json.load(answer)


def _put(url: str, body: object) -> None:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), method="PUT", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5):
        pass
