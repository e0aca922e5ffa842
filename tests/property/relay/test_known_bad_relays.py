"""The simulation must catch nine wrong relays, each within its seeds."""

from __future__ import annotations

import itertools

import pytest

from tests.conftest import PROFILE
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
# Where each was caught last: the short profile looks there first, and searches when the simulation has changed since.
CAUGHT = {
    FenceThatDoesNotLock: 211,
    HoldOnlyTheMessage: 526,
    LookTooEarly: 657,
    PublishBeforeClaim: 354,
    ReleaseAtOnce: 954,
    SnapshotKept: 703,
}


@pytest.mark.parametrize(
    ("relay", "world", "wrong"),
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
def test_a_wrong_relay_is_caught(relay: type[Process], world: type[SimulatedCluster], wrong: str) -> None:
    caught = first_seed(relay, world, wrong)

    assert caught is not None, f"{relay.__name__} got through {MAX} seeds"
    assert not simulate(caught.seed).wrongs, "the right relay is right under the same seed"


def first_seed(relay: type[Process], world: type[SimulatedCluster], wrong: str) -> Outcome | None:
    known = [CAUGHT[relay]] if relay in CAUGHT and PROFILE != "full" else []
    outcomes = (simulate(seed, relay, world) for seed in itertools.chain(known, range(1, MAX)))
    return next((outcome for outcome in outcomes if any(text.startswith(wrong) for text in outcome.wrongs)), None)
