"""Everything that holds on SQLite, on PostgreSQL."""

from tests.unit.consumer.test_failures import *  # noqa: F403
from tests.unit.consumer.test_failures import _quick  # noqa: F401
from tests.unit.consumer.test_once import *  # noqa: F403
from tests.unit.consumer.test_inbox import *  # noqa: F403
from tests.unit.consumer.test_replay import *  # noqa: F403
from tests.unit.consumer.test_replay import _disarmed  # noqa: F401
