"""The plugin as users turn it on: in a program of its own, with warnings as errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = 'pytest_plugins = ["outboxkit.testing.plugin"]\n'
TEST = """
import sys
from outboxkit import publish

def test_without_tables_of_the_application(outbox_session, outbox):
    publish(outbox_session, {"n": 1}, topic="t", type="a.b")
    outbox_session.commit()
    outbox.assert_emitted("a.b", n=1)

def test_every_fixture_is_there(request):
    for name in ("harness", "outbox_async_sessions", "outbox_engine", "outbox_metadata", "schema_gate"):
        request.getfixturevalue(name)

def test_that_fails(outbox):
    outbox.assert_emitted("a.b", n=1)
"""


def test_it_works_in_a_program_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    options = ["-p", "no:cacheprovider", "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "no a.b with n=1 was emitted; the outbox is empty" in done.stdout
    assert "def assert_emitted" not in done.stdout  # the traceback ends in the user's own line


def test_it_asks_for_no_optional_package() -> None:
    optional = [
        "aiosqlite",
        "aio_pika",
        "aiormq",
        "click",
        "confluent_kafka",
        "fastavro",
        "psycopg",
        "pydantic",
        "rich",
        "structlog",
    ]
    program = f"import sys, outboxkit.testing.plugin; print([name for name in {optional} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
