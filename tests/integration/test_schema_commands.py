"""``outboxkit schema …`` from the outside: what it prints and how it ends."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, insert

from outboxkit import tables
from outboxkit.avro import FrameKind, fingerprint, write_frame
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import encode
from outboxkit.headers import pack_headers
from outboxkit.registries.confluent import ConfluentRegistry
from outboxkit.registries.directory import LOCK_FILE
from outboxkit.testing.schema_gate import _gate
from outboxkit_relay.cli import run
from tests.servers import registry as server

Run = Callable[..., SimpleNamespace]


def _text(name: str, *fields: dict[str, Any]) -> str:
    return json.dumps({"type": "record", "name": f"shop.{name}", "fields": list(fields)}, indent=2)


ID = {"name": "id", "type": "string", "doc": "d"}
MUST = {"name": "must", "type": "int", "doc": "d"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "schemas"
    made.mkdir()
    (made / "order.avsc").write_text(_text("Order", ID))
    return made


@pytest.fixture
def outboxkit(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(folder.parent)

    def call(*arguments: str | Path) -> SimpleNamespace:
        capsys.readouterr()
        code = run([str(one) for one in arguments])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return call


def test_a_change_that_breaks_a_released_version_ends_with_three(outboxkit: Run, folder: Path) -> None:
    assert outboxkit("schema", "lock").out == f"released shop.Order version 1 ({_digest(ID)})\n"
    assert outboxkit("schema", "check").code == 0

    (folder / "order.avsc").write_text(_text("Order", ID, MUST))
    said = outboxkit("schema", "check")

    assert said.code == 3
    assert "schemas/order.avsc:10: READER_FIELD_MISSING_DEFAULT_VALUE at Order.must (/fields/1)" in said.out
    assert outboxkit("schema", "check", "--mode", "FORWARD").code == 0


def _digest(*fields: dict[str, Any]) -> str:
    return fingerprint(parse(_text("Order", *fields))).hex()


def test_every_format_can_be_asked_for(outboxkit: Run, folder: Path) -> None:
    outboxkit("schema", "lock")
    (folder / "order.avsc").write_text(_text("Order", ID, MUST))

    assert json.loads(outboxkit("schema", "check", "--json").out)["errors"][0]["witness"] == {"id": ""}
    assert outboxkit("schema", "check", "--format", "github").out.startswith("::error file=schemas/order.avsc,line=10,")
    assert outboxkit("schema", "check", "--format", "junit").out.startswith("<?xml")


def test_a_dated_exception_lets_one_problem_pass(outboxkit: Run, folder: Path) -> None:
    outboxkit("schema", "lock")
    (folder / "order.avsc").write_text(_text("Order", ID, MUST))
    entry = (
        '[[allow]]\nsubject="shop.Order"\nkind="READER_FIELD_MISSING_DEFAULT_VALUE"\npath="Order.must"\nreason="new"\n'
    )

    (folder / "allow.toml").write_text(f"{entry}until=2999-01-01\n")
    assert outboxkit("schema", "check").code == 0
    (folder / "allow.toml").write_text(f"{entry}until=2020-01-01\n")
    assert outboxkit("schema", "check").code == 3


def test_a_commit_can_be_the_baseline(outboxkit: Run, folder: Path) -> None:
    identity = {
        f"GIT_{who}_{what}": "x@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *arguments], cwd=folder.parent, check=True, env={**os.environ, **identity})
    assert outboxkit("schema", "check", "--against", "git:HEAD").code == 0

    (folder / "order.avsc").write_text(_text("Order", ID, MUST))

    assert outboxkit("schema", "check", "--against", "git:HEAD").code == 3
    assert outboxkit("schema", "check", "--against", "git:nowhere").code == 2
    assert outboxkit("schema", "check", "--against", "git:--output=x").code == 2
    assert outboxkit("schema", "check", "--against", "nonsense").code == 2


def test_files_of_one_subject_are_its_versions(outboxkit: Run, folder: Path) -> None:
    (folder / "order.v2.avsc").write_text(_text("Order", ID, MUST))

    assert outboxkit("schema", "check").code == 3
    (folder / "order.v2.avsc").write_text(_text("Order", ID, MUST | {"default": 1}))
    assert outboxkit("schema", "check").code == 0


def test_an_unreleased_file_is_found(outboxkit: Run, folder: Path) -> None:
    assert outboxkit("schema", "lock", "--check").code == 3
    assert not (folder / LOCK_FILE).exists()
    outboxkit("schema", "lock")
    assert outboxkit("schema", "lock", "--check").code == 0


def test_schemas_are_registered_in_a_real_registry_and_checked_against_it(
    outboxkit: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"Order{os.urandom(6).hex()}"
    (folder / "order.avsc").write_text(_text(name, ID))
    url = server.find().url

    assert "would become version 1" in outboxkit("schema", "register", "--registry", url, "--dry-run").out
    assert f"shop.{name} is version 1 (id " in outboxkit("schema", "register", "--registry", url).out
    assert "is registered" in outboxkit("schema", "register", "--registry", url).out

    (folder / "order.avsc").write_text(_text(name, ID, MUST))
    assert outboxkit("schema", "check", "--against", url).code == 3
    assert outboxkit("schema", "register", "--registry", url).code == 1
    assert outboxkit("schema", "check", "--against", "registry").code == 2
    monkeypatch.setenv("OUTBOXKIT_REGISTRY_URL", url)
    assert outboxkit("schema", "check", "--against", "registry").code == 3


def test_the_matrix_tells_which_version_reads_which(outboxkit: Run, folder: Path) -> None:
    outboxkit("schema", "lock")
    (folder / "order.avsc").write_text(_text("Order", ID, MUST | {"default": 1}))
    outboxkit("schema", "lock")

    said = json.loads(outboxkit("schema", "compat-matrix", "shop.Order", "--json").out)

    assert said == {"subject": "shop.Order", "versions": [1, 2], "reads": [[True, True], [True, True]]}
    assert outboxkit("schema", "compat-matrix", "shop.Nothing").code == 1


def test_a_difference_is_told_in_both_directions(outboxkit: Run, folder: Path) -> None:
    (folder / "new.avsc").write_text(_text("Order", MUST))

    said = outboxkit("schema", "diff", folder / "order.avsc", folder / "new.avsc")

    assert said.code == 3
    assert "New readers, old messages: breaks" in said.out
    assert "Old readers, new messages: breaks" in said.out
    assert outboxkit("schema", "diff", folder / "order.avsc", folder / "order.avsc").code == 0


def test_advice_is_given(outboxkit: Run, folder: Path) -> None:
    (folder / "order.avsc").write_text(_text("Order", {"name": "id", "type": ["null", "string"]}))

    said = outboxkit("schema", "lint")

    assert said.code == 3
    assert "optional-default at /fields/0" in said.out


@pytest.fixture
def message(folder: Path) -> bytes:
    schema = parse(_text("Order", ID))
    body = encode(schema, {"id": "o-1"})
    return write_frame(FrameKind.SINGLE_OBJECT, body, fingerprint=fingerprint(schema))[0]


def test_a_message_is_decoded(outboxkit: Run, folder: Path, message: bytes) -> None:
    (folder / "message").write_bytes(message.hex().encode())

    said = outboxkit("schema", "decode", folder / "message", "--encoding", "hex")

    assert json.loads(said.out) == {"id": "o-1"}


def test_a_message_that_cannot_be_read_is_explained(outboxkit: Run, folder: Path, message: bytes) -> None:
    (folder / "new.avsc.txt").write_text(_text("Order", ID, MUST))
    (folder / "message").write_bytes(message)

    said = outboxkit("schema", "explain", folder / "message", "--reader", folder / "new.avsc.txt")

    assert said.code == 3
    for part in ("single-object", "shop.Order", "READER_FIELD_MISSING_DEFAULT_VALUE at Order.must", "path", "must"):
        assert part in said.out
    assert outboxkit("schema", "explain", folder / "message").code == 0


def test_a_cut_message_is_explained_with_its_offset_in_the_whole_message(
    outboxkit: Run, folder: Path, message: bytes
) -> None:
    (folder / "message").write_bytes(message[:-1])

    said = outboxkit("schema", "explain", folder / "message")

    assert said.code == 3
    assert "offset        10" in said.out
    assert "path          id" in said.out


def test_what_is_stored_is_held_against_the_new_file(outboxkit: Run, folder: Path, tmp_path: Path) -> None:
    """A released version that is not the latest any more, but still waits in the outbox."""
    url = f"sqlite:///{tmp_path / 'app.db'}"
    assert outboxkit("--database-url", url, "init").code == 0
    outboxkit("schema", "lock")
    row = {"shard": 0, "message_id": uuid.uuid4(), "topic": "orders", "type": "order", "kind": "event"}
    row |= {"payload": b"", "headers": b"\0\0", "content_type": "avro/binary", "schema_fingerprint": _digest(ID)}
    with create_engine(url).begin() as connection:
        connection.execute(insert(tables.outbox_messages).values(**row, occurred_at=dt.datetime.now(dt.UTC)))

    assert outboxkit("--database-url", url, "schema", "check", "--against", "stored").code == 0
    (folder / "order.avsc").write_text(_text("Order", ID, MUST))
    said = outboxkit("--database-url", url, "schema", "check", "--against", "stored", "--mode", "BACKWARD")

    assert said.code == 3
    assert f"against: stored messages (schema {_digest(ID)})" in said.out


def test_a_foreign_message_that_waits_for_its_next_try_names_its_schema_by_a_number(
    outboxkit: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"Order{os.urandom(6).hex()}"
    registry = ConfluentRegistry(server.find().url)
    number = registry.register(f"shop.{name}", _text(name, ID)).schema_id or 0
    url = f"sqlite:///{tmp_path / 'app.db'}"
    assert outboxkit("--database-url", url, "init").code == 0
    payload, _ = write_frame(FrameKind.CONFLUENT_ID, b"\x06o-1", schema_id=number)
    row: dict[str, Any] = {
        "consumer": "c",
        "topic": "orders",
        "headers": pack_headers(()),
        "payload": payload,
        "reason": "retry",
    }
    row |= {"origin": "orders[0]@1", "partition": 0, "offset": 1, "attempts": 1}
    with create_engine(url).begin() as connection:
        connection.execute(insert(tables.inbox_waiting).values(**row))
    (folder / "order.avsc").write_text(_text(name, ID, MUST))

    unknown = outboxkit("--database-url", url, "schema", "check", "--against", "stored")
    monkeypatch.setenv("OUTBOXKIT_REGISTRY_URL", server.find().url)
    said = outboxkit("--database-url", url, "schema", "check", "--against", "stored")

    assert (unknown.code, unknown.err) == (
        0,
        f"warning: stored messages name the schema {number}, which nobody knows\n",
    )
    assert said.code == 3
    assert f"against: stored messages (schema {number})" in said.out


def test_the_fixture_for_test_suites_fails_a_test_that_breaks_a_schema(outboxkit: Run, folder: Path) -> None:
    outboxkit("schema", "lock")
    assert _gate(folder).passed

    (folder / "order.avsc").write_text(_text("Order", ID, MUST))

    with pytest.raises(pytest.fail.Exception, match="READER_FIELD_MISSING_DEFAULT_VALUE"):
        _gate(folder)
