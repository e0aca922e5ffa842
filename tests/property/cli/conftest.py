"""The same place for a command line as in the unit tests."""

from tests.unit.relay.cli.conftest import _own_place, engine, outboxkit

__all__ = ["_own_place", "engine", "outboxkit"]
