"""Readers: which schema each consumer reads a type with now, and why one cannot read a message.

A consumer records its readers when it starts. A replay looks here before it sends a dead message back, so that a letter
leaves the store only for a reader that can take it. Only codecs with schemas are recorded: for JSON there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, delete, select, update

from outboxkit import avro, tables
from outboxkit._sql import database_now
from outboxkit.codecs import codec_named
from outboxkit.dialects import insert_ignoring
from outboxkit.errors import CodecError, OutboxKitError, SchemaError, SchemaNotFound
from outboxkit.events import EventType

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.message import Message

__all__ = [
    "Problems",
    "Reader",
    "current",
    "fingerprint_of",
    "problems",
    "record",
    "refusal",
    "remember_writer",
    "schema_text",
    "unreadable",
]

Reader = tuple[str, str]  #: (fingerprint, text) of a schema
Problems = list[dict[str, str]]

_MAX_PROBLEMS: Final = 20
_PROBLEM_LENGTH: Final = 500
_SCHEMAS: Final = tables.outbox_schemas


def record(connection: Connection, consumer: str, contracts: Iterable[EventType]) -> dict[str, Reader]:
    """Records the readers of a consumer in place of its earlier ones; returns the latest of each type.

    Transaction: joins the caller's; does not commit. Writes: ``outbox_schemas``.
    """
    found: dict[str, Reader] = {}
    kept: dict[str, list[str]] = {}
    for contract in sorted(contracts, key=lambda contract: contract.version):
        text = codec_named(contract.codec).schema_text(contract)
        fingerprints = kept.setdefault(contract.name, [])
        if text is None:
            continue
        fingerprint = fingerprint_of(text)
        fingerprints.append(fingerprint)
        names = {"fingerprint": fingerprint, "role": "reader", "consumer": consumer, "type": contract.name}
        connection.execute(insert_ignoring(connection, _SCHEMAS).values(**names, text=text))
        this = and_(*(_SCHEMAS.c[name] == value for name, value in names.items()))
        # A new default changes how it reads, but not its fingerprint.
        connection.execute(update(_SCHEMAS).where(this).values(text=text, seen_at=database_now()))
        found[contract.name] = (fingerprint, text)
    for name, fingerprints in kept.items():
        mine = and_(_SCHEMAS.c.role == "reader", _SCHEMAS.c.consumer == consumer, _SCHEMAS.c.type == name)
        connection.execute(delete(_SCHEMAS).where(mine, _SCHEMAS.c.fingerprint.not_in(fingerprints)))
    return found


def remember_writer(connection: Connection, consumer: str, type_name: str, writer: Reader) -> None:
    """Keeps the schema that a dead message was written with.

    Transaction: joins the caller's, which stores the dead letter. Writes: ``outbox_schemas``.
    """
    fingerprint, text = writer
    values = {"fingerprint": fingerprint, "role": "writer", "consumer": consumer, "type": type_name, "text": text}
    connection.execute(insert_ignoring(connection, _SCHEMAS).values(values))


def current(connection: Connection, consumer: str, type_name: str) -> str | None:
    """The schema that a consumer reads a type with now, None when it needs none or never started.

    Transaction: joins the caller's.
    """
    return next(iter(_readers(connection, consumer, type_name)), None)


def _readers(connection: Connection, consumer: str, type_name: str) -> list[str]:
    """The schemas of all versions that a consumer takes, the latest first."""
    mine = and_(_SCHEMAS.c.role == "reader", _SCHEMAS.c.consumer == consumer, _SCHEMAS.c.type == type_name)
    return list(connection.scalars(select(_SCHEMAS.c.text).where(mine).order_by(_SCHEMAS.c.seen_at.desc())))


def schema_text(connection: Connection, fingerprint: str, resolve: Callable[[str], str] | None = None) -> str:
    """The text of a schema by its fingerprint: from ``outbox_schemas``, else from the given look-up.

    Every application may add rows there, so a text counts only if the fingerprint is its own.

    Transaction: joins the caller's.

    Raises:
        SchemaNotFound: nobody knows it.
    """
    known = select(_SCHEMAS.c.text).where(_SCHEMAS.c.fingerprint == fingerprint)
    text = next((found for found in connection.scalars(known) if fingerprint_of(found) == fingerprint), None)
    if text is None and resolve is None:
        raise SchemaNotFound(
            f"the schema {fingerprint} is not in outbox_schemas; give resolve=… that finds it in a registry", final=True
        )
    return resolve(fingerprint) if text is None and resolve is not None else str(text)


def refusal(connection: Connection, consumer: str, message: Message, resolve: Callable[[str], str] | None) -> str:
    """Says why none of the consumer's current readers can read a message, naming the field; empty when one can.

    Transaction: joins the caller's.
    """
    if "json" in message.content_type:
        return ""
    latest = ""
    for reader in _readers(connection, consumer, message.type):
        fault = unreadable(connection, reader, message, resolve)
        if not fault:
            return ""
        latest = latest or f"{consumer} cannot read {message.type} yet: {fault}"
    return latest


def unreadable(connection: Connection, reader: str, message: Message, resolve: Callable[[str], str] | None) -> str:
    """Says why a reader's schema cannot read a message, naming the field; empty when it can.

    Transaction: joins the caller's.
    """
    writers: list[str] = []

    def writer(fingerprint: str) -> str:
        writers.append(schema_text(connection, fingerprint, resolve))
        return writers[-1]

    try:
        contract = EventType(name=message.type, schema=json.loads(reader), codec="avro")
        codec_named(contract.codec).decode(message, contract, writer)
    except (CodecError, SchemaError) as error:
        faults = problems(reader, writers[-1]) if writers else []
        fields = [f"{one['field']}: {one['message']}" for one in faults if "field" in one]
        where = getattr(error, "path", "")
        return "; ".join(fields) or f"{where} {error.message}".strip()
    return ""


def problems(reader: str, writer: str) -> Problems:
    """The reasons why a reader's Avro schema cannot read a writer's, as plain data, capped. Never raises."""
    try:
        found = [one for one in avro.check(avro.parse(reader), avro.parse(writer, lenient=True)) if one.is_error]
    except OutboxKitError as error:
        return [{"kind": error.code, "message": error.message[:_PROBLEM_LENGTH]}]
    return [
        {"kind": one.kind.value, "field": one.reader_path, "message": one.message[:_PROBLEM_LENGTH], "fix": one.fix}
        for one in found[:_MAX_PROBLEMS]
    ]


def fingerprint_of(text: str) -> str:
    """The fingerprint of a schema's text, as messages and tables name it."""
    try:
        return avro.fingerprint(avro.parse(text, lenient=True)).hex()
    except SchemaError:
        return hashlib.sha256(text.encode()).hexdigest()
