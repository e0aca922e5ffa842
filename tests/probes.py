"""Probes as an orchestrator asks them: a connection for each question."""

from __future__ import annotations

from http.client import HTTPConnection

from tests.deadlines import DEADLINE

__all__ = ["ask"]


def ask(port: int, path: str) -> tuple[int, str]:
    """Returns the status and the body of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
