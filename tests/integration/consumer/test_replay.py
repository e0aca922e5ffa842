"""What holds on SQLite, on PostgreSQL."""

from tests.unit.dead_letters.test_replay import *  # noqa: F403
from tests.unit.dead_letters.test_replay import _disarmed, _quick  # noqa: F401
