"""Which encoder an image prefers, and when it goes elsewhere. No clock, no I/O."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placement
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.rendezvous import Rendezvous
from chiasm.wire import ECPlace, Role

from .placed_fleet import ENCODE, PIXELS, add, costs

NAMES = [f"image {n}" for n in range(400)]


def fleet_of(*speeds: float) -> Fleet:
    """Encoders that serve embeddings from their memories, each on a device of its own."""
    fleet = Fleet()
    for number, speed in enumerate(speeds):
        place = ECPlace(host="h", port=1 + number, engine_id=str(number))
        more: dict[str, Any] = {"ec_store": "", "ec_connector": "TcpConnector", "ec_place": place}
        add(fleet, f"e{number}", Role.ENCODER, known=costs(speed=speed), device=f"device {number}", **more)
    return fleet


def wait(queue: EncodeQueue, name: str, request: object = None, language: Instance | None = None) -> Entry:
    entry = Entry(ItemWork(name, PIXELS), 0.0, request=request, language=language)
    queue.add(entry)
    return entry


def send(queue: EncodeQueue, name: str, now: float = 0.0, language: Instance | None = None) -> str:
    """Encode an image while nothing else is to do, and return where."""
    entry = wait(queue, name, language=language)
    (feed,) = queue.feed(now)
    queue.finish([entry], now)
    return feed.encoder.url


def homes(fleet: Fleet) -> dict[str, str]:
    queue = Placement(fleet).images
    return {name: send(queue, name) for name in NAMES}


def test_all_proxies_choose_the_same_encoder_for_an_image() -> None:
    assert homes(fleet_of(1, 1, 1, 1)) == homes(fleet_of(1, 1, 1, 1))


def test_equal_encoders_are_preferred_by_equally_many_images() -> None:
    counts = Counter(homes(fleet_of(1, 1, 1, 1)).values())
    assert sorted(counts) == [f"http://e{n}" for n in range(4)]
    assert all(75 <= count <= 125 for count in counts.values())


def test_an_image_goes_to_its_home_whichever_device_asks() -> None:
    fleet = fleet_of(1, 1)
    same: dict[str, Any] = {"ec_store": "", "ec_connector": "TcpConnector"}
    pds = [add(fleet, f"pd{number}", known=costs(), device=f"device {number}", **same) for number in range(2)]
    expected = homes(fleet_of(1, 1))
    for pd in pds:
        queue = Placement(fleet).images
        assert {name: send(queue, name, language=pd) for name in NAMES} == expected


@pytest.mark.parametrize("how", ["drained", "dead"])
def test_the_images_of_an_encoder_that_leaves_move_and_no_others(how: str) -> None:
    fleet = fleet_of(1, 1, 1, 1)
    before = homes(fleet)
    leaving = fleet.get("http://e2")
    assert leaving is not None
    with fleet.working(leaving, 1.0):
        if how == "drained":
            fleet.remove(leaving)
        else:
            fleet.fail(leaving, "gone", 0.0)
        after = homes(fleet)
    moved = {name for name in NAMES if before[name] != after[name]}
    assert moved == {name for name in NAMES if before[name] == "http://e2"}
    assert len({after[name] for name in moved}) == 3


def test_an_encoder_that_comes_back_gets_its_images_again() -> None:
    fleet = fleet_of(1, 1, 1)
    before = homes(fleet)
    encoder = fleet.get("http://e1")
    assert encoder is not None
    assert encoder.health is not None
    fleet.fail(encoder, "restarts", 0.0)
    homes(fleet)
    fleet.succeed(encoder, encoder.health)
    assert homes(fleet) == before


def test_more_images_prefer_a_faster_node() -> None:
    nodes = Rendezvous(["a", "b"], [3.0, 1.0])
    counts = Counter(nodes.best(name, [0, 1]) for name in NAMES)
    assert 270 <= counts[0] <= 330


def test_a_small_correction_of_costs_moves_no_image() -> None:
    fleet = fleet_of(1, 1, 1)
    before = homes(fleet)
    for encoder in fleet.healthy(Role.ENCODER):
        encoder.costs.learn_encode([PIXELS], ENCODE * 1.1, 0.0)
    assert homes(fleet) == before


def test_an_image_does_not_wait_for_an_encoder_at_which_it_is_ready_more_than_a_quarter_later() -> None:
    idle, queue = Placement(fleet_of(1, 1)).images, Placement(fleet_of(1, 1)).images
    first, second, third = [name for name in NAMES if send(idle, name) == "http://e0"][:3]
    wait(queue, first)
    assert [feed.encoder.url for feed in queue.feed(0.0)] == ["http://e0"]
    other = wait(queue, second)
    assert [feed.encoder.url for feed in queue.feed(0.7 * ENCODE)] == ["http://e1"]
    queue.discard(other, 0.7 * ENCODE)
    wait(queue, third)
    assert [feed.encoder.url for feed in queue.feed(0.8 * ENCODE)] == ["http://e0"]


def test_images_of_one_request_are_spread() -> None:
    queue = Placement(fleet_of(1, 1, 1, 1)).images
    for name in NAMES[:4]:
        wait(queue, name, "request")
    assert len({feed.encoder for feed in queue.feed(0.0)}) == 4


def test_an_image_that_is_published_goes_where_it_is_also_if_another_encoder_is_preferred_now() -> None:
    fleet = fleet_of(1, 1)
    queue = Placement(fleet).images
    home = send(queue, "image")
    encoder = fleet.get(home)
    assert encoder is not None
    fleet.fail(encoder, "gone", 0.0)
    assert (other := send(queue, "image")) != home
    assert encoder.health is not None
    restarted = ECPlace(host="h", port=1, engine_id="restarted")
    add(fleet, home.removeprefix("http://"), Role.ENCODER, known=costs(), **_PEER, ec_place=restarted)
    assert send(queue, "image") == other


_PEER = {"ec_store": "", "ec_connector": "TcpConnector"}


def test_an_image_that_is_asked_for_all_the_time_comes_to_a_second_encoder() -> None:
    """It is looked up so often at once that another encoder would sooner encode it."""
    queue = Placement(fleet_of(1, 1)).images
    home = send(queue, "hot")
    used: list[Instance] = []
    for n in range(600):
        queue.add(Entry(ItemWork("hot", PIXELS), 0.0, request=n))
        used += [feed.encoder for feed in queue.feed(0.0)]
    assert {one.url for one in used} > {home}
    assert [one.url for one in used[:100]] == [home] * 100
