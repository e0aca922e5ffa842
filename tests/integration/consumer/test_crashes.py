"""A process may die anywhere, on PostgreSQL."""

from tests.unit.consumer.test_crashes import *  # noqa: F403
