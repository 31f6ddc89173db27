"""A fleet with a shared cache of embeddings: it spares encoding, and its faults are misses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.wire import Role

from ..store_server import Between, StoreServer, servers
from .conftest import SMALL, Service, chat, run, sample_image

ENTRY_BYTES = 36 * 192 * 4 + 4096
"""Of an image of 96 x 96 pixels."""
ROOM = "100mb"
FROZEN_SECONDS = 10.0
AGAIN_SECONDS = 120.0
"""After a fault, a store isn't used for half a minute at most, by each of those who use it."""
ADMIN_KEY = "administrator-of-the-test"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module", params=[*servers()])
def server(request: pytest.FixtureRequest) -> Iterator[StoreServer]:
    with StoreServer(servers()[request.param], "--maxmemory", ROOM, "--maxmemory-policy", "allkeys-lru") as started:
        yield started


@pytest.fixture(scope="module")
def between(server: StoreServer) -> Iterator[Between]:
    with Between(server) as between:
        yield between


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, between: Between) -> Iterator[Service]:
    """One encoder and one PD, which have room for two embeddings, and a store."""
    fields = {
        "shared_storage_path": tmp_path_factory.mktemp("store") / "folder",
        "ec_max_bytes": 2 * ENTRY_BYTES,
        "ec_store": between.url,
        "admin_key": ADMIN_KEY,
        "settings": SMALL | {"encoder_cache_bytes": 2 * ENTRY_BYTES},
    }
    # No test may depend on how fast a loaded machine asks the store.
    yield from run(checkpoint, {Role.ENCODER: 1, Role.PD: 1}, fields=fields, ec_store_timeout_seconds=20)


def ask(service: Service, seed: int, text: str) -> str:
    """Ask about two images. What is asked before them differs, so that no KV is reused."""
    return service.answer(chat(text, sample_image(seed), sample_image(seed + 1), "?"))


def publish(service: Service, server: StoreServer, seed: int) -> str:
    """Ask about two images; when the store has their embeddings, push them out of memory and the folder by others."""
    settle(service)
    before = headers(server)
    answer = ask(service, seed, "what?")
    service.wait_until(lambda: len(headers(server)) == len(before) + 2)
    ask(service, seed + 100, "else?")
    service.wait_until(lambda: len(headers(server)) == len(before) + 4)
    settle(service)
    # The same question to a prompt whose KV is cached would need no embedding.
    return answer


def settle(service: Service) -> None:
    """Wait until the encoder has nothing to encode and nothing to write to the store: it writes behind its answers.

    Then the proxy has heard of all that was encoded: a PD may answer before the encoder does.
    """
    service.wait_until_encoders_rest()
    service.wait_until(lambda: service.metric(Role.ENCODER, "chiasm_ec_store_queued_bytes") == 0)


def headers(server: StoreServer) -> set[bytes]:
    return {key for key in server.all_keys() if key.count(b":") == 4}


def outcome(name: str) -> str:
    return f'chiasm_proxy_items_total{{outcome="{name}"}}'


def counted(service: Service, name: str) -> float:
    """One sample of the proxy, with its labels."""
    for line in httpx.get(f"{service.url}/metrics", headers=ADMIN, timeout=10).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0


def instances(service: Service, method: str, **body: Any) -> None:
    response = httpx.request(method, f"{service.url}/instances", headers=ADMIN, json=body, timeout=30)
    assert response.status_code < 300, response.text


def test_an_image_whose_encoder_is_gone_is_answered_from_the_store(
    service: Service, server: StoreServer, aggregated: Service
) -> None:
    publish(service, server, 1000)
    (encoder,) = service.deployment.urls(Role.ENCODER)
    instances(service, "DELETE", url=encoder)
    service.wait_until(lambda: all(one["role"] != Role.ENCODER for one in service.health()))
    stored, encoded = counted(service, outcome("stored")), counted(service, outcome("encoded"))
    reads = service.metric(Role.PD, "chiasm_ec_store_reads_total")
    body = chat("and what now?", sample_image(1000), sample_image(1001), "?")
    assert service.answer(body) == aggregated.answer(body)
    assert counted(service, outcome("stored")) == stored + 2
    assert counted(service, outcome("encoded")) == encoded
    assert service.metric(Role.PD, "chiasm_ec_store_reads_total") == reads + 2
    instances(service, "POST", url=encoder, role="encoder")
    service.wait_until(lambda: all(one["state"] == "healthy" for one in service.health()))


def overwrite(server: StoreServer) -> None:
    for key in server.all_keys():
        if key.count(b":") > 4:
            server.call("SETRANGE", key, "100", b"what nobody encoded")


def remove_chunks(server: StoreServer) -> None:
    for key in server.all_keys():
        if key.count(b":") > 4:
            server.call("DEL", key)


@pytest.mark.parametrize(("breaks", "counter"), [(overwrite, "corrupt"), (remove_chunks, "absent")])
def test_what_cannot_be_read_is_encoded_again(
    service: Service, server: StoreServer, aggregated: Service, breaks: Callable[[StoreServer], None], counter: str
) -> None:
    seed = 2000 if counter == "corrupt" else 3000
    publish(service, server, seed)
    breaks(server)
    before = service.metric(Role.PD, f"chiasm_ec_store_{counter}_total")
    body = chat("and what now?", sample_image(seed), sample_image(seed + 1), "?")
    assert service.answer(body) == aggregated.answer(body)
    assert service.metric(Role.PD, f"chiasm_ec_store_{counter}_total") == before + 2


def asked(service: Service, aggregated: Service, seeds: Iterable[int]) -> None:
    """Ask about an image each, and compare the answers."""
    bodies = [chat("what?", sample_image(seed), "?") for seed in seeds]
    assert [service.answer(body) for body in bodies] == [aggregated.answer(body) for body in bodies]


def wait_until_used_again(service: Service, server: StoreServer, aggregated: Service, seeds: Iterator[int]) -> None:
    """Ask until something is written to the store again, and something read from it."""

    def writes() -> bool:
        settle(service)
        before = headers(server)
        asked(service, aggregated, [next(seeds)])
        settle(service)
        return not headers(server) <= before

    def reads() -> bool:
        first, number = next(seeds), next(seeds)
        asked(service, aggregated, [first, *(next(seeds) for _ in range(4))])  # so that no memory has the first one
        settle(service)
        before = service.metric(Role.PD, "chiasm_ec_store_reads_total")
        body = chat(f"after {number}", sample_image(first), "?")
        assert service.answer(body) == aggregated.answer(body)
        return service.metric(Role.PD, "chiasm_ec_store_reads_total") > before

    service.wait_until(writes, AGAIN_SECONDS)
    service.wait_until(reads, AGAIN_SECONDS)


@pytest.mark.parametrize("fault", ["frozen", "killed"])
def test_a_store_that_does_not_answer_stops_no_request_and_is_used_again(
    service: Service, server: StoreServer, aggregated: Service, fault: str
) -> None:
    seeds = itertools.count(4000 if fault == "frozen" else 5000)
    failed = counted(service, FAILED)
    not_written = number_not_written(service)
    began = time.monotonic()
    (server.freeze if fault == "frozen" else server.kill)()
    try:
        asked(service, aggregated, itertools.islice(seeds, 4))
        service.wait_until(lambda: counted(service, FAILED) > failed)
        service.wait_until(lambda: number_not_written(service) > not_written)
        if fault == "frozen":
            time.sleep(max(0.0, began + FROZEN_SECONDS - time.monotonic()))  # the fault itself lasts so long
            asked(service, aggregated, itertools.islice(seeds, 1))
    finally:
        (server.thaw if fault == "frozen" else server.start)()
    wait_until_used_again(service, server, aggregated, seeds)


def test_a_store_that_is_killed_while_a_pd_reads_from_it_costs_an_encode(
    service: Service, server: StoreServer, between: Between, aggregated: Service
) -> None:
    publish(service, server, 6000)
    encoded = counted(service, outcome("encoded"))
    failures = service.metric(Role.PD, "chiasm_ec_store_read_failures_total")
    between.kill_after(ENTRY_BYTES // 4)
    body = chat("and what now?", sample_image(6000), sample_image(6001), "?")
    try:
        assert service.answer(body) == aggregated.answer(body)
        assert between.killed.wait(60)
        assert service.metric(Role.PD, "chiasm_ec_store_read_failures_total") > failures
        service.wait_until(lambda: counted(service, outcome("encoded")) > encoded)
    finally:
        server.kill()
        server.start()
    wait_until_used_again(service, server, aggregated, itertools.count(6200))


def test_a_store_that_is_full_and_evicts_nothing_stops_no_request(
    service: Service, server: StoreServer, aggregated: Service
) -> None:
    seeds = itertools.count(7000)
    not_written = number_not_written(service)
    server.reconfigure(maxmemory="1mb", maxmemory_policy="noeviction")
    try:
        asked(service, aggregated, itertools.islice(seeds, 4))
        service.wait_until(lambda: number_not_written(service) > not_written)
    finally:
        server.reconfigure(maxmemory=ROOM, maxmemory_policy="allkeys-lru")
    wait_until_used_again(service, server, aggregated, seeds)


FAILED = 'chiasm_proxy_store_questions_total{outcome="failed"}'


def number_not_written(service: Service) -> float:
    """How much of what was encoded has not been written, and is counted."""
    names = ("write_failures_total", "dropped_total")
    return sum(service.metric(Role.ENCODER, f"chiasm_ec_store_{name}") for name in names)
