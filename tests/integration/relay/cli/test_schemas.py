"""Schemas other than the default: writers, relay and commands look in the same place, or somebody says a line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, MetaData, create_engine, inspect, make_url, text
from sqlalchemy.orm import Session

from outboxkit import event, outbox_tables, publish
from outboxkit_relay import load
from outboxkit_relay.daemon.build import build_relay
from tests.unit.relay.cli.conftest import Outboxkit

ODD = 'Sh"op \\1'


@event("thing.done")
@dataclass(frozen=True)
class Done:
    number: int


@pytest.fixture(params=["shop", ODD], ids=["shop", "odd"])
def schema(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OUTBOXKIT_DATABASE_SCHEMA", request.param)
    return str(request.param)


@pytest.fixture
def database(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", empty_database_url)
    return empty_database_url


@pytest.fixture
def admin(database: str) -> Iterator[Engine]:
    engine = create_engine(database)
    yield engine
    engine.dispose()


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def write(url: str, schema: str) -> None:
    """One message by an application whose login looks in a schema."""
    path = quoted(schema).replace("\\", "\\\\").replace(" ", "\\ ")
    engine = create_engine(url, connect_args={"options": f"-csearch_path={path}"})
    with Session(engine) as session:
        publish(session, Done(1), topic="things", key="k")
        session.commit()
    engine.dispose()


def left(admin: Engine, schema: str) -> int:
    with admin.connect() as connection:
        found: int = connection.exec_driver_sql(f"SELECT count(*) FROM {quoted(schema)}.outbox_messages").scalar_one()
        return found


def publish_all() -> None:

    with build_relay(load(), once=True) as relay:
        relay.run(threading.Event())


def test_the_setting_is_followed_by_commands_and_relay(
    outboxkit: Outboxkit, admin: Engine, database: str, schema: str
) -> None:
    assert outboxkit("status").code == 2
    assert outboxkit("init").code == 0
    assert outboxkit("db", "check").code == 0
    assert "outbox_messages" in inspect(admin).get_table_names(schema)
    assert inspect(admin).get_table_names("public") == []
    write(database, schema)

    shown = json.loads(outboxkit("status", "--json").out)
    assert (shown["schema"], shown["topics"][0]["pending"]) == (schema, 1)
    assert schema.split(maxsplit=1)[0] in outboxkit("status").out
    publish_all()
    assert left(admin, schema) == 0
    assert outboxkit("status").code == 0


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("spelling", ["file", "variable"])
def test_the_setting_may_stand_in_a_section(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    if spelling == "file":
        Path("outboxkit.toml").write_text('[database]\nschema = "shop"\n')
    else:
        monkeypatch.setenv("OUTBOXKIT_DATABASE__SCHEMA", "shop")

    assert load().database_schema == "shop"
    assert outboxkit("db", "upgrade").code == 0
    assert json.loads(outboxkit("status", "--json").out)["schema"] == "shop"


def test_the_options_of_the_url_are_kept(
    outboxkit: Outboxkit, admin: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with admin.begin() as connection:
        connection.execute(text("CREATE SCHEMA shop"))
    url = make_url(database).update_query_dict({"options": "-csearch_path=shop", "application_name": "mine"})
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", url.render_as_string(hide_password=False))

    assert outboxkit("init").code == 0
    assert "outbox_messages" in inspect(admin).get_table_names("shop")
    write(database, "shop")
    publish_all()
    assert left(admin, "shop") == 0
    with build_relay(load()) as relay, relay.engine.connect() as connection:
        for name, value in (("search_path", "shop"), ("application_name", "mine"), ("timezone", "UTC")):
            assert connection.exec_driver_sql(f"SHOW {name}").scalar_one() == value
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() != "0"


def test_the_login_s_search_path_is_followed(outboxkit: Outboxkit, admin: Engine, database: str) -> None:
    name = make_url(database).database
    with admin.begin() as connection:
        connection.execute(text("CREATE SCHEMA shop"))
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET search_path = shop')

    assert outboxkit("init").code == 0
    write(database, "shop")
    assert json.loads(outboxkit("status", "--json").out)["schema"] == "shop"
    publish_all()
    assert left(admin, "shop") == 0


def test_a_tenant_of_a_translate_map_has_a_relay_by_the_setting(
    admin: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = MetaData()
    outbox_tables(metadata)
    with admin.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
        metadata.create_all(connection.execution_options(schema_translate_map={None: "tenant"}))
    with Session(admin.execution_options(schema_translate_map={None: "tenant"})) as session:
        publish(session, Done(1), topic="things")
        session.commit()
        session.execute(text("SELECT tenant.outboxkit_emit('things', 'thing.done', '{}')"))
        session.commit()
    assert left(admin, "tenant") == 2

    monkeypatch.setenv("OUTBOXKIT_DATABASE_SCHEMA", "tenant")
    publish_all()

    assert left(admin, "tenant") == 0


def test_tables_that_are_elsewhere_are_named(outboxkit: Outboxkit, database: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: E501  # fmt: skip
    monkeypatch.setenv("OUTBOXKIT_DATABASE_SCHEMA", "shop")
    outboxkit("init")
    monkeypatch.delenv("OUTBOXKIT_DATABASE_SCHEMA")

    done = outboxkit("status")
    assert done.code == 2
    assert "missing in the schema public" in done.err
    assert "they are in shop: set database_schema" in done.err
    assert "there are outbox tables in the schema shop, too" in outboxkit("init").out
    assert database


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OUTBOXKIT_DATABASE_DIRECT_URL": "postgresql+psycopg://h/d"}, "cannot be set through a pooler"),
        ({"OUTBOXKIT_DATABASE_URL": "sqlite:///app.db"}, "SQLite has no schemas"),
        ({"OUTBOXKIT_DATABASE_URL": "postgresql+psycopg://h/d?options=-csearch_path%3Da"}, "give one"),
    ],
    ids=["pooler", "sqlite", "twice"],
)
def test_what_cannot_be_followed_is_refused_with_a_line(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("OUTBOXKIT_DATABASE_SCHEMA", "shop")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    done = outboxkit("status")

    assert done.code == 2
    assert words in done.err


def test_a_misspelt_section_is_refused(outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOXKIT_DATABASE__SHEMA", "shop")

    done = outboxkit("status")

    assert done.code == 2
    assert "is not a setting" in done.err
