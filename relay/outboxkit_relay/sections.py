"""Sections of the settings: what each part of the daemon and the command line can be told, with its default."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from outboxkit.policy import Followers, Order, duration

__all__ = [
    "BrokerSettings",
    "CircuitSettings",
    "DestinationSettings",
    "Duration",
    "LogSettings",
    "ProbeSettings",
    "RelaySettings",
    "Retention",
]

Duration = Annotated[timedelta, BeforeValidator(lambda value: duration(value) if isinstance(value, str) else value)]


def _rate(value: object) -> object:
    """Messages a second, from a text such as ``200/s``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h)", value.strip()) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        raise ValueError("expected a rate such as 200/s, 5000/m or 100/h")
    return value if match is None else float(match[1]) / {"s": 1, "m": 60, "h": 3600}[match[2]]


Rate = Annotated[float, BeforeValidator(_rate), Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CircuitSettings(_Section):
    """``[relay.circuit]`` and ``[destinations.NAME.circuit]``: when a destination that refuses is left alone."""

    failure_rate: float = Field(
        0.5, gt=0, le=1, description="share of the messages in `window` that must be refused to open it"
    )
    window: Duration = Field(timedelta(seconds=30), description="how far the circuit looks back")
    open_for: Duration = Field(timedelta(seconds=5), description="how long it stays open before a few messages probe")


class RelaySettings(_Section):
    """``[relay]``: how the daemon publishes."""

    batch_size: int = Field(1000, ge=1, le=10_000, description="rows read, claimed and settled together")
    window: int = Field(8, ge=1, le=64, description="batches in flight for one destination")
    lease: Duration = Field(timedelta(seconds=10), description="how long the others wait before they take over")
    drain: Duration = Field(timedelta(seconds=20), description="how long a stop waits for messages in flight")
    patience: Duration = Field(timedelta(seconds=30), description="a batch not answered for so long is sent again")
    wake: Literal["poll", "notify"] = Field(
        "poll",
        description="notify: PostgreSQL wakes it when writers call commit_hooks.notify; it polls, too",
    )
    poll_slowest: Duration = Field(timedelta(milliseconds=250), description="the longest pause between two idle reads")
    order: Order | None = Field(
        None, description="pipelined or strict; default: pipelined on Kafka, strict on RabbitMQ"
    )
    on_dead: Followers = Field(Followers.PARK, description="followers of a dead head: park, skip or block")
    retry_base: Duration = Field(timedelta(milliseconds=100), description="full jitter: base of the delay")
    retry_cap: Duration = Field(timedelta(seconds=5), description="full jitter: the longest delay")
    retry_attempts: int = Field(8, ge=1, le=1000, description="tries after the first before a message is dead")
    allowed_destinations: tuple[str, ...] = Field(
        (), description="names and patterns (payments.*); a message for another one is dead; default: all are allowed"
    )
    circuit: CircuitSettings = Field(default_factory=CircuitSettings)


class DestinationSettings(_Section):
    """``[destinations.NAME]``: how each relay uses a topic or queue, or all that fit a pattern (``"payments.*"``)."""

    broker: str = Field("", description="which of [brokers] it is on; default: the default broker")
    rate: Rate | None = Field(None, description="messages per time: 200/s, 5000/m; default: as fast as it goes")
    in_flight: int | None = Field(None, ge=1, le=1_000_000, description="messages at the broker; default: the window")
    circuit: CircuitSettings | None = Field(None, description="default: [relay.circuit]")
    partitions: int | None = Field(None, ge=1, description="how many it has for good; `doctor` tells of another number")


class BrokerSettings(_Section):
    """``[brokers.NAME]``: a further broker, for the destinations that name it."""

    url: SecretStr | None = Field(None, description="as broker_url")
    url_file: Path | None = Field(None, description="a file that holds the URL; read again at each new connection")
    options: dict[str, str] = Field(default_factory=dict, description="client settings, as [broker]")
    default: bool = Field(False, description="all destinations that name no other broker are on this one")


class Retention(_Section):
    """``[retention]``: how long finished things are kept."""

    ledger: Duration = Field(timedelta(days=3), description="evidence of what was published")
    inbox: Duration = Field(timedelta(days=14), description="how long a redelivered message is recognised")
    dead_letters: Duration = Field(timedelta(days=90), description="closed dead letters")
    audit: Duration = Field(timedelta(days=365), description="who did what")
    sagas: Duration = Field(timedelta(days=90), description="sagas that are completed or compensated")
    replay_horizon: Duration = Field(
        timedelta(days=7), description="how far back messages may be delivered again: the broker's retention"
    )
    every: Duration = Field(timedelta(minutes=1), description="how often one of the relays deletes what is not kept")


class LogSettings(_Section):
    """``[log]``: what is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least severe level shown")
    format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, JSON elsewhere")


class ProbeSettings(_Section):
    """``[probes]``: ``/livez``, ``/readyz`` and ``/metrics`` of relay and consumer."""

    port: int | None = Field(None, ge=0, le=65_535, description="off unless set; 0 takes a free one and logs it")
    host: str = Field("127.0.0.1", description="the address to listen on")
    allow_remote: bool = Field(False, description="let it be an address that other machines reach: there is no login")
