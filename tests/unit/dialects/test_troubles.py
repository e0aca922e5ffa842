"""What an error of the database is about: the work, the row, the database, or tables that are not there."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from outboxkit.dialects import DatabaseTrouble, is_about_the_row, is_missing_table, open_engine, trouble_of
from outboxkit.errors import ConfigurationError


def answered(state: str) -> DBAPIError:
    """An error as psycopg raises it for this SQLSTATE."""
    return DBAPIError.instance("SELECT 1", {}, psycopg.errors.lookup(state)("no"), psycopg.Error)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("state", "trouble"),
    [
        ("40001", DatabaseTrouble.BUSY),
        ("40P01", DatabaseTrouble.BUSY),
        ("55P03", DatabaseTrouble.BUSY),
        ("57P01", DatabaseTrouble.DOWN),
        ("57P03", DatabaseTrouble.DOWN),
        ("53300", DatabaseTrouble.DOWN),
        ("25006", DatabaseTrouble.DOWN),
        ("23505", None),
        ("22003", None),
        ("42P01", None),
    ],
)
def test_the_state_tells_what_is_wrong_with_the_database(state: str, trouble: DatabaseTrouble | None) -> None:
    assert trouble_of(answered(state)) is trouble


@pytest.mark.parametrize("state", ["22003", "22021", "23514", "23505", "54000"])
def test_refused_values_are_about_the_row_and_never_an_outage(state: str) -> None:
    assert is_about_the_row(answered(state))
    assert trouble_of(answered(state)) is None


@pytest.mark.parametrize("state", ["42P01", "42703", "3F000"])
def test_a_table_a_column_or_a_schema_that_is_not_there(state: str) -> None:
    assert is_missing_table(answered(state))
    assert not is_about_the_row(answered(state))


def test_a_file_that_is_busy_gone_or_without_the_table(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/one.sqlite"
    engine = create_engine(url, connect_args={"timeout": 0})
    with engine.connect() as first, engine.connect() as second:
        first.exec_driver_sql("CREATE TABLE t (n INTEGER UNIQUE CHECK (n > 0))")
        first.exec_driver_sql("INSERT INTO t VALUES (1)")
        first.commit()
        first.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError) as busy:
            second.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError) as missing:
            second.execute(text("SELECT 1 FROM nowhere"))
        with pytest.raises(IntegrityError) as refused:
            first.execute(text("INSERT INTO t VALUES (0)"))
    with pytest.raises(OperationalError) as gone:
        create_engine(f"sqlite:///{tmp_path}/nowhere/two.sqlite").connect()
    engine.dispose()

    assert trouble_of(busy.value) is DatabaseTrouble.BUSY
    assert trouble_of(gone.value) is DatabaseTrouble.DOWN
    assert is_missing_table(missing.value)
    assert is_about_the_row(refused.value)
    assert [trouble_of(error.value) for error in (missing, refused)] == [None, None]
    assert [is_missing_table(error.value) for error in (busy, refused, gone)] == [False, False, False]


def test_a_full_pool_is_busy_and_everything_else_is_no_trouble_of_the_database() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(PoolTimeout) as full:
        engine.connect()
    engine.dispose()

    assert trouble_of(full.value) is DatabaseTrouble.BUSY
    assert trouble_of(ValueError("mine")) is None
    assert not is_about_the_row(ValueError("mine"))
    assert not is_missing_table(ValueError("mine"))


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("postgres://me@there/x", "did you mean postgresql?"),
        ("mysql://me@there/x", "expected one of postgresql, sqlite"),
    ],
)
def test_a_database_that_is_not_supported_is_told_with_what_is_meant(url: str, advice: str) -> None:
    with pytest.raises(ConfigurationError, match=advice.replace("?", r"\?")):
        open_engine(url, patience=timedelta(seconds=1))
