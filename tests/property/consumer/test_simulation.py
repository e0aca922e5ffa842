"""The consumer's core in a simulated world: one effect or one letter each, in order; wrong consumers are caught."""

from __future__ import annotations

import pytest

from tests.property.consumer.known_bad_consumers import BAD
from tests.property.consumer.simulation import Process, SimulatedWorld

SEEDS = 300
CATCHING = 400


def test_every_message_has_one_effect_or_one_letter_whatever_dies() -> None:
    wrong = {seed: found for seed in range(SEEDS) if (found := SimulatedWorld(seed).run())}

    assert wrong == {}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_a_wrong_consumer_is_caught(bad: type[Process]) -> None:
    assert any(SimulatedWorld(seed, bad).run() for seed in range(CATCHING)), "the simulation is blind to it"


def test_the_same_seed_is_the_same_run() -> None:
    one, two = SimulatedWorld(7), SimulatedWorld(7)

    assert one.run() == two.run()
    assert (one.database.effects, one.deaths) == (two.database.effects, two.deaths)


def test_the_faults_really_happen() -> None:
    worlds = [SimulatedWorld(seed) for seed in range(40)]
    for world in worlds:
        world.run()

    assert sum(world.deaths for world in worlds) > 40
    assert sum(world.rebalances for world in worlds) > 40
    assert any(world.database.letters for world in worlds)
