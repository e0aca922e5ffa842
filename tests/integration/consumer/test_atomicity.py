"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_atomicity import *  # noqa: F403
from tests.unit.consumer.test_atomicity import _quick  # noqa: F401
