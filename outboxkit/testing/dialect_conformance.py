"""The behaviour that every dialect owes, as tests over an engine. Needs pytest.

    pytest.register_assert_rewrite("outboxkit.testing.dialect_conformance")
    from outboxkit.testing.dialect_conformance import DialectConformance

    class TestMyDialect(DialectConformance):
        @pytest.fixture
        def engine(self):
            …  # of an empty database with the outbox tables: outboxkit.migrations.upgrade(connection)

What a test asks of a dialect is what the port promises; where databases differ, `outboxkit.dialects.Features` decides.
"""

# ruff: noqa: S101  tests assert

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, delete, insert, select

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.dialects import dialect_of, insert_ignoring
from outboxkit.message import Message
from outboxkit.rows import LARGE, Page, Part, Reading, Row

__all__ = ["DialectConformance"]

_EVERYTHING: Final = Part(frozenset(), only=False, seen=None)
_SHARDS: Final = frozenset(range(tables.SHARDS))


class DialectConformance:
    """Subclass it and give it a fixture ``engine``."""

    # --- reading -------------------------------------------------------------------------------------------------

    def test_a_scan_in_pages_finds_every_row_once_in_order(self, engine: Engine) -> None:
        _write(engine, *(f"{number}" for number in range(7)))

        with _reading(engine) as connection:
            pages = _round(connection, _reading_of(_EVERYTHING, limit=3))

        assert [len(page.rows) for page in pages] == [3, 3, 1]
        assert _payloads(pages) == ["0", "1", "2", "3", "4", "5", "6"]
        positions = [row.position for page in pages for row in page.rows]
        assert positions == sorted(set(positions))

    def test_a_row_comes_back_as_it_was_written(self, engine: Engine) -> None:
        expires = datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
        message = replace(_message("x"), key=b"\x00\xff", payload=b"\xfe\x00", expires_at=expires)
        with engine.begin() as connection:
            outbox.write(connection, [message, replace(_message("y"), key=None)])

        with _reading(engine) as connection:
            rows = _page(connection, _reading_of(_EVERYTHING)).rows

        assert (rows[0].id, rows[0].topic, rows[0].key) == (UUID(message.id), "orders", b"\x00\xff")
        assert (rows[0].payload, rows[0].kind, rows[0].type) == (b"\xfe\x00", "event", "order.placed")
        assert rows[0].expires_at == expires
        assert rows[0].recorded_at.tzinfo is not None
        assert (rows[1].key, rows[1].expires_at, rows[1].waiting_id, rows[1].attempts) == (None, None, None, 0)

    def test_a_page_has_a_size_in_bytes_and_the_round_goes_on_behind_it(self, engine: Engine) -> None:
        large, light = "x" * (3 * LARGE), "light"
        _write(engine, light, large, large, light, large, light)

        with _reading(engine) as connection:
            pages = _round(connection, _reading_of(_EVERYTHING, max_bytes=7 * LARGE))

        assert [len(page.rows) for page in pages] == [4, 2]
        assert [page.cut for page in pages] == [True, False]
        assert _payloads(pages) == [light, large, large, light, large, light]
        assert [list(page.large.values()) for page in pages] == [[3 * LARGE] * 2, [3 * LARGE]]
        assert [row.position for page in pages for row in page.rows if len(row.payload) > LARGE] == [
            position for page in pages for position in page.large
        ]
        assert all(row.attempts == 0 for page in pages for row in page.rows)

    def test_a_payload_above_the_size_of_a_page_is_a_page(self, engine: Engine) -> None:
        large = "x" * (3 * LARGE)
        _write(engine, large, large)

        with _reading(engine) as connection:
            pages = _round(connection, _reading_of(_EVERYTHING, max_bytes=1))

        assert [len(page.rows) for page in pages] == [1, 1]

    def test_a_round_finds_what_the_one_before_did_not_see(self, engine: Engine) -> None:
        _write(engine, "a", "b")
        with _reading(engine) as connection:
            first = _page(connection, _reading_of(_EVERYTHING))
            _write(engine, "c")
            second = _page(connection, _reading_of(replace(_EVERYTHING, seen=first.snapshot)))
            third = _page(connection, _reading_of(replace(_EVERYTHING, seen=second.snapshot)))

        assert [_payloads([page]) for page in (first, second, third)] == [["a", "b"], ["c"], []]

    def test_a_read_without_rows_tells_what_it_saw_too(self, engine: Engine) -> None:
        with _reading(engine) as connection:
            empty = _page(connection, _reading_of(_EVERYTHING))
            again = _page(connection, _reading_of(replace(_EVERYTHING, seen=empty.snapshot)))
            _write(engine, "a")
            found = _page(connection, _reading_of(replace(_EVERYTHING, seen=again.snapshot)))

        assert (empty.rows, again.rows, _payloads([found])) == ([], [], ["a"])

    def test_what_is_committed_between_two_pages_belongs_to_the_next_round(self, engine: Engine) -> None:
        _write(engine, "a", "b")
        with _reading(engine) as connection:
            reading = _reading_of(_EVERYTHING, limit=1)
            first = _page(connection, reading)
            _write(engine, "c")
            rest = _round(connection, replace(reading, round=first.snapshot, last=first.rows[-1].position))
            after = _page(connection, _reading_of(replace(_EVERYTHING, seen=first.snapshot)))

        assert (_payloads([first]), _payloads(rest), _payloads([after])) == (["a"], ["b"], ["c"])

    def test_parts_choose_topics_and_have_a_memory_each(self, engine: Engine) -> None:
        _write(engine, "old orders")
        _write(engine, "old bills", topic="bills")
        with _reading(engine) as connection:
            seen = _page(connection, _reading_of(_EVERYTHING)).snapshot
            _write(engine, "new orders")
            _write(engine, "new bills", topic="bills")
            bills = Part(frozenset({"bills"}), only=True, seen=None)
            others = Part(frozenset({"bills"}), only=False, seen=seen)

            assert _payloads([_page(connection, _reading_of(bills))]) == ["old bills", "new bills"]
            assert _payloads([_page(connection, _reading_of(others))]) == ["new orders"]
            both = _page(connection, _reading_of(others, bills))
            assert _payloads([both]) == ["old bills", "new orders", "new bills"]

    def test_two_memories_become_one_without_forgetting_the_newer(self, engine: Engine) -> None:
        _write(engine, "orders")
        with _reading(engine) as connection:
            others = Part(frozenset({"bills"}), only=False, seen=None)
            others = replace(others, seen=_page(connection, _reading_of(others)).snapshot)
            _write(engine, "bills", topic="bills")
            bills = Part(frozenset({"bills"}), only=True, seen=None)
            bills = replace(bills, seen=_page(connection, _reading_of(bills)).snapshot)

            both = _page(connection, _reading_of(others, bills))
            after = _page(connection, _reading_of(replace(_EVERYTHING, seen=both.snapshot)))

        assert (both.rows, after.rows) == ([], []), "one snapshot serves for both: nothing is read twice"

    def test_only_the_asked_shards_are_read(self, engine: Engine) -> None:
        _write(engine, "a", "b", "c", "d", "e", "f")
        with engine.connect() as connection:
            found = connection.execute(select(_HOT.c.position, _HOT.c.shard))
            shards = {row.position: row.shard for row in found}
        wanted = frozenset(list(shards.values())[:2])

        with _reading(engine) as connection:
            rows = _page(connection, replace(_reading_of(_EVERYTHING), shards=wanted)).rows

        assert [row.position for row in rows] == sorted(at for at, shard in shards.items() if shard in wanted)

    def test_the_complement_finds_what_is_present_although_it_was_seen(self, engine: Engine) -> None:
        _write(engine, "a")
        with _reading(engine) as connection:
            seen = _page(connection, _reading_of(_EVERYTHING)).snapshot
            _write(engine, "b")
            missed = replace(_reading_of(replace(_EVERYTHING, seen=seen)), missed=True)

            assert _payloads([_page(connection, missed)]) == ["a"]
            _delete_all(engine)
            assert _page(connection, missed).rows == []

    def test_what_is_rolled_back_is_never_read(self, engine: Engine) -> None:
        with engine.connect() as connection, connection.begin() as transaction:
            outbox.write(connection, [_message("gone")])
            transaction.rollback()
        with engine.begin() as connection:
            outbox.write(connection, [_message("a")])
            with connection.begin_nested() as savepoint:
                outbox.write(connection, [_message("gone, too")])
                savepoint.rollback()
            outbox.write(connection, [_message("b")])

        with _reading(engine) as connection:
            assert _payloads([_page(connection, _reading_of(_EVERYTHING))]) == ["a", "b"]

    def test_a_smaller_position_that_is_committed_later_is_found(self, engine: Engine) -> None:
        if not dialect_of(engine).features.concurrent_writers:
            return
        with _reading(engine) as connection, engine.connect() as slow, slow.begin():
            outbox.write(slow, [_message("slow")])
            _write(engine, "quick")
            first = _page(connection, _reading_of(_EVERYTHING))
            slow.commit()
            second = _page(connection, _reading_of(replace(_EVERYTHING, seen=first.snapshot)))

        assert (_payloads([first]), _payloads([second])) == (["quick"], ["slow"])
        assert second.rows[0].position < first.rows[0].position

    # --- claiming ------------------------------------------------------------------------------------------------

    def test_a_claim_tells_how_long_the_lease_holds(self, engine: Engine) -> None:
        relay = _register(engine, timedelta(seconds=30))

        with engine.connect() as connection:
            left = outbox.confirm_lease(connection, relay)

        assert timedelta(seconds=20) < left <= timedelta(seconds=30)

    def test_a_claim_under_an_ended_or_unknown_lease_fails(self, engine: Engine) -> None:
        ended = _register(engine, timedelta(seconds=-1))

        with engine.connect() as connection:
            assert dialect_of(connection).confirm_lease(connection, ended) is None
            assert dialect_of(connection).confirm_lease(connection, uuid4()) is None

    # --- removing and inserting -------------------------------------------------------------------------------------

    def test_exactly_the_named_rows_are_removed_and_again_none(self, engine: Engine) -> None:
        _write(engine, "a", "b", "c")
        with _reading(engine) as connection:
            first, second, third = _page(connection, _reading_of(_EVERYTHING)).rows

        ids = (first.raw_id, third.raw_id, third.raw_id)
        pairs = list(zip((first.position, second.position, third.position + 1000), ids, strict=True))
        with engine.begin() as connection:
            removed = dialect_of(connection).remove(connection, pairs)
            again = dialect_of(connection).remove(connection, pairs)

        with _reading(engine) as connection:
            assert _payloads([_page(connection, _reading_of(_EVERYTHING))]) == ["b", "c"]
        assert (removed, again) == (1, 0)

    def test_a_blind_reading_tells_the_positions_and_nothing_else(self, engine: Engine) -> None:
        _write(engine, "a", "b" * 10_000)

        with _reading(engine) as connection:
            seen = _page(connection, _reading_of(_EVERYTHING))
            blind = _page(connection, replace(_reading_of(_EVERYTHING), blind=True))

        assert [row.position for row in blind.rows] == [row.position for row in seen.rows]
        told = {(row.topic, row.key, row.type, row.payload, row.headers) for row in blind.rows}
        assert told == {("", None, "", b"", b"")}

    def test_inserting_what_is_there_already_changes_nothing_and_says_so(self, engine: Engine) -> None:
        table = tables.inbox_messages
        row = {"consumer": "billing", "source": "", "message_id": "1"}
        with engine.begin() as connection:
            statement = insert_ignoring(connection, table).returning(table.c.message_id)
            first = connection.execute(statement.values(**row)).scalars().all()
            again = connection.execute(statement.values(**row)).scalars().all()

        assert (first, again) == (["1"], [])


_HOT: Final = tables.outbox_messages


def _reading(engine: Engine) -> Connection:
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def _reading_of(*parts: Part, limit: int = 100, max_bytes: int = 1 << 20) -> Reading:
    return Reading(shards=_SHARDS, parts=parts, limit=limit, max_bytes=max_bytes)


def _page(connection: Connection, reading: Reading) -> Page:
    return outbox.read(connection, reading)


def _round(connection: Connection, reading: Reading) -> list[Page]:
    """The pages of a round, or what is left of it."""
    pages = [_page(connection, reading)]
    while len(pages[-1].rows) == reading.limit or pages[-1].cut:
        snapshot = reading.round or pages[0].snapshot
        pages.append(_page(connection, replace(reading, round=snapshot, last=pages[-1].rows[-1].position)))
    return pages


def _payloads(pages: Iterable[Page]) -> list[str]:
    rows: Sequence[Row] = [row for page in pages for row in page.rows]
    return [row.payload.decode() for row in rows]


def _message(payload: str, topic: str = "orders") -> Message:
    return Message(
        id=str(uuid4()),
        type="order.placed",
        topic=topic,
        payload=payload.encode(),
        key=payload.encode()[:100],
        occurred_at=datetime.now(UTC),
    )


def _write(engine: Engine, *payloads: str, topic: str = "orders") -> None:
    with engine.begin() as connection:
        outbox.write(connection, [_message(payload, topic) for payload in payloads])


def _delete_all(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(_HOT))


def _register(engine: Engine, lease: timedelta) -> UUID:
    relay = uuid4()
    values = {"id": relay, "host": "here", "version": "1", "expires_at": database_now(lease)}
    with engine.begin() as connection:
        connection.execute(insert(tables.outbox_relays).values(**values))
    return relay
