"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_not_handled import *  # noqa: F403
from tests.unit.consumer.test_not_handled import _quick  # noqa: F401
