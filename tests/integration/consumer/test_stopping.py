"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_stopping import *  # noqa: F403
