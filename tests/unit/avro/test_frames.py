"""How a message names its schema: golden bytes, every frame there and back, and no guessing."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from outboxkit.avro import FrameKind, fingerprint, read_frame, write_frame
from outboxkit.avro.model.parse import parse
from outboxkit.errors import DecodeError, EncodeError

GUID = UUID("00112233-4455-6677-8899-aabbccddeeff")
DIGEST = bytes.fromhex("a92de1f8a242f53d")
NAMES: dict[FrameKind, dict[str, Any]] = {
    FrameKind.CONFLUENT_ID: {"schema_id": 41},
    FrameKind.CONFLUENT_GUID: {"guid": GUID},
    FrameKind.CONFLUENT_ID_HEADER: {"schema_id": 41},
    FrameKind.CONFLUENT_GUID_HEADER: {"guid": GUID},
    FrameKind.SINGLE_OBJECT: {"fingerprint": DIGEST},
    FrameKind.FINGERPRINT_HEADER: {"fingerprint": DIGEST},
    FrameKind.BARE: {},
}


def test_golden_bytes() -> None:
    assert write_frame(FrameKind.CONFLUENT_ID, b"abc", schema_id=41) == (b"\x00\x00\x00\x00\x29abc", ())
    assert write_frame(FrameKind.CONFLUENT_GUID, b"abc", guid=GUID)[0] == b"\x01" + GUID.bytes + b"abc"
    assert write_frame(FrameKind.SINGLE_OBJECT, b"abc", fingerprint=DIGEST)[0] == b"\xc3\x01" + DIGEST + b"abc"
    assert write_frame(FrameKind.CONFLUENT_ID_HEADER, b"abc", schema_id=41) == (
        b"abc",
        (("__value_schema_id", b"\x00\x00\x00\x00\x29"),),
    )
    assert write_frame(FrameKind.CONFLUENT_GUID_HEADER, b"abc", guid=GUID, part="key") == (
        b"abc",
        (("__key_schema_id", b"\x01" + GUID.bytes),),
    )
    assert write_frame(FrameKind.FINGERPRINT_HEADER, b"abc", fingerprint=DIGEST) == (
        b"abc",
        (("outboxkit-schema", b"a92de1f8a242f53d"),),
    )


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("kind", FrameKind)
def test_what_is_written_is_read(kind: FrameKind, *, pinned: bool) -> None:
    if kind is FrameKind.BARE and not pinned:
        return
    data, headers = write_frame(kind, b"\x00body", **NAMES[kind])

    frame = read_frame(data, headers, pinned=kind if pinned else None)

    assert (frame.kind, frame.payload) == (kind, b"\x00body")
    found = {"schema_id": frame.schema_id, "guid": frame.guid, "fingerprint": frame.fingerprint}
    assert {name: value for name, value in found.items() if value is not None} == NAMES[kind]
    assert data[frame.offset :] == frame.payload


def test_headers_win_over_prefixes() -> None:
    frame = read_frame(b"\x00\x00\x00\x00\x07x", {"__value_schema_id": b"\x00\x00\x00\x00\x29"})

    assert (frame.schema_id, frame.payload) == (41, b"\x00\x00\x00\x00\x07x")


def test_a_pinned_prefix_does_not_look_at_headers_and_the_reverse() -> None:
    headers = {"__value_schema_id": b"\x00\x00\x00\x00\x29"}

    assert read_frame(b"\x00\x00\x00\x00\x07x", headers, pinned=FrameKind.CONFLUENT_ID).schema_id == 7
    with pytest.raises(DecodeError, match="no schema is named"):
        read_frame(b"\x00\x00\x00\x00\x07x", pinned=FrameKind.CONFLUENT_ID_HEADER)


def test_another_frame_than_the_pinned_one_is_refused() -> None:
    with pytest.raises(DecodeError, match="pinned to single-object"):
        read_frame(b"\x00\x00\x00\x00\x07x", pinned=FrameKind.SINGLE_OBJECT)


def test_a_key_has_its_own_header() -> None:
    headers = {"__key_schema_id": b"\x00\x00\x00\x00\x29", "outboxkit-schema": b"a92de1f8a242f53d"}

    assert read_frame(b"k", headers, part="key").schema_id == 41
    assert read_frame(b"v", headers).fingerprint == DIGEST


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if NAMES[kind]])
def test_a_frame_without_its_name_is_not_written(kind: FrameKind) -> None:
    with pytest.raises(EncodeError):
        write_frame(kind, b"abc")


@pytest.mark.parametrize("number", [0, -1, 2**31])
def test_an_impossible_id_is_not_written(number: int) -> None:
    with pytest.raises(EncodeError):
        write_frame(FrameKind.CONFLUENT_ID, b"abc", schema_id=number)


def test_the_fingerprint_of_a_single_object_is_the_schemas() -> None:
    digest = fingerprint(parse('"int"'))

    data, _ = write_frame(FrameKind.SINGLE_OBJECT, b"\x02", fingerprint=digest)

    assert data.hex() == "c301" + "8f5c393f1ad57572" + "02"
