"""Kafka's answer to Metadata, with other addresses for its brokers."""

from __future__ import annotations

import pytest

from outboxkit_relay.demo.kafka_metadata import BrokerAddresses, with_addresses

PORTS = {("broker-one", 9092): ("127.0.0.1", 7001), ("two", 65_000): ("127.0.0.1", 7002)}


def _text(text: str, *, flexible: bool) -> bytes:
    size = bytes([len(text) + 1]) if flexible else len(text).to_bytes(2, "big")
    return size + text.encode()


def _answer(version: int, brokers: list[tuple[str, int]]) -> bytes:
    """An answer to Metadata as a broker of this version writes it, by the protocol's own description."""
    flexible = version >= 9
    frame = (77).to_bytes(4, "big")
    frame += b"\x01\x00\x02ab" if flexible else b""  # one tag, that nobody knows
    frame += (5).to_bytes(4, "big") if version >= 3 else b""
    frame += bytes([len(brokers) + 1]) if flexible else len(brokers).to_bytes(4, "big")
    for number, (host, port) in enumerate(brokers):
        frame += number.to_bytes(4, "big") + _text(host, flexible=flexible) + port.to_bytes(4, "big")
        if version >= 1:
            no_rack = b"\x00" if flexible else b"\xff\xff"
            frame += no_rack if number else _text("rack", flexible=flexible)
        frame += b"\x00" if flexible else b""
    return frame + b"the cluster's id, the topics, and so on"


@pytest.mark.parametrize("version", [0, 1, 2, 3, 8, 9, 12, 13])
def test_an_answer_is_the_same_but_for_the_addresses(version: int) -> None:
    answer = _answer(version, list(PORTS))

    assert BrokerAddresses(answer, version).addresses == list(PORTS)
    assert with_addresses(answer, version, PORTS) == _answer(version, list(PORTS.values()))


def test_a_long_host_has_a_size_of_two_bytes() -> None:
    long = "b" * 200
    frame = _answer(9, [("?", 1)]).replace(b"\x02?", b"\xc9\x01" + long.encode())

    assert BrokerAddresses(frame, 9).addresses == [(long, 1)]
