"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_boundary import *  # noqa: F403
from tests.unit.consumer.test_boundary import _quick  # noqa: F401
