"""The registry client against a server that is down, slow, wrong, or an enemy (loopback, scripted answers)."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outboxkit.errors import ConfigurationError, RegistryUnavailable, SchemaError, SchemaNotFound
from outboxkit.registries.confluent import MAX_ANSWER, MAX_SEARCHED, ConfluentRegistry, RegistryLogin

INT = {"schema": '"int"', "id": 1, "version": 1}
RECORD = {"schema": '{"type":"record","name":"R","fields":[]}', "id": 1, "version": 1}

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class _Script:
    """What the server says to the next requests, and what it was asked."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def say(self, path: str, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers.setdefault(path, []).append((status, headers, data))

    def next(self, path: str) -> Answer:
        queue = self.answers.get(path)
        if not queue:
            return 404, {}, b'{"error_code": 40403, "message": "Schema not found"}'
        return queue.pop(0) if len(queue) > 1 else queue[0]

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    script: _Script

    def do_GET(self) -> None:
        self.script.asked.append((self.command, self.path, dict(self.headers)))
        status, headers, body = self.script.next(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def script() -> Iterator[_Script]:
    made = _Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"script": made}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class _Clock:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def client(script: _Script, clock: _Clock) -> Callable[..., ConfluentRegistry]:
    def build(**options: Any) -> ConfluentRegistry:
        url = options.pop("url", script.url)
        return ConfluentRegistry(url, clock=clock, sleep=clock.sleep, timeout=timedelta(seconds=2), **options)

    return build


def test_an_id_is_asked_for_once(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    script.say("/schemas/ids/1", INT)
    registry = client()

    assert [registry.resolve("1") for _ in range(5)] == ['"int"'] * 5

    assert script.paths == ["/schemas/ids/1"]


def test_what_was_seen_works_while_the_registry_is_down_even_after_a_restart(
    script: _Script, client: Callable[..., ConfluentRegistry], tmp_path: Path
) -> None:
    script.say("/schemas/ids/1", INT)
    client(cache=tmp_path).resolve("1")

    after_restart = client(cache=tmp_path, url="http://127.0.0.1:1")

    assert after_restart.resolve("1") == '"int"'
    assert after_restart.resolve("8f5c393f1ad57572") == '"int"'


def test_a_registry_that_is_down_is_no_missing_schema(client: Callable[..., ConfluentRegistry], clock: _Clock) -> None:
    registry = client(url="http://127.0.0.1:1")

    with pytest.raises(RegistryUnavailable, match="cannot be reached"):
        registry.resolve("1")

    assert len(clock.slept) == 2


def test_after_a_failure_nobody_waits_for_the_time_out_again(
    script: _Script, client: Callable[..., ConfluentRegistry], clock: _Clock
) -> None:
    script.say("/schemas/ids/1", {}, status=503)
    registry = client()
    with pytest.raises(RegistryUnavailable, match="HTTP 503"):
        registry.resolve("1")
    asked = len(script.asked)

    with pytest.raises(RegistryUnavailable, match="a moment ago"):
        registry.resolve("2")

    assert len(script.asked) == asked
    clock.now += 1.1
    with pytest.raises(SchemaNotFound):
        registry.resolve("2")


def test_a_server_error_is_tried_again(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    script.say("/schemas/ids/1", {}, status=500)
    script.say("/schemas/ids/1", INT)

    assert client().resolve("1") == '"int"'


def test_an_unknown_id_is_asked_again_only_after_a_while(
    script: _Script, client: Callable[..., ConfluentRegistry], clock: _Clock
) -> None:
    registry = client()
    for _ in range(3):
        with pytest.raises(SchemaNotFound):
            registry.resolve("7")
    assert script.paths == ["/schemas/ids/7"]

    script.say("/schemas/ids/7", INT)
    clock.now += 31

    assert registry.resolve("7") == '"int"'


def test_an_id_that_changes_its_meaning_is_refused(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    script.say("/schemas/ids/1", INT)
    script.say("/subjects/s/versions", [1])
    script.say("/subjects/s/versions/1", RECORD)
    registry = client()
    registry.resolve("1")

    with pytest.raises(SchemaError, match="not the one that it was before"):
        registry.history("s")

    assert registry.resolve("1") == '"int"'


def test_an_id_that_changed_while_we_were_away_is_refused(
    script: _Script, client: Callable[..., ConfluentRegistry], tmp_path: Path
) -> None:
    script.say("/schemas/ids/1", INT)
    client(cache=tmp_path).resolve("1")
    script.say("/subjects/s/versions", [1])
    script.say("/subjects/s/versions/1", RECORD)

    with pytest.raises(SchemaError, match="not the one that it was before"):
        client(cache=tmp_path).history("s")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>proxy</html>", "not answer in JSON"),
        (b"[" * 100_000, "not answer in JSON"),
        ({"id": 1}, "holds no schema"),
        ({"schema": "{"}, "not JSON"),
        ({"schema": '"no.such.Type"'}, "not defined"),
        ({"schema": "message M {}", "schemaType": "PROTOBUF"}, "not Avro"),
        (b'"' + b"x" * (MAX_ANSWER + 10) + b'"', "longer than"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_schema_error(
    script: _Script, client: Callable[..., ConfluentRegistry], body: object, why: str
) -> None:
    script.say("/schemas/ids/1", body)

    with pytest.raises(SchemaError, match=why):
        client().resolve("1")


def test_references_in_a_circle_come_to_an_end(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    itself = {**RECORD, "references": [{"name": "R", "subject": "s", "version": 1}] * 3}
    script.say("/schemas/ids/1", itself)
    script.say("/subjects/s/versions/1", itself)

    with pytest.raises(SchemaError, match="refers to more than"):
        client().resolve("1")

    assert len(script.asked) < 1_000


def test_a_redirect_is_not_followed(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    script.say("/schemas/ids/1", {}, status=302, Location=f"{script.url}/schemas/ids/2")
    script.say("/schemas/ids/2", INT)

    with pytest.raises(SchemaError, match="redirects"):
        client().resolve("1")

    assert script.paths == ["/schemas/ids/1"]


def test_a_refused_login_is_a_matter_of_configuration(
    script: _Script, client: Callable[..., ConfluentRegistry]
) -> None:
    script.say("/schemas/ids/1", {}, status=401)

    with pytest.raises(ConfigurationError, match="refuses our login") as caught:
        client(login=RegistryLogin(user="me", password="hidden-word")).resolve("1")

    assert "hidden-word" not in str(caught.value)
    assert script.asked[0][2]["Authorization"] == "Basic bWU6aGlkZGVuLXdvcmQ="


def test_a_token_and_a_login_in_the_url_are_sent(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    script.say("/schemas/ids/1", INT)

    client(login=RegistryLogin(token="abc")).resolve("1")
    client(url=script.url.replace("://", "://me:p%40ss@")).resolve("1")

    assert [headers["Authorization"] for _, _, headers in script.asked] == ["Bearer abc", "Basic bWU6cEBzcw=="]


def test_no_secret_is_shown(script: _Script) -> None:
    login = RegistryLogin(user="me", password="hidden-word", token="hidden-token")

    assert "hidden" not in repr(login)
    assert "hidden" not in repr(ConfluentRegistry("https://me:hidden@registry.invalid"))


def test_a_hostile_name_does_not_leave_the_path(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    for name in ("../subjects", "1?deleted=true", "a/b", "%2e%2e"):
        with pytest.raises(SchemaNotFound):
            client().resolve(name)

    assert all(path.startswith("/schemas/guids/") and "/" not in path[15:] for path in script.paths)
    assert not [path for path in script.paths if "?" in path]


def test_a_dribbling_server_is_cut_off(
    script: _Script, clock: _Clock, client: Callable[..., ConfluentRegistry]
) -> None:
    class _Slow(_Clock):
        def __call__(self) -> float:
            self.now += 1.5
            return self.now

    script.say("/schemas/ids/1", INT)
    slow = _Slow()
    registry = ConfluentRegistry(script.url, clock=slow, sleep=slow.sleep, timeout=timedelta(seconds=1))

    with pytest.raises(RegistryUnavailable, match="too slowly"):
        registry.resolve("1")


def test_an_answer_has_one_deadline_however_its_head_dribbles(clock: _Clock) -> None:
    """A line of the head now and then keeps every single read in time."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def dribble() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for number in range(600):
                    if stop.wait(0.1):
                        return
                    connection.sendall(b"X-Line-%d: x\r\n" % number)

        threads = [threading.Thread(target=dribble) for _ in range(3)]  # as many as there are attempts
        for thread in threads:
            thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        registry = ConfluentRegistry(url, sleep=clock.sleep, timeout=timedelta(milliseconds=300))
        with pytest.raises(RegistryUnavailable):
            registry.resolve("1")
        stop.set()  # they would go on for a minute each
        for thread in threads:
            thread.join()


def test_a_search_for_a_fingerprint_has_a_budget(script: _Script, client: Callable[..., ConfluentRegistry]) -> None:
    names = [f"s{number:03}" for number in range(MAX_SEARCHED * 2)]
    script.say("/subjects", names)
    for name in names:
        script.say(f"/subjects/{name}/versions", [1])
        script.say(f"/subjects/{name}/versions/1", RECORD)

    registry = client()
    for _ in range(3):
        with pytest.raises(SchemaNotFound, match=r"finds no fingerprints|a moment ago"):
            registry.resolve("0123456789abcdef")

    assert len(script.asked) <= MAX_SEARCHED + 2
