"""Declarations: a producer's schemas are held against what was released, before its first event goes out.

A producer declares its events when it starts, in a short transaction of its own. What it declares is kept beside the
messages, so that consumers, replays and ``schema check --against stored`` know the schema of every message that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sqlalchemy import select

from outboxkit import tables
from outboxkit.avro import Schema, fingerprint
from outboxkit.avro.model.parse import parse
from outboxkit.codecs import codec_named
from outboxkit.dialects import insert_ignoring, naming_missing_tables
from outboxkit.errors import ConfigurationError, RegistryUnavailable
from outboxkit.events import EventType, event_type, versions_of
from outboxkit.registries import Registry, open_registry, require_compatible

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["declare"]


def declare(
    connection: Connection,
    events: Iterable[type | EventType],
    *,
    registry: Registry | str,
    subject: Callable[[Schema], str] = lambda schema: schema.name,
) -> None:
    """Refuses to start a producer whose schemas break what was released; keeps them for those who read later.

    Call it at the start, for every event class that this process writes; classes without a schema pass.

    Transaction: joins the caller's; does not commit. The registry is asked before the first statement. Writes:
    ``outbox_schemas``.
    Guarantee: an event that was declared is one that the mode of its subject allows. While the registry is away, only
    what was declared before passes.

    Args:
        connection: the caller's; with an async engine ``await connection.run_sync(declare, events, registry=…)``.
        events: the event classes.
        registry: where releases are known: ``directory:schemas``, a registry's URL, or a registry.
        subject: the name under which a schema is released; its full name, as ``outboxkit schema register`` does.

    Raises:
        IncompatibleSchema: a schema breaks its subject's mode, with every reason.
        RegistryUnavailable: the registry is away, and a schema was never declared before.
        ConfigurationError: a schema file cannot be read, there is no such registry, or the tables are missing.
    """
    if isinstance(events, type | EventType):
        raise ConfigurationError("declare() takes a collection of event classes: declare(connection, [OrderPlaced], …)")
    source = open_registry(registry) if isinstance(registry, str) else registry
    given = (one if isinstance(one, EventType) else event_type(one) for one in events)
    contracts = [version for contract in given for version in versions_of(contract)]
    texts = [(one.name, text) for one in contracts if (text := codec_named(one.codec).schema_text(one)) is not None]
    doubt: RegistryUnavailable | None = None
    for _, text in texts:
        schema = parse(text)
        try:
            require_compatible(source, subject(schema), schema)
        except RegistryUnavailable as error:
            doubt = error
    with naming_missing_tables():
        for name, text in texts:
            _keep(connection, name, text, doubt)


def _keep(connection: Connection, type_name: str, text: str, doubt: RegistryUnavailable | None) -> None:
    known = tables.outbox_schemas
    digest = fingerprint(parse(text)).hex()
    row = {"fingerprint": digest, "role": "writer", "consumer": "", "type": type_name, "text": text}
    if doubt is None:
        connection.execute(insert_ignoring(connection, known).values(row))
        return
    same = (known.c[name] == value for name, value in row.items())
    if connection.execute(select(known.c.type).where(*same)).one_or_none() is None:
        raise doubt
