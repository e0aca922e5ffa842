"""The registry client over TLS: a real server on loopback that wants to see a certificate of ours."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from outboxkit.errors import RegistryUnavailable
from outboxkit.registries.confluent import ConfluentRegistry, RegistryLogin
from tests.servers.certificates import Authority


@dataclass
class Server:
    """What the server was asked, and by whom."""

    url: str = ""
    seen: list[tuple[str, str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    server_facts: Server

    def do_GET(self) -> None:
        certificate = self.connection.getpeercert()
        ((_, name),) = certificate["subject"][0]
        self.server_facts.seen.append((name, self.path, self.headers.get("Authorization", "")))
        body = json.dumps({"schema": '"int"'}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Listening(ThreadingHTTPServer):
    def __init__(self, tls: ssl.SSLContext, facts: Server) -> None:
        self.tls = tls
        super().__init__(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_facts": facts}))

    def finish_request(self, request: object, client_address: object) -> None:  # in the thread of the connection
        try:
            wrapped = self.tls.wrap_socket(request, server_side=True)  # type: ignore[arg-type]
        except OSError:
            return  # the handshake failed: that is what most of these tests are about
        with wrapped:
            super().finish_request(wrapped, client_address)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def address() -> str:
    """What the server's certificate is for."""
    return "127.0.0.1"


@pytest.fixture
def server(authority: Authority, address: str) -> Iterator[Server]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.file))
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_cert_chain(authority.issue("registry", address))
    facts = Server()
    listening = _Listening(tls, facts)
    facts.url = f"https://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield facts
    listening.shutdown()
    listening.server_close()
    thread.join()


def _client(server: Server, trusted: Authority | None, certificate: Path | None) -> ConfluentRegistry:
    tls = ssl.create_default_context(cafile=str(trusted.file) if trusted else None)
    if certificate is not None:
        tls.load_cert_chain(certificate)
    return ConfluentRegistry(server.url, tls=tls, login=RegistryLogin(token="secret"), sleep=lambda _: None)


def test_a_registry_that_wants_a_client_certificate_gets_ours(server: Server, authority: Authority) -> None:
    registry = _client(server, authority, authority.issue("billing"))

    assert registry.resolve("1") == '"int"'

    assert server.seen == [("billing", "/schemas/ids/1", "Bearer secret")]


def test_without_a_certificate_the_registry_cannot_be_reached(server: Server, authority: Authority) -> None:
    with pytest.raises(RegistryUnavailable, match=r"https://127\.0\.0\.1 cannot be reached"):
        _client(server, authority, None).resolve("1")

    assert server.seen == []


def test_a_certificate_of_another_authority_is_refused(server: Server, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")

    with pytest.raises(RegistryUnavailable, match="cannot be reached"):
        _client(server, authority, stranger.issue("billing")).resolve("1")

    assert server.seen == []


@pytest.mark.parametrize("knows_strangers", [True, False])
def test_a_registry_that_we_do_not_trust_is_told_nothing(
    server: Server, authority: Authority, tmp_path: Path, *, knows_strangers: bool
) -> None:
    trusted = Authority(tmp_path, "stranger") if knows_strangers else None

    with pytest.raises(RegistryUnavailable, match="SSLCertVerificationError"):
        _client(server, trusted, authority.issue("billing")).resolve("1")

    assert server.seen == []


@pytest.mark.parametrize("address", ["127.0.0.2"])
def test_a_registry_under_another_address_is_told_nothing(server: Server, authority: Authority, address: str) -> None:
    with pytest.raises(RegistryUnavailable, match="SSLCertVerificationError"):
        _client(server, authority, authority.issue("billing")).resolve("1")

    assert server.seen == []
