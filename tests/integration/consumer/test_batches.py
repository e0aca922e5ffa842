"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_batches import *  # noqa: F403
from tests.unit.consumer.test_batches import _quick  # noqa: F401
