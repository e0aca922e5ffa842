"""A proxy that is cut is an outage, and one that is restored forwards again."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from outboxkit_relay.demo.broker_proxy import BrokerProxy


class _Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that answers what it is told."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_cut_one_is_an_outage_and_a_restored_one_is_a_way(echo: int) -> None:
    proxy = BrokerProxy(f"amqp://me@127.0.0.1:{echo}/vhost?heartbeat=3")
    try:
        before, _, port = proxy.url.removesuffix("/vhost?heartbeat=3").rpartition(":")
        assert before == "amqp://me@127.0.0.1"

        with socket.create_connection(("127.0.0.1", int(port)), 5) as connection:
            assert _ask(connection) == b"hello\n"
            proxy.cut()
            with contextlib.suppress(ConnectionError):
                assert _ask(connection) == b""
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", int(port)), 5) as connection:
            assert _ask(connection) == b""
        proxy.restore()
        with socket.create_connection(("127.0.0.1", int(port)), 5) as connection:
            assert _ask(connection) == b"hello\n"
    finally:
        proxy.close()


def _ask(connection: socket.socket) -> bytes:
    connection.sendall(b"hello\n")
    return connection.recv(100)
