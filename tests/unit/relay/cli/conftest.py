"""A command line in this process: its own folder, database, environment and logging."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay import cli, redaction
from tests import canaries
from tests.sqlite_template import copied

__all__ = ["Done", "Outboxkit"]


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, data, talk."""

    code: int
    out: str
    err: str


Outboxkit = Callable[..., Done]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OUTBOXKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", f"sqlite:///{tmp_path}/app.db")
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL", "memory://unit")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    redaction._known.clear()


@pytest.fixture
def outboxkit(capfd: pytest.CaptureFixture[str]) -> Outboxkit:
    """Runs ``outboxkit …`` and tells what it left."""

    def run(*arguments: str) -> Done:
        code = cli.run(arguments)
        out, err = capfd.readouterr()
        assert not canaries.found_in(out, err)
        return Done(code, out, err)

    return run


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """The same database, with its tables."""
    engine = open_engine(copied(tmp_path / "app.db", migrations.upgrade), patience=timedelta(seconds=5))
    yield engine
    engine.dispose()
