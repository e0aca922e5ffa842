"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_once import *  # noqa: F403
from tests.unit.test_inbox import *  # noqa: F403
