"""A real Apache Kafka (KRaft, one node) from its Maven Central jars on the local JVM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.deadlines import DEADLINE
from tests.servers import processes
from tests.servers.cache import cached
from tests.servers.local import LocalServer
from tests.servers.server import Given, Server, Unavailable, address

__all__ = ["VERSION", "answers", "given", "local", "scram_address"]

VERSION = "4.4.0"
_OLDEST_JAVA = 17
_CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qg"  # any 22 characters of base64

_POM = f"""<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>outboxkit</groupId><artifactId>kafka-broker</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""

# The second part is for the speed of tests: above all, a killed broker comes back after 1 s instead of 9 s.
_SETTINGS = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},SCRAM://127.0.0.1:{scram},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SCRAM://127.0.0.1:{scram}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SCRAM:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
listener.name.scram.sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.scram.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false
num.partitions=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0

broker.session.timeout.ms=1000
broker.heartbeat.interval.ms=100
controller.quorum.append.linger.ms=0
controller.quorum.election.timeout.ms=100
controller.quorum.election.backoff.max.ms=100
num.network.threads=1
num.io.threads=2
background.threads=1
log.cleaner.dedupe.buffer.size=2097152
log.cleaner.io.buffer.size=65536
"""


def given(url: str, source: str) -> Given:
    """The cluster behind `kafka://host:port` (or `host:port`)."""
    server = address(url if "://" in url else f"kafka://{url}")
    answers(server)
    return Given(name="Apache Kafka", url=f"kafka://{server}", version="version unknown", source=source)


def local() -> LocalServer:
    """One broker that is its own controller; topics are created by who needs them, never by accident."""
    java, release = _java()
    libs = cached(f"kafka-{VERSION}", _download) / "libs"
    # Apart from the jars, because the archive is only valid for the very paths that it was made from.
    classes = cached(f"kafka-{VERSION}-java-{release}", lambda folder: _train(java, libs, folder))
    folder = processes.owned_folder(processes.session_folder() / "kafka", None)
    server = _broker(java, libs, folder, f"-XX:SharedArchiveFile={classes / 'classes.jsa'}")
    server.start()
    return server


def _java() -> tuple[str, str]:
    """The program and its full version."""
    home = os.environ.get("JAVA_HOME")
    java = f"{home}/bin/java" if home else shutil.which("java")
    if java is None:
        msg = f"no Java: install a JRE of version {_OLDEST_JAVA} or newer (Debian: default-jre-headless)"
        raise Unavailable(msg)
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True, timeout=DEADLINE).stderr
    version = re.search(r'version "((\d+)[^"]*)"', said)
    if version is None or int(version[2]) < _OLDEST_JAVA:
        msg = f"Apache Kafka {VERSION} needs Java {_OLDEST_JAVA} or newer; {java} says: {said.splitlines()[0]}"
        raise Unavailable(msg)
    return java, version[1]


def _download(folder: Path) -> None:
    """The broker's jars, by Maven (its own settings and mirrors apply)."""
    maven = shutil.which("mvn")
    if maven is None:
        msg = "no Maven to fetch Apache Kafka with: install it (Debian: maven)"
        raise Unavailable(msg)
    (folder / "pom.xml").write_text(_POM)
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder / 'libs'}"]
    done = subprocess.run(
        [maven, "-q", "-B", "-f", folder / "pom.xml", *goal], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        msg = f"Maven could not fetch Apache Kafka {VERSION}: {(done.stdout + done.stderr).strip()[-1500:]}"
        raise Unavailable(msg)


def _train(java: str, libs: Path, folder: Path) -> None:
    """One run that leaves an archive of loaded classes, which halves every later start."""
    work = processes.owned_folder(processes.session_folder() / "kafka-training", None)
    trainee = _broker(java, libs, work, f"-XX:ArchiveClassesAtExit={folder / 'classes.jsa'}")
    trainee.start()
    trainee.stop()


def _broker(java: str, libs: Path, folder: Path, archive: str) -> LocalServer:
    port, controller, scram = processes.free_ports(3)
    settings = folder / "server.properties"
    settings.write_text(_SETTINGS.format(port=port, controller=controller, scram=scram, folder=folder))
    command = [java, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{libs}/*"]
    subprocess.run(
        [*command, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(settings)],
        capture_output=True,
        check=True,
        timeout=DEADLINE,
    )
    return LocalServer(
        name="Apache Kafka",
        url=f"kafka://127.0.0.1:{port}",
        version=VERSION,
        source="Maven Central jars, KRaft, local JVM",
        argv=[*command[:1], "-Xms256m", "-Xmx512m", archive, *command[1:], "kafka.Kafka", settings],
        folder=folder,
        ready=lambda: answers(f"127.0.0.1:{port}"),
        shutdown=signal.SIGTERM,
    )


def answers(bootstrap: str) -> None:
    """Raise until a broker is registered and serves metadata."""
    host, _, port = bootstrap.split(",", maxsplit=1)[0].rpartition(":")
    processes.knock(host, int(port))
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    if not admin.list_topics(timeout=2).brokers:
        msg = "no broker is registered yet"
        raise ConnectionError(msg)


def scram_address(server: Server) -> str:
    """Where users log in with a password; elsewhere everybody is let in.

    Raises:
        Unavailable: the server was not started here.
    """
    if not isinstance(server, LocalServer):
        msg = f"{server.name} of {server.source} has no listener for passwords"
        raise Unavailable(msg)
    found = re.search(r"SCRAM://(\S+?),", (server.folder / "server.properties").read_text())
    return found[1] if found else ""
