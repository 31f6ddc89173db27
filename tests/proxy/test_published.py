"""What the proxy knows of the memories in which embeddings are. No clock, no I/O."""

from __future__ import annotations

import pytest

from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.published import Published
from chiasm.wire import ECPlace, Role

from .placed_fleet import PIXELS, add, costs


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def peer(fleet: Fleet, name: str, engine_id: str = "first") -> Instance:
    """An encoder that serves embeddings from its memory."""
    place = ECPlace(host=name, port=1, engine_id=engine_id)
    return add(fleet, name, Role.ENCODER, known=costs(), ec_store="", ec_connector="TcpConnector", ec_place=place)


def item(name: str) -> ItemWork:
    return ItemWork(name, PIXELS)


def test_what_an_encoder_publishes_is_where_all_find_it_if_it_has_no_place(fleet: Fleet) -> None:
    one, two = add(fleet, "1", Role.ENCODER), add(fleet, "2", Role.ENCODER)
    published = Published()
    published.note(one, item("a"), None)
    assert "a" in published.at(two)


def test_what_an_encoder_has_in_its_memory_only_it_has(fleet: Fleet) -> None:
    one, two = peer(fleet, "1"), peer(fleet, "2")
    published = Published()
    published.note(one, item("a"), False)
    assert "a" in published.at(one)
    assert "a" not in published.at(two)


def test_a_restarted_encoder_has_nothing(fleet: Fleet) -> None:
    one = peer(fleet, "1")
    published = Published()
    published.note(one, item("a"), False)
    assert peer(fleet, "1", "second") is one
    assert "a" not in published.at(one)


def test_what_is_lost_is_nowhere(fleet: Fleet) -> None:
    one, two = peer(fleet, "1"), peer(fleet, "2")
    published = Published()
    for encoder in (one, two):
        published.note(encoder, item("a"), False)
    published.note_lost("a")
    assert "a" not in published.at(one)
    assert "a" not in published.at(two)


def test_an_embedding_that_is_not_there_any_more_tells_what_the_memory_holds(fleet: Fleet) -> None:
    one = peer(fleet, "1")
    published = Published()
    for n in range(10):
        published.note(one, item(str(n)), False)
    published.note(one, item("2"), False)  # it was expected, but the encoder had to encode it again: seven are newer
    assert [n for n in range(10) if str(n) in published.at(one)] == [2, 4, 5, 6, 7, 8, 9]


def test_one_embedding_that_is_gone_does_not_mean_that_all_are(fleet: Fleet) -> None:
    one = peer(fleet, "1")
    published = Published()
    for n in range(10):
        published.note(one, item(str(n)), False)
    published.note(one, item("9"), False)
    assert len(published.at(one)) == 5


def test_a_memory_that_holds_more_than_expected_is_found_out(fleet: Fleet) -> None:
    one = peer(fleet, "1")
    published = Published()
    for n in range(4):
        published.note(one, item(str(n)), False)
    published.note(one, item("3"), False)
    assert len(published.at(one)) == 2
    published.note(one, item("0"), True)
    assert len(published.at(one)) == 3
