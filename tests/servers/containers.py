"""The same servers in containers, where a Docker engine runs; Testcontainers removes what a killed session leaves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers import kafka as kafka_broker
from tests.servers import postgres as postgres_server
from tests.servers import processes
from tests.servers import rabbitmq as rabbitmq_broker
from tests.servers.server import Unavailable, address

__all__ = ["ContainerServer", "kafka", "postgres", "rabbitmq"]


@dataclass(kw_only=True)
class ContainerServer:
    """One container on a fixed loopback port, so that a restarted server is found at the same address."""

    name: str
    url: str
    version: str
    source: str
    container: Any  # docker-py carries no types
    ready: Callable[[], object]

    @property
    def bootstrap(self) -> str:
        return address(self.url)

    def kill(self) -> None:
        self.container.kill()
        self.container.wait()

    def stop(self) -> None:
        self.container.stop()

    def start(self) -> None:
        self.container.start()
        processes.wait_until(self.ready, within=120, alive=lambda: True, what=self.name)

    def pause(self) -> None:
        self.container.pause()

    def resume(self) -> None:
        self.container.unpause()

    def heal(self) -> None:
        self.container.reload()
        if self.container.status == "paused":
            self.resume()
        elif self.container.status != "running":
            self.start()

    def close(self) -> None:
        self.container.remove(force=True, v=True)


def postgres() -> ContainerServer:
    """PostgreSQL with the settings of the local recipe."""
    (port,) = processes.free_ports(1)
    url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    return _run(
        "PostgreSQL",
        "postgres:18.1",
        url=url,
        ports={5432: port},
        environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
        command="postgres -c wal_level=logical -c max_prepared_transactions=10 -c max_connections=200",
        ready=lambda: postgres_server.server_version(url),
    )


def kafka() -> ContainerServer:
    """Apache's own image; the advertised address is the one on this machine's loopback."""
    (port,) = processes.free_ports(1)
    settings = {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_BROKER_SESSION_TIMEOUT_MS": "1000",
        "KAFKA_BROKER_HEARTBEAT_INTERVAL_MS": "100",
    }
    return _run(
        "Apache Kafka",
        "apache/kafka:4.1.1",
        url=f"kafka://127.0.0.1:{port}",
        ports={9092: port},
        environment=settings,
        ready=lambda: kafka_broker.answers(f"127.0.0.1:{port}"),
    )


def rabbitmq() -> ContainerServer:
    """RabbitMQ without plugins."""
    (port,) = processes.free_ports(1)
    url = f"amqp://guest:guest@127.0.0.1:{port}/"
    return _run(
        "RabbitMQ",
        "rabbitmq:4.2.1",
        url=url,
        ports={5672: port},
        environment={},
        ready=lambda: rabbitmq_broker.server_version(url),
    )


def _engine() -> type[Any]:
    """Testcontainers' class, once an engine has answered; looking for its socket first saves the slow import."""
    sockets = [Path("/var/run/docker.sock"), Path.home() / ".docker/run/docker.sock"]
    if not os.environ.get("DOCKER_HOST") and not any(socket.exists() for socket in sockets):
        msg = "no Docker engine"
        raise Unavailable(msg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours to fix
        import docker  # slow, and pointless without an engine
        from testcontainers.core.container import DockerContainer
    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        msg = f"no Docker engine: {error}"
        raise Unavailable(msg) from error
    return DockerContainer


def _run(  # a container has this many sides
    name: str,
    image: str,
    *,
    url: str,
    ports: Mapping[int, int],
    environment: Mapping[str, str],
    ready: Callable[[], object],
    command: str | None = None,
) -> ContainerServer:
    container = _engine()(image).with_envs(**environment)
    container.ports.update({f"{inner}/tcp": ("127.0.0.1", outer) for inner, outer in ports.items()})
    if command:
        container.with_command(command)
    container.start()
    server = ContainerServer(
        name=name,
        url=url,
        version=image.rpartition(":")[2],
        source=f"Docker image {image}",
        container=container.get_wrapped_container(),
        ready=ready,
    )
    processes.wait_until(ready, within=120, alive=lambda: True, what=name)
    return server
