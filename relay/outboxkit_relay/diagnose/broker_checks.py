"""Checks of the brokers: each examines itself (`outboxkit.brokers.examine`) for what the database says goes there."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from sqlalchemy import select, union

from outboxkit import tables
from outboxkit._legible import Lost, legible
from outboxkit.brokers import Expected, examine
from outboxkit.findings import Finding
from outboxkit.inbox.rename import IS_START
from outboxkit.message import MessageLimits
from outboxkit_relay.sections import DestinationSettings

if TYPE_CHECKING:
    from outboxkit_relay.diagnose.patient import Patient

__all__ = ["CHECKS"]

_LEDGER: Final = tables.outbox_ledger.c
_LATEST: Final = 1_000  # batches
_PATTERN: Final = frozenset("*?[")


def check_brokers(patient: Patient) -> Iterator[Finding]:
    """Examines every broker of the settings for the destinations that are on it."""
    settings = patient.settings
    default, *_ = settings.broker_names()
    used = _used(patient)
    topics = _topics(patient) | used.keys()
    subscribed = {name for one in patient.subscriptions for name in one.topics}
    for broker in settings.broker_names():
        mine = frozenset(name for name in topics | subscribed if (_of(patient, name).broker or default) == broker)
        expected = Expected(
            topics=mine,
            subscriptions=patient.subscriptions if broker == default else (),
            consumers=_consumers(patient),
            payload_bytes=MessageLimits().payload,
            remembered=settings.retention.inbox,
            partitions={name: count for name in mine if (count := _of(patient, name).partitions)},
            used_partitions=used,
        )
        yield from examine(settings.address_of(broker), expected, settings.options_of(broker))


def _of(patient: Patient, topic: str) -> DestinationSettings:
    """The settings of a destination: under its name, else the longest pattern that fits, as relays find them."""
    known = patient.settings.destinations
    fitting = [name for name in known if name == topic or fnmatchcase(topic, name)]
    return known[max(fitting, key=lambda name: (name == topic, len(name)))] if fitting else DestinationSettings()


def _topics(patient: Patient) -> set[str]:
    """Destinations that have messages now, and those that the settings name."""
    every = union(select(tables.outbox_messages.c.topic), select(tables.outbox_waiting.c.topic))
    named = {name for name in patient.settings.destinations if not _PATTERN & set(name)}
    topics = patient.connection.execute(select(legible(every.subquery().c.topic))).scalars()
    return {*(topic for topic in topics if not isinstance(topic, Lost)), *named}


def _used(patient: Patient) -> dict[str, int]:
    """Destinations of the latest batches -> how many partitions these went to, by the highest number."""
    latest = select(_LEDGER.topic, _LEDGER.partitions).order_by(_LEDGER.id.desc()).limit(_LATEST)
    found: dict[str, int] = {}
    for topic, partitions in patient.connection.execute(latest):
        found[topic] = max(found.get(topic, 0), *(number + 1 for number in partitions))
    return found


def _consumers(patient: Patient) -> tuple[str, ...]:
    starts = tables.inbox_consumers.c
    started = patient.connection.scalars(select(starts.consumer).where(IS_START).distinct())
    return tuple(sorted({*started, *(one.consumer for one in patient.subscriptions if one.consumer)}))


CHECKS: Final = (check_brokers,)
