"""What holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_replay import *  # noqa: F403
from tests.unit.consumer.test_replay import _disarmed, _quick  # noqa: F401
