"""The net must catch known fish: nine wrong relays, each found by the same simulation within a few seeds."""

from __future__ import annotations

import itertools

import pytest

from tests.property.relay.known_bad_relays import (
    Careless,
    CursorOnPosition,
    FenceThatDoesNotLock,
    HoldOnlyTheMessage,
    LookTooEarly,
    PublishBeforeClaim,
    ReleaseAtOnce,
    SettleBeyondThePrefix,
    SkipFailedHead,
    SnapshotKept,
)
from tests.property.relay.process import Process
from tests.property.relay.simulation import Outcome, SimulatedCluster, simulate

MAX = 2_000  # seeds: each is caught much earlier


@pytest.mark.parametrize(
    ("fish", "world", "wrong"),
    [
        (PublishBeforeClaim, SimulatedCluster, "I2"),
        (CursorOnPosition, SimulatedCluster, "stuck"),  # what it lost stays in the table
        (SnapshotKept, SimulatedCluster, "stuck"),
        (SkipFailedHead, SimulatedCluster, "I3"),
        (SettleBeyondThePrefix, SimulatedCluster, "I1"),
        (FenceThatDoesNotLock, SimulatedCluster, "I10"),
        (ReleaseAtOnce, Careless, "I3"),
        (HoldOnlyTheMessage, SimulatedCluster, "I3"),
        (LookTooEarly, SimulatedCluster, "I3"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_a_wrong_relay_is_caught(fish: type[Process], world: type[SimulatedCluster], wrong: str) -> None:
    caught = first_seed(fish, world, wrong)

    assert caught is not None, f"{fish.__name__} got through {MAX} seeds"
    assert not simulate(caught.seed).wrongs, "the right relay is right under the same seed"


def first_seed(fish: type[Process], world: type[SimulatedCluster], wrong: str) -> Outcome | None:
    outcomes = (simulate(seed, fish, world) for seed in itertools.islice(itertools.count(1), MAX))
    return next((outcome for outcome in outcomes if any(text.startswith(wrong) for text in outcome.wrongs)), None)
