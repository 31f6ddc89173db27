"""The halves over every connector of chiasm's that needs no network card, and over one that a user wrote."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.entry_file import bytes_of
from chiasm.ec_transfer.stores import StoredEntry, open_store
from chiasm.integrations.vllm.settings import Settings
from chiasm.wire import EmbeddingPlaces
from tests.ec_connector.peers import keeps_nothing
from tests.launch.waiting import eventually

from .engine import FINGERPRINT, LAYOUT, ROWS, WAIT_SECONDS, Engine, Request, embedding_of, identifier_of, request
from .minimal import ENTRIES

APART = ("SharedMemoryConnector apart", "TcpConnector apart")
"""In instances whose workers know nothing of the scheduler's half but what is sent to them."""
FROM_MEMORY = ("SharedMemoryConnector", "TcpConnector", *APART)
CONNECTORS = ("SharedStorageConnector", "MinimalConnector", *FROM_MEMORY)


class Pair:
    """An encoder and a PD of vLLM, and what the proxy would do between them."""

    def __init__(self, connector: str, folder: Path, store: str = "", receive_bytes: int = 1 << 20) -> None:
        connector, _, apart = connector.partition(" ")
        module = "tests.integrations.vllm.minimal" if connector == "MinimalConnector" else None
        settings = Settings(
            connector,
            module,
            max_bytes=1 << 20,
            receive_bytes=receive_bytes,
            wait_seconds=WAIT_SECONDS,
            connector_extra_config={"shared_storage_path": folder} if connector == "SharedStorageConnector" else {},
        )
        self.encoder = Engine(settings, ECTransferRole.PRODUCER, store=store, apart=bool(apart))
        self.pd = Engine(settings, ECTransferRole.CONSUMER, store=store, apart=bool(apart))
        self.woken = threading.Event()
        self.pd.scheduler.on_arrival = self.woken.set

    def encode(self, name: str, embedding: torch.Tensor | None = None) -> list[str]:
        """Have an image encoded; return what was really encoded."""
        self.encoder.embeddings[identifier_of(name)] = embedding_of(name) if embedding is None else embedding
        one = request((name, 2), of=f"encode {name}", pixels=True)
        step = self.encoder.step(one)
        self.encoder.finish(one)
        return step.encoded

    def tell(self, *names: str) -> None:
        place = self.encoder.scheduler_store.place() or self.encoder.worker_store.place()
        if place is not None:
            self.pd.scheduler_store.expect({identifier_of(name): place for name in names})

    def run(self, *requests: Request) -> dict[str, int]:
        """Run steps of the PD, each after the connector has woken it, until one computes anything."""
        while True:
            self.woken.clear()
            if tokens := self.pd.step(*requests).tokens:
                return tokens
            assert self.woken.wait(60)

    def run_until_failed(self, one: Request) -> None:
        while True:
            self.woken.clear()
            step = self.pd.schedule(one)
            if self.pd.update(one, report=self.pd.run(step)) or self.pd.update(one):
                return
            if not step.tokens:
                assert self.woken.wait(60)

    def close(self) -> None:
        self.encoder.close()
        self.pd.close()


Start = Callable[..., Pair]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    pairs: list[Pair] = []

    def start(connector: str, store: str = "", **settings: int) -> Pair:
        ENTRIES.clear()
        pairs.append(Pair(connector, tmp_path / "store", store, **settings))
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_what_an_encoder_makes_is_what_a_pd_loads(start: Start, connector: str) -> None:
    pair = start(connector)
    one = request(("a", 2), ("b", 8))
    assert pair.pd.step(one).tokens == {}
    for name in "ab":
        pair.tell(name)
        pair.encode(name)
    assert pair.run(one) == {"request": 14}
    for name in "ab":
        assert torch.equal(pair.pd.encoder_cache[identifier_of(name)], embedding_of(name))
    assert pair.pd.awaited() == []


@pytest.mark.parametrize("connector", CONNECTORS)
def test_what_is_published_is_not_encoded_again_and_is_named_in_the_answer(start: Start, connector: str) -> None:
    pair = start(connector)
    assert pair.encode("a") == [identifier_of("a")]
    pair.encoder.memory.users.clear()
    pair.encoder.encoder_cache.clear()
    assert pair.encode("a") == []
    assert pair.encoder.scheduler.is_published(identifier_of("a"))
    assert not pair.encoder.scheduler.is_published(identifier_of("b"))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_what_is_not_coming_is_awaited(start: Start, connector: str) -> None:
    pair = start(connector)
    pair.pd.step(request(("a", 2)))
    assert pair.pd.awaited() == [identifier_of("a")]


@pytest.mark.parametrize("connector", CONNECTORS)
def test_an_entry_that_never_fits_fails_its_request_alone(start: Start, connector: str) -> None:
    pair = start(connector)
    pair.encode("a", embedding_of("a", rows=ROWS + 1))
    pair.encode("b")
    pair.tell("a", "b")
    bad, good = request(("a", 2), of="bad"), request(("b", 2), of="good")
    assert pair.run(good, bad)
    assert torch.equal(pair.pd.encoder_cache[identifier_of("b")], embedding_of("b"))
    if connector in FROM_MEMORY:  # it was the entry, and the encoder was told; so it makes another
        while pair.encoder.scheduler.is_published(identifier_of("a")):
            pair.pd.step(bad)
        pair.encoder.memory.users.clear()
        pair.encoder.encoder_cache.clear()
        pair.tell("a")
        pair.encode("a", embedding_of("a", rows=ROWS + 1))
    elif connector == "SharedStorageConnector":
        pair.encode("a", embedding_of("a", rows=ROWS + 1))
    pair.run_until_failed(bad)
    assert pair.pd.counts()["failed_requests"] == 1


@pytest.mark.parametrize("connector", FROM_MEMORY)
def test_an_embedding_that_can_never_be_received_fails_its_request_at_once(
    start: Start, connector: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = start(connector, receive_bytes=LAYOUT.num_bytes(ROWS, has_levels=False) - 1)
    bad = request(("a", 2), of="bad")
    assert pair.pd.schedule(bad).tokens == {}
    assert pair.pd.awaited() == [], "so the proxy has it encoded once, and not again and again"
    assert pair.pd.update(bad) == {"bad"}
    assert "--ec-receive-bytes" in caplog.text


@pytest.mark.parametrize("connector", FROM_MEMORY)
def test_an_embedding_is_loaded_although_its_encoder_ends_after_it_has_arrived(start: Start, connector: str) -> None:
    pair = start(connector)
    pair.encode("a")
    pair.tell("a")
    one = request(("a", 2))
    pair.pd.step(one)
    if pair.pd.memory.holds(identifier_of("a")):
        return  # it came at once
    assert pair.woken.wait(60)
    assert pair.pd.scheduler_store.has_cache_item(identifier_of("a"))
    pair.encoder.close()
    assert pair.pd.step(one).tokens == {"request": 8}
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))


@pytest.mark.parametrize("connector", FROM_MEMORY)
def test_what_is_lost_with_its_encoder_is_awaited(start: Start, connector: str) -> None:
    pair = start(connector)
    one = request(("a", 2))
    pair.pd.step(one)
    pair.tell("a")
    pair.encoder.close()
    while not pair.pd.awaited():
        assert pair.woken.wait(60)
    assert pair.pd.awaited() == [identifier_of("a")]


@pytest.mark.parametrize("connector", APART)
def test_a_worker_that_comes_too_late_for_an_embedding_fails_its_request_alone(start: Start, connector: str) -> None:
    """vLLM's scheduler has dropped what it held for the step, and the encoder has evicted the embedding."""
    pair = start(connector)
    pair.encode("a")
    pair.tell("a")
    one = request(("a", 2))
    while not (step := pair.pd.schedule(one)).tokens:
        assert pair.woken.wait(60)
        pair.woken.clear()
    step.metadata = pickle.loads(pickle.dumps(step.metadata))
    pair.pd.scheduler._pinned.clear()
    pair.encoder.scheduler_store.discard(identifier_of("a"), "of no use")
    assert eventually(lambda: keeps_nothing(pair.pd.scheduler_store))
    report = pair.pd.run(step)
    assert not pair.pd.encoder_cache[identifier_of("a")].any(), "zeros take the place"
    pair.pd.update(report=report)
    assert pair.pd.update(one) == {"request"}
    again = request(("a", 2), of="again")
    pair.pd.step(again)
    pair.encoder.memory.users.clear()
    pair.encoder.encoder_cache.clear()
    pair.encode("a")
    pair.tell("a")
    pair.run(again)
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))
    counts = pair.pd.counts()
    assert (counts["failed_requests"], counts["load_failures"]) == (1, 1)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_what_both_halves_count_is_counted_once(start: Start, connector: str) -> None:
    pair = start(connector)
    pair.encode("a")
    pair.tell("a")
    pair.run(request(("a", 2)))
    if connector != "MinimalConnector":  # which counts nothing
        counts = pair.pd.counts()
        assert (counts["loads"], counts["loaded_bytes"]) == (1, embedding_of("a").nbytes)
        assert pair.encoder.counts()["saves"] == 1


def test_a_connector_that_says_nothing_of_layouts_is_checked_by_the_worker(start: Start) -> None:
    pair = start("MinimalConnector")
    ENTRIES[identifier_of("a")] = embedding_of("a", ROWS, LAYOUT.width).to(torch.bfloat16)
    one = request(("a", 2))
    step = pair.pd.schedule(one)
    report = pair.pd.run(step)
    assert not pair.pd.encoder_cache[identifier_of("a")].any(), "zeros take the place"
    pair.pd.update(report=report)
    assert pair.pd.update(one) == {"request"}


# ---- the shared cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'cache'}"


def put(cache: str, name: str, embedding: torch.Tensor) -> None:
    """Put an embedding into the shared cache, as an encoder of the fleet would."""
    data = bytes_of(embedding)
    shape = tuple(embedding.shape)
    entry = StoredEntry.of(identifier_of(name), FINGERPRINT, "F32", shape, data)
    open_store(cache).put(entry, data)


@pytest.mark.parametrize("connector", ["SharedStorageConnector", "SharedMemoryConnector", *APART])
def test_what_the_shared_cache_has_is_loaded_from_there(start: Start, cache: str, connector: str) -> None:
    pair = start(connector, cache)
    put(cache, "a", embedding_of("a"))
    pair.pd.scheduler.expect(EmbeddingPlaces(stored=[identifier_of("a")]))
    assert pair.run(request(("a", 2)))
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))
    assert pair.pd.counts()["store_reads"] == 1


@pytest.mark.parametrize("connector", ["SharedStorageConnector", "SharedMemoryConnector"])
def test_what_does_not_fit_in_the_shared_cache_is_awaited_from_an_encoder(
    start: Start, cache: str, connector: str
) -> None:
    pair = start(connector, cache)
    put(cache, "a", embedding_of("a", rows=ROWS - 1))
    pair.pd.scheduler.expect(EmbeddingPlaces(stored=[identifier_of("a")]))
    one = request(("a", 2))
    while pair.pd.awaited() != [identifier_of("a")]:
        assert pair.pd.step(one).tokens == {}
    pair.tell("a")
    pair.encode("a")
    assert pair.run(one)
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_a_prompt_that_is_computed_again_is_loaded_from_the_shared_cache(start: Start, cache: str) -> None:
    """As in a decode instance, whose KV came from elsewhere: it needs the embedding only when it has lost that."""
    pair = start("SharedMemoryConnector", cache)
    put(cache, "a", embedding_of("a"))
    pair.pd.scheduler.expect(EmbeddingPlaces(stored=[identifier_of("a")]))
    one = request(("a", 2))
    assert pair.pd.scheduler.ensure_cache_available(one, one.num_tokens)
    assert pair.run(one)
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_a_prompt_that_is_computed_again_is_loaded_from_the_encoder(start: Start) -> None:
    pair = start("SharedMemoryConnector")
    pair.encode("a")
    one = request(("a", 2))
    assert pair.pd.scheduler.ensure_cache_available(one, one.num_tokens)
    pair.tell("a")
    assert pair.run(one)
    assert torch.equal(pair.pd.encoder_cache[identifier_of("a")], embedding_of("a"))
