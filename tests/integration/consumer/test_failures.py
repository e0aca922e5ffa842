"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_failures import *  # noqa: F403
from tests.unit.consumer.test_failures import _quick  # noqa: F401
