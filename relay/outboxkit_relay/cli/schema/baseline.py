"""Sources of the versions that `schema check` holds a schema file against.

``lock``: the released versions in the lock file. ``git:REF``: the files at a commit. ``stored``: every writer's schema
that still waits in outbox, inbox retries and open dead letters. ``registry``: the one in the settings. A URL: that one.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from sqlalchemy import func, select, union

from outboxkit import schema_store, tables
from outboxkit.avro import Mode, Version
from outboxkit.avro.frames import frame_of, name_of
from outboxkit.avro.model.parse import parse
from outboxkit.errors import ConfigurationError, DecodeError, SchemaNotFound
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.registries import Registry, open_registry
from outboxkit.registries.directory import DirectoryRegistry, SchemaFile
from outboxkit_relay.cli.console import database

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["Baseline", "baseline"]

_GIT_SECONDS: Final = 30
_LONGEST_FRAME: Final = 17  # bytes before a body


@dataclass(frozen=True, slots=True)
class Baseline:
    """The other side of a check.

    Attributes:
        history: versions of a subject, oldest first.
        mode: what the subject may not break.
    """

    history: Callable[[str], Sequence[Version]]
    mode: Callable[[str], Mode]


def baseline(against: str, folder: DirectoryRegistry, invocation: Invocation) -> Baseline:
    """The versions behind one ``--against``.

    Raises:
        ConfigurationError: there is no such source.
    """
    if against == "lock":
        return _of_registry(folder)
    if against.startswith("git:"):
        found = _at_commit(folder.folder, against.removeprefix("git:"))
        return Baseline(lambda subject: [one for name, one in found if name == subject], folder.mode)
    if against == "stored":
        stored = _stored(invocation, folder)
        # Whatever the mode of the subject: what is stored must stay readable.
        return Baseline(
            lambda subject: [one for name, one in stored if name == subject], lambda _: Mode.BACKWARD_TRANSITIVE
        )
    if against == "registry":
        return _of_registry(_configured(invocation))
    if ":" in against:
        return _of_registry(open_registry(against))
    raise ConfigurationError(f"--against {against!r} is none of lock, git:REF, stored, registry, or a registry's URL")


def _configured(invocation: Invocation) -> Registry:
    url = invocation.settings.registry_url
    if url is None:
        raise ConfigurationError("--against registry needs a registry: set OUTBOXKIT_REGISTRY_URL, or give its URL")
    return open_registry(url.get_secret_value())


def _of_registry(registry: Registry) -> Baseline:
    return Baseline(lambda subject: [one.version for one in registry.history(subject)], registry.mode)


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603  the reference is one argument and never an option
            ["git", "-C", str(folder), *arguments],  # noqa: S607  the user's own git
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigurationError("--against git:REF needs git, which is not installed") from None
    if done.returncode:
        raise ConfigurationError(f"git cannot read that: {done.stderr.decode(errors='replace').strip()[:300]}")
    return done.stdout


def _at_commit(folder: Path, reference: str) -> list[tuple[str, Version]]:
    if reference.startswith("-"):
        raise ConfigurationError(f"{reference!r} is no commit")
    names = _git(folder, "ls-tree", "-r", "--name-only", "-z", reference, ".").decode().split("\0")
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            if name.endswith(".avsc"):
                target = Path(copy, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(_git(folder, "show", f"{reference}:./{name}"))
        files: Sequence[SchemaFile] = DirectoryRegistry(Path(copy)).files()
    return [(file.subject, Version(schema=file.schema, label=f"git:{reference}")) for file in files]


def _stored(invocation: Invocation, folder: DirectoryRegistry) -> list[tuple[str, Version]]:
    found: list[tuple[str, Version]] = []
    with database.reading(invocation) as connection:
        for name in sorted(_waiting(connection)):
            try:
                schema = parse(schema_store.schema_text(connection, name, _resolver(invocation, folder)), lenient=True)
            except SchemaNotFound:
                click.echo(f"warning: stored messages name the schema {name}, which nobody knows", err=True)
                continue
            found.append((schema.name, Version(schema=schema, label=f"stored messages (schema {name})")))
    return found


def _resolver(invocation: Invocation, folder: DirectoryRegistry) -> Callable[[str], str]:
    """Sources for what no table has: the folder, then the registry of the settings."""
    if invocation.settings.registry_url is None:
        return folder.resolve
    registry = _configured(invocation)

    def resolve(name: str) -> str:
        try:
            return folder.resolve(name)
        except SchemaNotFound:
            return registry.resolve(name)

    return resolve


def _waiting(connection: Connection) -> set[str]:
    """The names of all writers' schemas whose messages are still stored: fingerprints, and a registry's ids.

    Transaction: joins the caller's; reads only.
    """
    hot, waiting, letters = tables.outbox_messages, tables.outbox_waiting, tables.dead_letters
    statement = union(
        select(hot.c.schema_fingerprint),
        select(waiting.c.schema_fingerprint),
        select(letters.c.writer_schema).where(letters.c.state == "dead"),
    )
    names = {str(name) for (name,) in connection.execute(statement) if name}
    return names | set(_of_retries(connection))


def _of_retries(connection: Connection) -> Iterator[str]:
    """Schemas that deliveries name themselves: they are kept as they came, and foreign ones may name none."""
    room = tables.inbox_waiting
    frames = select(room.c.topic, room.c.headers, func.substr(room.c.payload, 1, _LONGEST_FRAME))
    for topic, packed, start in connection.execute(frames):
        with contextlib.suppress(DecodeError):  # it has no frame, or a broken envelope: it will not be decoded
            message = from_wire(topic, None, unpack_headers(packed), start or b"")
            if "json" not in message.content_type:
                yield name_of(frame_of(message))
