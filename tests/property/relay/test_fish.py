"""The net must catch known fish: nine wrong relays, each found by the same simulation within a few seeds."""

from __future__ import annotations

import itertools

import pytest

from tests.property.relay.fish import (
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
from tests.property.relay.simulation import Outcome, World, simulate

MOST = 2_000  # seeds: each is caught much earlier


@pytest.mark.parametrize(
    ("fish", "world", "wrong"),
    [
        (PublishBeforeClaim, World, "I2"),
        (CursorOnPosition, World, "stuck"),  # what it lost stays in the table
        (SnapshotKept, World, "stuck"),
        (SkipFailedHead, World, "I3"),
        (SettleBeyondThePrefix, World, "I1"),
        (FenceThatDoesNotLock, World, "I10"),
        (ReleaseAtOnce, Careless, "I3"),
        (HoldOnlyTheMessage, World, "I3"),
        (LookTooEarly, World, "I3"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_a_wrong_relay_is_caught(fish: type[Process], world: type[World], wrong: str) -> None:
    caught = first_seed(fish, world, wrong)

    assert caught is not None, f"{fish.__name__} got through {MOST} seeds"
    assert not simulate(caught.seed).wrongs, "the right relay is right under the same seed"


def first_seed(fish: type[Process], world: type[World], wrong: str) -> Outcome | None:
    outcomes = (simulate(seed, fish, world) for seed in itertools.islice(itertools.count(1), MOST))
    return next((outcome for outcome in outcomes if any(text.startswith(wrong) for text in outcome.wrongs)), None)
