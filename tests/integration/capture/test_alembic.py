"""The ways in which applications make tables: `create_all`, Alembic, scripts; and suites that empty them."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, inspect, text
from sqlalchemy.orm import Session

from outboxkit import migrations, outbox_tables, publish, tables
from outboxkit.errors import ConfigurationError
from tests.integration.capture.described import described
from tests.integration.capture.model import Noted

pytestmark = pytest.mark.sqlalchemy_lines


@pytest.fixture(params=["postgresql", "sqlite"])
def empty(request: pytest.FixtureRequest, database_url: str, tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(database_url if request.param == "postgresql" else f"sqlite:///{tmp_path}/empty.sqlite")
    yield engine
    engine.dispose()


def joined(schema: str | None = None) -> MetaData:
    """An application's metadata with a table of its own and ours."""
    metadata = MetaData(schema=schema)
    Table("orders", metadata, Column("id", Integer, primary_key=True))
    outbox_tables(metadata)
    return metadata


def written(engine: Engine) -> int:
    """Publishes one message as an application does; tells how many rows there are."""
    with Session(engine) as session:
        publish(session, Noted("x"), topic="notes", key="k")
        session.commit()
        found: int = session.scalar(text("SELECT count(*) FROM outbox_messages"))
        return found


# --- create_all --------------------------------------------------------------------------------------------------


def _functions(engine: Engine) -> list[Any]:
    if engine.dialect.name == "sqlite":
        return []
    with engine.connect() as connection:
        named = text("SELECT proname, prosrc, proconfig FROM pg_proc WHERE proname LIKE 'outboxkit%' ORDER BY 1")
        return [tuple(row) for row in connection.execute(named)]


def test_create_all_makes_what_init_makes(empty: Engine) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
    expected, functions = described(empty), _functions(empty)
    with empty.begin() as connection:
        tables.METADATA.drop_all(connection)

    metadata = joined()
    for _ in range(2):
        metadata.create_all(empty)

    found = described(empty)
    found.pop("orders")
    assert found == expected
    assert _functions(empty) == functions
    with empty.connect() as connection:
        assert migrations.check(connection) == []
        assert migrations.current(connection) == tables.VERSION
        assert connection.execute(text("SELECT version, shards FROM outbox_version")).all() == [(tables.VERSION, 64)]
        assert connection.scalar(text("SELECT count(*) FROM outbox_shards")) == 64
    assert written(empty) == 1


def test_tables_join_a_metadata_that_has_a_schema_where_the_search_path_says(database_url: str) -> None:
    engine = create_engine(database_url)
    metadata = joined("shop")
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA shop"))
        metadata.create_all(connection)

    assert written(engine) == 1
    assert inspect(engine).get_table_names("shop") == ["orders"]
    assert metadata.schema == "shop"
    assert {table.schema for table in metadata.tables.values() if table.name != "orders"} == {None}
    with engine.connect() as connection:
        assert migrations.check(connection) == []
    engine.dispose()


# --- suites that empty every table -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["delete", "truncate"])
def test_a_suite_that_empties_every_table_goes_on(empty: Engine, how: str) -> None:
    if (how, empty.dialect.name) == ("truncate", "sqlite"):
        how = "delete"  # SQLite has no other
    metadata = joined()
    metadata.create_all(empty)
    for _ in range(3):
        assert written(empty) == 1
        with empty.begin() as connection:
            if how == "delete":
                for table in reversed(metadata.sorted_tables):
                    connection.execute(table.delete())
            else:
                names = ", ".join(table.name for table in metadata.sorted_tables)
                connection.exec_driver_sql("TRUNCATE " + names)

    other = create_engine(empty.url)
    assert written(other) == 1, "an engine that looks for the first time"
    with other.connect() as connection:
        assert migrations.current(connection) == tables.VERSION
        assert migrations.check(connection) == []
        shard: int = connection.scalar(text("SELECT shard FROM outbox_messages"))
        assert 0 <= shard < 64
        if other.dialect.name == "postgresql":
            connection.execute(text("SELECT outboxkit_emit('notes', 'order.noted', '{}')"))
    other.dispose()


def test_an_emptied_version_1_is_still_version_1(empty: Engine) -> None:
    script = Path(__file__).with_name(f"version_1.{empty.dialect.name}.sql").read_text("utf-8")
    driver: Any = empty.raw_connection()
    run = driver.driver_connection.executescript if empty.dialect.name == "sqlite" else driver.driver_connection.execute
    run(script)
    driver.commit()
    driver.close()
    with empty.begin() as connection:
        connection.execute(tables.outbox_version.delete())

        assert migrations.current(connection) == 1
        migrations.upgrade(connection)
        assert migrations.current(connection) == tables.VERSION


# --- Alembic, as its own tutorial says ---------------------------------------------------------------------------

ENVIRONMENT = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table
from outboxkit import outbox_tables

metadata = MetaData()
Table("orders", metadata, Column("id", Integer, primary_key=True))
outbox_tables(metadata)

if context.is_offline_mode():
    context.configure(dialect_name=context.config.attributes["dialect"], target_metadata=metadata, literal_binds=True,
                      output_buffer=context.config.attributes["buffer"])
else:
    context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
"""
TEMPLATE = '''"""${message}"""
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade():
    ${upgrades if upgrades else "pass"}


def downgrade():
    ${downgrades if downgrades else "pass"}
'''


@pytest.fixture
def alembic(tmp_path: Path) -> Config:
    folder = tmp_path / "alembic"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENVIRONMENT)
    (folder / "script.py.mako").write_text(TEMPLATE)
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    return config


def run(config: Config, engine: Engine, verb: str, *arguments: Any, **options: Any) -> None:
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        getattr(command, verb)(config, *arguments, **options)


def test_a_revision_that_alembic_writes_runs_checks_and_goes_back(
    empty: Engine, alembic: Config, tmp_path: Path
) -> None:
    run(alembic, empty, "revision", "the outbox", autogenerate=True)
    (script,) = (tmp_path / "alembic" / "versions").glob("*.py")
    assert "outboxkit." not in script.read_text(), "a type of ours needs an import"

    run(alembic, empty, "upgrade", "head")
    run(alembic, empty, "check")
    assert written(empty) == 1
    with empty.connect() as connection:
        assert migrations.check(connection) == []
        assert migrations.current(connection) == tables.VERSION
    run(alembic, empty, "downgrade", "base")
    assert inspect(empty).get_table_names() == ["alembic_version"]
    run(alembic, empty, "upgrade", "head")
    assert written(empty) == 1


def test_alembic_after_create_all_and_after_init_finds_nothing_to_do(empty: Engine, alembic: Config) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
        Table("orders", MetaData(), Column("id", Integer, primary_key=True)).create(connection)
    run(alembic, empty, "check")
    with empty.begin() as connection:
        joined().drop_all(connection)
        joined().create_all(connection)
    run(alembic, empty, "check")


def offline(alembic: Config, engine: Engine) -> None:
    """Writes the script of all revisions and runs it on the database, as its administrator does."""
    buffer = io.StringIO()
    alembic.attributes |= {"buffer": buffer, "dialect": engine.dialect.name}
    command.upgrade(alembic, "head", sql=True)
    driver: Any = engine.raw_connection()
    sqlite = engine.dialect.name == "sqlite"
    (driver.driver_connection.executescript if sqlite else driver.driver_connection.execute)(buffer.getvalue())
    driver.commit()
    driver.close()


def test_a_revision_becomes_a_script(empty: Engine, alembic: Config) -> None:
    run(alembic, empty, "revision", "the outbox", autogenerate=True)
    with empty.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")

    offline(alembic, empty)

    assert written(empty) == 1
    with empty.connect() as connection:
        assert migrations.check(connection) == []


BY_HAND = """
from alembic import op
from outboxkit import migrations
revision, down_revision = "1", None

def upgrade():
    migrations.upgrade(op.get_bind(){to})
"""


@pytest.mark.parametrize("script", [False, True], ids=["connected", "as a script"])
def test_a_revision_by_hand_makes_everything(empty: Engine, alembic: Config, tmp_path: Path, script: bool) -> None:  # noqa: FBT001
    (tmp_path / "alembic" / "versions" / "1_outbox.py").write_text(BY_HAND.format(to=""))

    if script:
        offline(alembic, empty)
    else:
        run(alembic, empty, "upgrade", "head")

    with empty.connect() as connection:
        assert migrations.check(connection) == []
        assert connection.scalar(text("SELECT count(*) FROM outbox_shards")) == 64
    assert written(empty) == 1


def test_a_script_of_a_step_between_versions_is_refused(empty: Engine, alembic: Config, tmp_path: Path) -> None:
    (tmp_path / "alembic" / "versions" / "1_outbox.py").write_text(BY_HAND.format(to=", to=2"))

    with pytest.raises(ConfigurationError, match="looks at the database"):
        offline(alembic, empty)


# --- tables that are not there -----------------------------------------------------------------------------------


def test_tables_that_are_missing_are_named_with_what_to_run(empty: Engine) -> None:
    with Session(empty) as session:
        publish(session, Noted("x"), topic="notes")
        with pytest.raises(ConfigurationError, match="outboxkit init"):
            session.commit()


def test_who_imports_the_tables_imports_no_alembic(tmp_path: Path) -> None:
    code = "import sys, outboxkit.tables; print([name for name in sys.modules if name.startswith('alembic')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
