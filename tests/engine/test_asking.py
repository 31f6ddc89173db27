"""Whatever has arrived and is needed is asked for, and nothing else without a reason."""

from __future__ import annotations

import random

import pytest

from chiasm.engine.asking import Asking

NAMES = "abcdef"


class Connector:
    """What has arrived, and an engine that asks for what it needs after each event."""

    def __init__(self) -> None:
        self.asking = Asking()
        self.arrived: set[str] = set()
        self.needed: list[str] = []
        self.num_asked = 0

    def arrive(self, name: str) -> None:
        self.arrived.add(name)
        self.asking.note_arrival(name)

    def update(self) -> None:
        names = self.asking.begin(self.needed)
        for name in [name for name in self.needed if names is None or name in names]:
            self.num_asked += 1
            if name in self.arrived:
                self.arrived.remove(name)
                self.needed.remove(name)
                self.asking.note_present(name)
            elif names is None:
                self.asking.note_absent(name)
            else:
                self.asking.ask_all()


def test_only_what_has_arrived_is_asked_for_as_long_as_the_same_is_needed() -> None:
    connector = Connector()
    connector.needed = list(NAMES)
    connector.update()
    for name in reversed(NAMES):
        connector.arrive(name)
        connector.update()
    assert connector.needed == []
    assert connector.num_asked == 2 * len(NAMES)


def test_what_arrives_while_it_is_not_needed_is_asked_for_when_it_is_needed_again() -> None:
    connector = Connector()
    connector.needed = ["a"]
    connector.update()
    connector.needed = []
    connector.arrive("a")
    connector.update()
    connector.needed = ["a"]
    connector.update()
    assert connector.needed == []


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_has_arrived_and_is_needed_is_left_in_any_order_of_events(seed: int) -> None:
    chance, connector = random.Random(seed), Connector()
    for _ in range(500):
        if chance.random() < 0.5:
            connector.arrive(chance.choice(NAMES))
        else:
            connector.needed = chance.sample(NAMES, chance.randrange(len(NAMES)))
        connector.update()
        assert connector.arrived.isdisjoint(connector.needed)
