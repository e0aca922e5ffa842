"""A registry with Confluent's HTTP API (Confluent, Apicurio, Karapace, Redpanda, …), by a thin client of its own.

Thin because it must be careful rather than complete: it follows no redirect, takes no answer that is too long or too
slow, and holds every id to the schema that it once stood for. Everything that was seen is kept, on disk too if a folder
is given: a consumer that has met its schemas keeps working while the registry is away, also after a restart.

Reading order: `client` (what is asked), `cache` (what was seen), `http` (one request within bounds).
"""

from __future__ import annotations

from outboxkit.registries import Registry
from outboxkit.registries.confluent.client import MAX_REFERENCES, MAX_REMEMBERED, MAX_SEARCHED, ConfluentRegistry
from outboxkit.registries.confluent.http import MAX_ANSWER, RegistryLogin

__all__ = [
    "MAX_ANSWER",
    "MAX_REFERENCES",
    "MAX_REMEMBERED",
    "MAX_SEARCHED",
    "ConfluentRegistry",
    "RegistryLogin",
    "registry",
]


def registry(url: str) -> Registry:
    """The registry behind ``confluent+https://user:password@host/path`` or ``https://…``."""
    return ConfluentRegistry(url.removeprefix("confluent+"))
