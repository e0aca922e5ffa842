"""The plugin's fixtures, for this folder only: other folders have fixtures of the same names."""

from __future__ import annotations

import pytest
from sqlalchemy import MetaData

from outboxkit.testing.plugin import (  # noqa: F401
    harness,
    outbox,
    outbox_async_sessions,
    outbox_engine,
    outbox_session,
)
from tests.unit.testing.shop import Base


@pytest.fixture
def outbox_metadata() -> MetaData:
    return Base.metadata
