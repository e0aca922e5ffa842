"""Statistics of a consumer: what makes it ready, and bounds."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from outboxkit.consumer.observe import stats
from outboxkit.rows import CutOff, Dependency


@pytest.mark.parametrize("of", [Dependency.DATABASE, Dependency.REGISTRY])
def test_a_consumer_without_database_or_registry_is_not_ready(of: Dependency) -> None:
    tally = stats.Tally()
    tally.began()
    tally.found(Dependency.BROKER)
    tally.phase = stats.Phase.RUNNING
    assert not stats.why_not_ready(tally.stats("billing", 1))

    assert tally.lost(of, "OperationalError")
    assert not tally.lost(of, "OperationalError")  # it is said once

    assert stats.why_not_ready(tally.stats("billing", 1)) == f"billing: the {of} is away: OperationalError"
    assert tally.found(of)
    tally.heard -= 16
    assert "the database has not answered for 16 s" in stats.why_not_ready(tally.stats("billing", 1))


def test_types_that_nobody_handles_are_counted_within_a_bound() -> None:
    tally = stats.Tally()
    first = [tally.ignore("orders", f"type-{number}") for number in range(600)]

    assert first.count(True) == 500
    assert tally.ignored[stats.OTHER_TYPES] == 100
    assert len(tally.ignored) == 501


def test_what_another_version_wrote_beside_a_heartbeat_is_still_told() -> None:
    found = CutOff.from_text("the broker is away", datetime.now(UTC))

    assert found is not None
    assert (found.of, found.reason) == (Dependency.BROKER, "the broker is away")
