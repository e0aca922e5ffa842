"""The folder of schema files and its lock file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro import Mode, fingerprint, identity
from outboxkit.errors import ConfigurationError, SchemaError
from outboxkit.registries import open_registry
from outboxkit.registries.directory import LOCK_FILE, DirectoryRegistry


def _text(name: str, *fields: tuple[str, Any]) -> str:
    made = [{"name": field, "type": kind} for field, kind in fields]
    return json.dumps({"type": "record", "name": f"shop.{name}", "fields": made})


def test_a_file_may_use_types_of_other_files_whatever_their_order(tmp_path: Path) -> None:
    (tmp_path / "a_order.avsc").write_text(_text("Order", ("total", "shop.Money")))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z_money.avsc").write_text(_text("Money", ("minor", "long")))

    files = DirectoryRegistry(tmp_path).files()

    assert [one.subject for one in files] == ["shop.Order", "shop.Money"]
    assert "shop.Money" in files[0].text


@pytest.mark.parametrize("text", ["{", _text("Order", ("total", "shop.Nowhere"))])
def test_a_file_that_is_no_schema_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.avsc").write_text(text)

    with pytest.raises(SchemaError, match=r"bad\.avsc: "):
        DirectoryRegistry(tmp_path).files()


def test_a_file_that_is_not_released_yet_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "order.avsc").write_text(_text("Order", ("id", "string")))
    registry = DirectoryRegistry(tmp_path)

    digest = fingerprint(registry.files()[0].schema).hex()

    assert json.loads(registry.resolve(digest))["name"] == "shop.Order"


def test_a_released_version_that_was_edited_is_refused(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path)
    registry.register("shop.Order", _text("Order", ("id", "string")))
    lock = tmp_path / LOCK_FILE
    lock.write_text(lock.read_text().replace('"string"', '"bytes"'))

    with pytest.raises(SchemaError, match=r"version 1 of shop\.Order was edited after its release"):
        registry.history("shop.Order")


@pytest.mark.parametrize("text", ["<<<<<<< ours", "[]", '{"format": 2, "subjects": {}}'])
def test_a_broken_lock_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)

    with pytest.raises(SchemaError, match=LOCK_FILE):
        DirectoryRegistry(tmp_path).subjects()


def test_the_lock_file_is_the_same_whoever_writes_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    texts = [_text("Order", ("id", "string")), _text("Payment", ("id", "string"))]
    for folder, order in zip(folders, (texts, list(reversed(texts))), strict=True):
        folder.mkdir()
        for text in order:
            DirectoryRegistry(folder).register(json.loads(text)["name"], text)

    assert (folders[0] / LOCK_FILE).read_bytes() == (folders[1] / LOCK_FILE).read_bytes()


def test_a_subject_has_its_own_mode(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path)
    registry.set_mode("shop.Order", Mode.NONE)
    registry.register("shop.Order", _text("Order", ("id", "string")))

    registry.register("shop.Order", _text("Order", ("id", "int")))

    assert [one.number for one in registry.history("shop.Order")] == [1, 2]
    assert registry.mode("shop.Payment") is Mode.BACKWARD


def test_a_folder_that_is_not_there_is_a_matter_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        DirectoryRegistry(tmp_path / "nowhere").register("shop.Order", _text("Order"))
    with pytest.raises(ConfigurationError, match="names no folder"):
        open_registry("directory:")
    with pytest.raises(ConfigurationError, match="no registry 'ftp'"):
        open_registry("ftp://x")


def test_our_own_contracts_are_released_and_break_nothing() -> None:
    """After a change: ``outboxkit schema lock``."""
    registry = DirectoryRegistry(Path(__file__).parents[3] / "schemas")

    assert registry.findings() == []
    released = {one.identity for subject in registry.subjects() for one in registry.history(subject)}
    assert [file.path.name for file in registry.files() if identity(file.schema) not in released] == []
