"""Two fleets with keys of their own on one network, with the same model: neither uses the other, whatever it is told."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.wire import AWAITED_PATH, PLACES_PATH, Role

from .conftest import ENCODED, Service, chat, run, sample_image, stopped

ADMIN_KEY = "administrator-of-the-test"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
ROLES = {Role.ENCODER: 1, Role.PD: 1}
FIELDS = {"connector": "TcpConnector", "admin_key": ADMIN_KEY}


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Iterator[Service]:
    yield from run(checkpoint, ROLES, fields=FIELDS, hedged_share=0.0)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Iterator[Service]:
    yield from run(checkpoint, ROLES, fields=FIELDS, hedged_share=0.0)


def shown(service: Service, url: str) -> dict[str, Any]:
    """What the proxy says of an instance."""
    return next(one for one in service.health() if one["url"] == url)


def test_each_fleet_encodes_its_own_images_and_answers(ours: Service, theirs: Service, aggregated: Service) -> None:
    bodies = [chat("see", sample_image(seed), sample_image(seed + 1), "?") for seed in (10, 20, 30)]
    expected = [aggregated.answer(body) for body in bodies]
    before = [service.metric(Role.ENCODER, ENCODED) for service in (ours, theirs)]
    with ThreadPoolExecutor(2 * len(bodies)) as pool:
        answers = [[pool.submit(service.answer, body) for body in bodies] for service in (ours, theirs)]
        assert [[answer.result() for answer in some] for some in answers] == [expected, expected]
    for service, count in zip((ours, theirs), before, strict=True):
        service.wait_until(lambda: service.metric(Role.ENCODER, ENCODED) == count + 6)  # noqa: B023


def test_a_proxy_uses_no_instance_of_the_other_fleet(ours: Service, theirs: Service, aggregated: Service) -> None:
    before = theirs.metric(Role.ENCODER, ENCODED)
    foreign = {role: theirs.deployment.urls(role)[0] for role in ROLES}
    for role, url in foreign.items():
        added = httpx.post(f"{ours.url}/instances", headers=ADMIN, json={"url": url, "role": role.value}, timeout=30)
        assert added.status_code < 300, added.text
    try:
        for url in foreign.values():
            ours.wait_until(lambda: "fleet" in shown(ours, url)["reason"])  # noqa: B023
        for seed in range(100, 106):
            body = chat("see", sample_image(seed), "?")
            assert ours.answer(body) == aggregated.answer(body)
        assert all(shown(ours, url)["state"] != "healthy" for url in foreign.values())
        assert theirs.metric(Role.ENCODER, ENCODED) == before
    finally:
        for url in foreign.values():
            httpx.request("DELETE", f"{ours.url}/instances", headers=ADMIN, json={"url": url}, timeout=30)


def test_calls_that_are_signed_by_the_other_fleet_are_refused(ours: Service, theirs: Service) -> None:
    (pd,) = theirs.deployment.urls(Role.PD)
    assert httpx.get(pd + AWAITED_PATH, auth=ours.signed, timeout=30).status_code == 403
    assert httpx.post(pd + PLACES_PATH, json={"places": {}}, auth=ours.signed, timeout=30).status_code == 403
    assert httpx.get(pd + AWAITED_PATH, auth=theirs.signed, timeout=30).status_code == 200


def test_a_pd_that_is_sent_to_an_encoder_of_the_other_fleet_takes_nothing_from_it(
    ours: Service, theirs: Service, aggregated: Service
) -> None:
    body = chat("what is", sample_image(40), "?")
    assert theirs.answer(body) == aggregated.answer(body)  # so their encoder has the embedding
    (encoder,), (pd,) = theirs.deployment.urls(Role.ENCODER), ours.deployment.urls(Role.PD)
    place = httpx.get(f"{encoder}/health", timeout=30).json()["ec_place"]
    loads = ours.metric(Role.PD, "chiasm_ec_loads_total")

    def awaited() -> list[str]:
        return list(httpx.get(pd + AWAITED_PATH, auth=ours.signed, timeout=30).json()["identifiers"])

    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as between:
        with stopped(ours, Role.ENCODER):
            answer = pool.submit(ours.answer, body)
            (identifier,) = ours.wait_until(awaited)
            told = {"places": {identifier: place | {"port": between.getsockname()[1]}}}
            assert httpx.post(pd + PLACES_PATH, json=told, auth=ours.signed, timeout=30).status_code == 204
            with between.accept()[0] as reader, socket.create_connection((place["host"], place["port"])) as holder:
                pass_on_until_one_leaves(reader, holder)
            assert ours.metric(Role.PD, "chiasm_ec_loads_total") == loads
            assert awaited() == [identifier]
        assert answer.result(60) == aggregated.answer(body)


def pass_on_until_one_leaves(one: socket.socket, other: socket.socket) -> None:
    while True:
        for ready in select.select([one, other], [], [], 60)[0]:
            try:
                data = ready.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return
            (other if ready is one else one).sendall(data)
