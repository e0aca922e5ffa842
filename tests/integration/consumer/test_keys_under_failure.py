"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_keys_under_failure import *  # noqa: F403
from tests.unit.consumer.test_keys_under_failure import _quick  # noqa: F401
