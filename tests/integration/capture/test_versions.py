"""What a producer writes with: declared at its start, held against releases, rolled out to a share of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outboxkit import Outbox, OutboxMixin, migrations, publish, schema_store, tables
from outboxkit.avro import Mode, fingerprint
from outboxkit.avro.model.parse import parse
from outboxkit.capture.declare import declare
from outboxkit.errors import (
    CaptureError,
    ConfigurationError,
    EncodeError,
    IncompatibleSchema,
    RegistryUnavailable,
    SchemaNotFound,
)
from outboxkit.events import Rollout, event, event_type
from outboxkit.migrations.roles import create_roles
from outboxkit.registries.confluent import ConfluentRegistry
from outboxkit.registries.memory import MemoryRegistry
from outboxkit.testing.emitted import EmittedMessages
from tests.database_roles import drop_roles
from tests.integration.capture.model import Noted
from tests.integration.capture.world import CaptureDatabase

NAME = "shop.Shipped"


def _record(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": NAME, "fields": [{"name": "order_id", "type": "long"}, *fields]}


V1 = _record()
V2 = _record({"name": "carrier", "type": "string", "default": "post"})
BROKEN = _record({"name": "carrier", "type": "string"})
DIGESTS = [fingerprint(parse(schema)).hex() for schema in (V1, V2)]


@event("shipped", version=1, schema=V1)
@dataclass(frozen=True)
class ShippedV1:
    order_id: int


@event("shipped", version=2, schema=V2, rollout=Rollout(ShippedV1, share=0.25))
@dataclass(frozen=True)
class Shipped:
    order_id: int
    carrier: str


@event("shipped", version=3, schema=BROKEN)
@dataclass(frozen=True)
class Careless:
    order_id: int
    carrier: str


class Base(DeclarativeBase):
    pass


class Parcel(OutboxMixin, Base):
    __tablename__ = "parcels"
    __outbox__ = Outbox(topic="parcels", key="id")
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def registry() -> MemoryRegistry:
    made = MemoryRegistry(Mode.FULL_TRANSITIVE)
    made.register(NAME, str(V1).replace("'", '"'))
    return made


def _declare(world: CaptureDatabase, *events: type, registry: Any) -> None:
    with world.sync_engine.begin() as connection:
        declare(connection, events, registry=registry)


def _known(world: CaptureDatabase) -> set[tuple[str, str]]:
    with world.observer.connect() as connection:
        rows = connection.execute(tables.outbox_schemas.select())
        return {(row.fingerprint, row.type) for row in rows if row.role == "writer"}


# --- at the start ------------------------------------------------------------------------------------------------


def test_what_is_declared_is_kept_for_those_who_read_later(
    sync_world: CaptureDatabase, registry: MemoryRegistry
) -> None:
    _declare(sync_world, Shipped, Noted, registry=registry)
    _declare(sync_world, Shipped, Noted, registry=registry)

    assert _known(sync_world) == {(digest, "shipped") for digest in DIGESTS}, "the rollout's previous version as well"
    with sync_world.observer.connect() as connection:
        assert parse(schema_store.schema_text(connection, DIGESTS[1])).source == V2


def test_a_producer_that_would_break_the_mode_does_not_start(
    sync_world: CaptureDatabase, registry: MemoryRegistry
) -> None:
    with pytest.raises(IncompatibleSchema, match=f"{NAME} may not change so: READER_FIELD_MISSING_DEFAULT_VALUE"):
        _declare(sync_world, ShippedV1, Careless, registry=registry)

    assert _known(sync_world) == set()


def test_the_subject_is_the_producers_choice(sync_world: CaptureDatabase, registry: MemoryRegistry) -> None:
    registry.modes["parcels-value"] = Mode.NONE
    with sync_world.sync_engine.begin() as connection:
        declare(connection, [Careless], registry=registry, subject=lambda _: "parcels-value")

    assert _known(sync_world) == {(fingerprint(parse(BROKEN)).hex(), "shipped")}


def test_while_the_registry_is_away_only_what_was_declared_before_starts(
    sync_world: CaptureDatabase, registry: MemoryRegistry
) -> None:
    away = ConfluentRegistry("http://127.0.0.1:1", sleep=lambda _: None)
    with pytest.raises(RegistryUnavailable):
        _declare(sync_world, ShippedV1, registry=away)

    _declare(sync_world, ShippedV1, registry=registry)

    _declare(sync_world, ShippedV1, registry=away)
    with pytest.raises(RegistryUnavailable):
        _declare(sync_world, Shipped, registry=away)


async def test_an_async_engine_declares_in_one_line(async_world: CaptureDatabase, registry: MemoryRegistry) -> None:
    async with async_world.async_engine.begin() as connection:
        await connection.run_sync(declare, [ShippedV1], registry=registry)
    await async_world.async_engine.dispose()

    assert _known(async_world) == {(DIGESTS[0], "shipped")}


def test_a_row_that_somebody_forged_is_no_schema(sync_world: CaptureDatabase) -> None:
    row = {"fingerprint": DIGESTS[0], "role": "writer", "consumer": "", "type": "a", "text": '"bytes"'}
    with sync_world.sync_engine.begin() as connection:
        connection.execute(insert(tables.outbox_schemas).values(row))
        with pytest.raises(SchemaNotFound):
            schema_store.schema_text(connection, DIGESTS[0])
        connection.execute(insert(tables.outbox_schemas).values(row | {"type": "b", "text": str(V1).replace("'", '"')}))

        assert parse(schema_store.schema_text(connection, DIGESTS[0])).source == V1


# --- a share of the keys -----------------------------------------------------------------------------------------


def _shipped(world: CaptureDatabase, write: Callable[[Session], object]) -> list[Any]:
    def scenario(session: Session) -> None:
        write(session)
        session.commit()

    world.run(scenario)
    return world.rows()


def _all(keys: Iterable[int], what: type = Shipped, **options: Any) -> Callable[[Session], object]:
    return lambda session: [
        publish(session, what(key, "rail"), topic="parcels", **{"key": str(key)} | options) for key in keys
    ]


def test_a_share_of_the_keys_gets_the_new_version_and_every_key_stays_with_its_version(
    sync_world: CaptureDatabase,
) -> None:
    rows = _shipped(sync_world, lambda session: (_all(range(200))(session), _all(range(200))(session)))

    versions: dict[bytes, set[str]] = {}
    for row in rows:
        versions.setdefault(row.key, set()).add(row.schema_fingerprint)
    assert all(len(found) == 1 for found in versions.values())
    assert 25 <= sum(found == {DIGESTS[1]} for found in versions.values()) <= 75
    assert {found for one in versions.values() for found in one} == set(DIGESTS)


def test_both_versions_say_which_they_are_and_are_read_by_the_class(sync_world: CaptureDatabase) -> None:
    _shipped(sync_world, _all(range(50)))

    emitted = EmittedMessages(sync_world.observer)
    by_version = {message.dataschema: message for message in emitted.messages}
    assert set(by_version) == {"urn:outboxkit:shipped:1", "urn:outboxkit:shipped:2"}
    for message in by_version.values():
        key = int(message.key or b"")
        carrier = "rail" if message.dataschema.endswith("2") else "post"
        emitted.assert_emitted(Shipped, order_id=key, carrier=carrier, key=str(key))


def test_a_key_that_only_the_flush_knows_decides_as_well(sync_world: CaptureDatabase) -> None:
    Base.metadata.create_all(sync_world.observer)

    def write(session: Session) -> None:
        for _ in range(60):
            parcel = Parcel()
            parcel.emit(lambda parcel=parcel: Shipped(parcel.id, "rail"))
            parcel.emit(Shipped(0, "rail"))
            session.add(parcel)

    rows = _shipped(sync_world, write)
    Base.metadata.drop_all(sync_world.observer)

    by_key: dict[bytes, set[str]] = {}
    for row in rows:
        by_key.setdefault(row.key, set()).add(row.schema_fingerprint)
    assert len(by_key) == 60
    assert all(len(found) == 1 for found in by_key.values())
    assert len({next(iter(found)) for found in by_key.values()}) == 2


def test_messages_without_a_key_are_chosen_one_by_one(sync_world: CaptureDatabase) -> None:
    rows = _shipped(sync_world, _all(range(100), key=None))

    assert {row.schema_fingerprint for row in rows} == set(DIGESTS)


def test_a_share_may_grow_while_the_process_runs(sync_world: CaptureDatabase) -> None:
    share = [0.0]

    @event("shipped", version=2, schema=V2, rollout=Rollout(ShippedV1, share=lambda: share[0]))
    @dataclass(frozen=True)
    class Growing:
        order_id: int
        carrier: str

    def write(session: Session) -> None:
        _all(range(20), Growing)(session)
        session.flush()
        share[0] = 1.0
        _all(range(20), Growing)(session)

    rows = _shipped(sync_world, write)

    assert [row.schema_fingerprint for row in rows] == [DIGESTS[0]] * 20 + [DIGESTS[1]] * 20


def test_an_event_that_the_previous_version_cannot_tell_is_refused_for_every_key(sync_world: CaptureDatabase) -> None:
    narrow = {"type": "record", "name": NAME, "fields": [{"name": "order_id", "type": "int"}]}

    @event("shipped", version=1, schema=narrow)
    @dataclass(frozen=True)
    class Narrow:
        order_id: int

    @event("shipped", version=2, schema=V2, rollout=Rollout(Narrow, share=1.0))
    @dataclass(frozen=True)
    class Wide:
        order_id: int
        carrier: str

    with pytest.raises(EncodeError, match=r"version 1 of shipped cannot represent"):
        sync_world.run(_all([1], Wide))


def test_a_previous_version_is_an_earlier_version_of_the_same_event() -> None:
    with pytest.raises(ConfigurationError, match="the previous version of other 2 cannot be shipped 1"):
        event("other", version=2, rollout=Rollout(ShippedV1, share=0.5))
    with pytest.raises(ConfigurationError, match="the previous version of shipped 1 cannot be shipped 1"):
        event("shipped", version=1, rollout=Rollout(ShippedV1, share=0.5))
    with pytest.raises(ConfigurationError, match=r"between 0 and 1, not 1\.5"):
        Rollout(ShippedV1, share=1.5)
    with pytest.raises(CaptureError, match="is not an event"):
        event("shipped", version=2, rollout=Rollout(int, share=0.5))
    assert event_type(Shipped).rollout == Rollout(ShippedV1, share=0.25)


def test_json_events_have_canaries_too(sync_world: CaptureDatabase) -> None:
    @event("noted", version=1)
    @dataclass(frozen=True)
    class Old:
        text: str

    @event("noted", version=2, rollout=Rollout(Old, share=0.0))
    @dataclass(frozen=True)
    class New:
        text: str
        by: str

    _shipped(sync_world, lambda session: publish(session, New("hello", "ana"), topic="notes"))

    assert sync_world.events() == [{"text": "hello"}]


def test_an_application_role_may_declare(database_url: str) -> None:
    engine: Engine = create_engine(database_url)
    prefix = f"{engine.url.database}_"
    with engine.begin() as connection:
        migrations.upgrade(connection)
        create_roles(connection, prefix)
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}app")
        registry = MemoryRegistry()
        declare(connection, [ShippedV1], registry=registry)
        declare(connection, [ShippedV1], registry=registry)
        connection.exec_driver_sql("RESET ROLE")
        found = connection.execute(tables.outbox_schemas.select()).all()
        drop_roles(connection, prefix)
    engine.dispose()

    assert [row.fingerprint for row in found] == [DIGESTS[0]]
