"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_cost import *  # noqa: F403
