"""A SQLite database with its tables, as a copy of one that was made once: tables cost a hundred statements."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, create_engine

__all__ = ["copied"]


@functools.cache
def _made(make: Callable[[Connection], object]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="outboxkit-test-") as folder:
        file = Path(folder) / "made.db"
        engine = create_engine(f"sqlite:///{file}")
        with engine.begin() as connection:
            make(connection)
        engine.dispose()
        return file.read_bytes()


def copied(file: Path, make: Callable[[Connection], object]) -> str:
    """Puts a database there, with what `make` makes in an empty one; returns its URL."""
    file.write_bytes(_made(make))
    return f"sqlite:///{file}"
