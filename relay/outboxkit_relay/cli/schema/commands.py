"""``outboxkit schema``: hold schemas against what was released and what is stored, and look into messages."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outboxkit.avro import Frame, FrameKind, Mode, Schema, body_of, check, fingerprint, identity, read_frame
from outboxkit.avro.frames import name_of
from outboxkit.avro.gate.evaluate import Finding, evaluate, parse_allowed
from outboxkit.avro.gate.lint import lint
from outboxkit.avro.gate.reports import FORMATS, problem_facts, render
from outboxkit.avro.model.parse import parse
from outboxkit.codecs import avro
from outboxkit.errors import ConfigurationError, DecodeError, SchemaError, SchemaNotFound
from outboxkit.registries import Registry, open_registry
from outboxkit.registries.directory import ALLOW_FILE, LOCK_FILE, DirectoryRegistry, SchemaFile
from outboxkit_relay.cli.console import output
from outboxkit_relay.cli.schema.baseline import baseline
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("schemas"),
    show_default=True,
    help="The folder of schema files and lock file.",
)
_REGISTRY = click.option(
    "--registry",
    "url",
    default="directory:schemas",
    show_default=True,
    metavar="URL",
    help="Where the message's schema is looked up.",
)
_ENCODING = click.option(
    "--encoding",
    type=click.Choice(["raw", "hex", "base64"]),
    default="raw",
    show_default=True,
    help="How the message is written.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def command() -> None:
    """Check, compare and register Avro schemas; look into messages.

    The folder's lock file holds every released version. `check` is for CI and pre-commit, `explain` for the night.
    """


@command.command("check")
@_FOLDER
@click.option(
    "--against", multiple=True, default=["lock"], show_default=True, help="lock, git:REF, stored, registry, or URL."
)
@click.option("--mode", type=click.Choice([mode.value for mode in Mode]), help="Instead of each subject's own mode.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="For whom.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--allow", type=_FILE, help=f"Dated exceptions; {ALLOW_FILE} in the folder, if it is there.")
@click.pass_obj
def check_command(
    invocation: Invocation,
    *,
    folder: Path,
    against: tuple[str, ...],
    mode: str | None,
    form: str,
    as_json: bool,
    allow: Path | None,
) -> int:
    """Does a schema file break what was released, or what is stored? Exit code 3 when one does."""
    registry = DirectoryRegistry(folder)
    findings: list[Finding] = []
    for source in against:
        other = baseline(source, registry, invocation)
        findings += registry.findings(other.history, other.mode if mode is None else lambda _: Mode(mode))
    exceptions = parse_allowed(allow.read_text(encoding="utf-8")) if allow else registry.allowed()
    result = evaluate(findings, exceptions, dt.datetime.now(dt.UTC).date())
    if as_json or form != "text":
        click.echo(_safe(render(result, "json" if as_json else form)), nl=False)
    else:
        output.lines(_safe(render(result, form)))
    return Exit.OK if result.passed else Exit.PROBLEMS


def _safe(text: str) -> str:
    return "\n".join(output.safe(line) for line in text.split("\n"))


@command.command("lock")
@_FOLDER
@click.option("--check", "only_check", is_flag=True, help="Write nothing; exit code 3 when a file is not released.")
def lock_command(*, folder: Path, only_check: bool) -> int:
    """Release the schema files: write new versions into the lock file, if their mode allows it."""
    registry = DirectoryRegistry(folder)
    missing = [file for file in registry.files() if not _is_released(registry, file)]
    for file in missing:
        if only_check:
            click.echo(f"not released: {output.safe(file.path)} ({output.safe(file.subject)})")
        else:
            made = registry.register(file.subject, file.text)
            click.echo(f"released {output.safe(made.subject)} version {made.number} ({made.fingerprint})")
    if not missing:
        click.echo(f"{LOCK_FILE} is up to date.")
    return Exit.PROBLEMS if only_check and missing else Exit.OK


def _is_released(registry: DirectoryRegistry, file: SchemaFile) -> bool:
    return identity(file.schema) in [one.identity for one in registry.history(file.subject)]


@command.command("register")
@_FOLDER
@click.option("--registry", "url", required=True, metavar="URL", help="Where to.")
@click.option("--dry-run", is_flag=True, help="Only say what would be registered.")
def register_command(*, folder: Path, url: str, dry_run: bool) -> None:
    """Register the folder's schemas under their full names."""
    target = open_registry(url)
    for file in DirectoryRegistry(folder).files():
        known = [one.identity for one in target.history(file.subject)]
        if identity(file.schema) in known:
            click.echo(f"{output.safe(file.subject)} is registered")
        elif dry_run:
            click.echo(f"{output.safe(file.subject)} would become version {len(known) + 1}")
        else:
            made = target.register(file.subject, file.text)
            click.echo(f"{output.safe(file.subject)} is version {made.number} (id {made.schema_id})")


@command.command("fingerprint")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@_JSON
def fingerprint_command(*, files: tuple[Path, ...], as_json: bool) -> None:
    """Print the CRC-64-AVRO fingerprint (wire order) and the identity of schema files."""
    rows = []
    for path in files:
        schema = _schema(path)
        rows.append({"file": str(path), "name": schema.name, "fingerprint": fingerprint(schema).hex()})
        rows[-1] |= {"sha256": fingerprint(schema, "SHA-256").hex(), "identity": identity(schema)}
    if as_json:
        output.print_json(rows)
    else:
        output.table(["FINGERPRINT", "NAME", "FILE"], [[r["fingerprint"], r["name"], r["file"]] for r in rows])


@command.command("lint")
@_FOLDER
@_JSON
def lint_command(*, folder: Path, as_json: bool) -> int:
    """Point out what makes the next change hard. Exit code 3 when there is something."""
    rows: list[dict[str, Any]] = [
        {"file": str(file.path), "rule": one.rule, "pointer": one.pointer or "/", "message": one.message}
        for file in DirectoryRegistry(folder).files()
        for one in lint(file.schema)
    ]
    if as_json:
        output.print_json(rows)
    for row in [] if as_json else rows:
        output.lines(output.safe(f"{row['file']}: {row['rule']} at {row['pointer']}: {row['message']}"))
    return Exit.PROBLEMS if rows else Exit.OK


@command.command("diff")
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@_JSON
def diff_command(*, old: Path, new: Path, as_json: bool) -> int:
    """Show the effect of a change from OLD to NEW on readers, in both directions. Exit code 3 when one breaks."""
    before, after = _schema(old), _schema(new)
    back, forth = check(after, before), check(before, after)
    if as_json:
        sides = {"new_reads_old": back, "old_reads_new": forth}
        facts: dict[str, Any] = {name: [problem_facts(one) for one in found] for name, found in sides.items()}
        output.print_json({"same_bytes": fingerprint(before) == fingerprint(after), **facts})
    else:
        same = "reads and writes the same bytes" if fingerprint(before) == fingerprint(after) else "writes other bytes"
        click.echo(f"{output.safe(new)} {same}.")
        for title, found in (("New readers, old messages", back), ("Old readers, new messages", forth)):
            click.echo(f"{title}: {'all is read' if not any(one.is_error for one in found) else 'breaks'}")
            for one in found:
                output.lines(output.safe(f"  {one.severity.value}: {one}; fix: {one.fix}"))
    return Exit.PROBLEMS if any(one.is_error for one in (*back, *forth)) else Exit.OK


@command.command("compat-matrix")
@click.argument("subject")
@_FOLDER
@click.option("--registry", "url", metavar="URL", help="Instead of the folder's lock file.")
@_JSON
def matrix_command(*, subject: str, folder: Path, url: str | None, as_json: bool) -> None:
    """Show which versions of a subject read which: rows read what columns wrote."""
    registry: Registry = DirectoryRegistry(folder) if url is None else open_registry(url)
    versions = registry.history(subject)
    if not versions:
        raise SchemaNotFound(f"there is no version of {subject}")
    cells = [[_cell(reader.schema, writer.schema) for writer in versions] for reader in versions]
    if as_json:
        numbers = [one.number for one in versions]
        output.print_json({
            "subject": subject,
            "versions": numbers,
            "reads": [[c != "no" for c in row] for row in cells],
        })
    else:
        heads = ["READS →", *(f"v{one.number}" for one in versions)]
        output.table(heads, [[f"v{one.number}", *row] for one, row in zip(versions, cells, strict=True)])


def _cell(reader: Schema, writer: Schema) -> str:
    problems = check(reader, writer)
    if any(one.is_error for one in problems):
        return "no"
    return "yes, differs" if problems else "yes"


@command.command("decode")
@click.argument("message", type=click.File("rb"), default="-")
@click.option("--reader", type=_FILE, help="Read as this schema; the writer's own without it.")
@click.option("--writer", type=_FILE, help="The writer's schema, for a message without a frame.")
@_REGISTRY
@_ENCODING
def decode_command(*, message: Any, reader: Path | None, writer: Path | None, url: str, encoding: str) -> None:
    """Decode one message (a file, or standard input) and print it as JSON."""
    data = _message(message.read(), encoding)
    frame, wrote = _opened(data, writer, url)
    value = avro.decode(wrote, wrote if reader is None else _schema(reader), body_of(frame, wrote))
    output.print_json(_plain(value))


@command.command("explain")
@click.argument("message", type=click.File("rb"), default="-")
@click.option("--reader", type=_FILE, help="The schema that cannot read it.")
@click.option("--writer", type=_FILE, help="The writer's schema, for a message without a frame.")
@_REGISTRY
@_ENCODING
def explain_command(*, message: Any, reader: Path | None, writer: Path | None, url: str, encoding: str) -> int:
    """Why can a message not be read? Its frame, its schema, the first fault, and what readers disagree on."""
    data = _message(message.read(), encoding)
    output.field("bytes", len(data))
    frame, wrote = _opened(data, writer, url)
    output.field("frame", frame.kind.value)
    output.field("writer", f"{wrote.name} ({fingerprint(wrote).hex()})")
    target = wrote if reader is None else _schema(reader)
    problems = check(target, wrote)
    for one in problems:
        output.field(one.severity.value, f"{one}; fix: {one.fix}")
    try:
        avro.decode(wrote, target, body_of(frame, wrote))
    except DecodeError as error:
        output.field("fault", error.message)
        output.field("path", error.path or "(top)")
        output.field("offset", "unknown" if error.offset is None else error.offset + frame.offset)
        return Exit.PROBLEMS
    output.field("result", "it can be read")
    return Exit.OK


def _schema(path: Path) -> Schema:
    try:
        return parse(path.read_bytes(), lenient=True)
    except SchemaError:
        # It may use types of the files beside it; the error then names the file.
        return next(one.schema for one in DirectoryRegistry(path.parent).files() if one.path == path)


def _message(data: bytes, encoding: str) -> bytes:
    try:
        if encoding == "hex":
            return bytes.fromhex(data.decode("ascii"))
        return base64.b64decode(data, validate=False) if encoding == "base64" else data
    except (ValueError, binascii.Error) as error:
        raise ConfigurationError(f"the message is not {encoding}: {error}") from error


def _opened(data: bytes, writer: Path | None, url: str) -> tuple[Frame, Schema]:
    if writer is not None:
        # With the schema given the message is a bare body: nothing is guessed from its first bytes.
        return read_frame(data, pinned=FrameKind.BARE), _schema(writer)
    frame = read_frame(data)
    return frame, parse(open_registry(url).resolve(name_of(frame)), lenient=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value
