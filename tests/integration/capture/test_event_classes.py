"""Every kind of event class is written alike: a dataclass, a msgspec Struct, a pydantic model, a TypedDict, a dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from sqlalchemy.orm import Session

from outboxkit import event, publish
from outboxkit.headers import unpack_headers
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


@event("seat.taken", version=2)
@dataclass(frozen=True)
class Plain:
    row: int
    place: str


@event("seat.taken", version=2)
class Struct(msgspec.Struct, frozen=True):
    row: int
    place: str


@event("seat.taken", version=2)
class Model(pydantic.BaseModel):
    row: int
    place: str


class Typed(TypedDict):
    row: int
    place: str


MADE: dict[str, Callable[[], Any]] = {
    "dataclass": lambda: Plain(4, "b"),
    "msgspec": lambda: Struct(4, "b"),
    "pydantic": lambda: Model(row=4, place="b"),
    "TypedDict": lambda: Typed(row=4, place="b"),
    "dict": lambda: {"row": 4, "place": "b"},
}


@pytest.mark.parametrize("later", [True, False], ids=["function", "value"])
@pytest.mark.parametrize("kind", list(MADE))
def test_a_class_of_each_kind_is_written_with_its_name_and_version(
    world: CaptureDatabase, kind: str, *, later: bool
) -> None:
    declared = kind in {"dataclass", "msgspec", "pydantic"}
    options: dict[str, Any] = {} if declared else {"type": "seat.taken"}

    def scenario(session: Session) -> None:
        publish(session, MADE[kind] if later else MADE[kind](), topic="seats", **options)
        session.commit()

    world.run(scenario)

    (row,) = world.rows()
    assert json.loads(row.payload) == {"row": 4, "place": "b"}
    assert (row.type, row.topic, row.content_type) == ("seat.taken", "seats", "application/json")
    version = b"2" if declared else b"1"
    assert dict(unpack_headers(row.headers))["ce_dataschema"] == b"urn:outboxkit:seat.taken:" + version
