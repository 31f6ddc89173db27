"""The tensors of embeddings in memory, the room that is accounted for them, and what the connector is asked for."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest
import torch

from chiasm.ec_transfer import ECConnector, ECConnectorMetadata, ECConnectorRole, ECTransferConfig, RequestLike
from chiasm.engine.block_manager import BlockHasher
from chiasm.engine.embeddings import Embeddings
from chiasm.engine.request import GenerateRequest, ItemOutcome, SamplingParams
from chiasm.engine.request_state import RequestState
from chiasm.engine.sequence import Sequence
from tests.engine.driver import BYTES_PER_ROW, Driver, prompt


class Store(ECConnector):
    """Has what is in ``stored``, and notes what it is asked for."""

    def __init__(self, *stored: str) -> None:
        super().__init__(ECTransferConfig(), ECConnectorRole.SCHEDULER)
        self.stored = set(stored)
        self.asked: list[str] = []
        self._noted: list[str] = []

    def has_cache_item(self, identifier: str) -> bool:
        self.asked.append(identifier)
        return identifier in self.stored

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        return False

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        self._noted.append(request.items[index].identifier)

    def build_connector_meta(self) -> ECConnectorMetadata:
        noted, self._noted = self._noted, []
        return ECConnectorMetadata(tuple(noted))

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        assert self._metadata is not None
        encoder_cache.update({name: torch.empty(4, 1) for name in self._metadata.loads})

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        raise NotImplementedError


class Waiting:
    """Requests that wait for an image each, beside a stream of text."""

    def __init__(self, count: int, *, cache_rows: int = 4096, max_num_seqs: int = 300, text_tokens: int = 1000) -> None:
        self.driver = Driver(
            max_queued=300, blocks=2000, max_num_seqs=max_num_seqs, min_text_before_item=8, cache_rows=cache_rows
        )
        self.store = Store()
        self.embeddings = Embeddings(self.driver.scheduler, entry_width=1, connectors=(self.store, self.store))
        self.states: dict[str, RequestState] = {}
        for number in range(count):
            self.add(f"image {number}", due=float(number))
        self.driver.add(prompt(3), max_tokens=text_tokens, due=-1.0)
        for _ in range(5):
            self.step()
        self.store.asked.clear()

    def add(self, name: str, *, due: float) -> Sequence:
        sequence = self.driver.add(prompt(3, (name, 4), 2), max_tokens=2, due=due, salt=name)
        state = self.states[sequence.request_id] = state_of(sequence)
        self.embeddings.admit(state)
        return sequence

    def arrive(self, name: str) -> None:
        self.store.stored.add(name)
        self.embeddings.look_again(name)

    def step(self) -> None:
        """Do as the engine: look for embeddings if there is news, plan a step, and run it."""
        assert not self.embeddings.update(self.states)
        self.driver.step()
        self.embeddings.drop_evicted()

    def steps_until_nothing_is_new(self) -> list[str]:
        """Step on; return what the connector was asked for."""
        for _ in range(10):
            self.step()
        asked, self.store.asked = self.store.asked, []
        return asked


class NarrowStore(Store):
    """Has too little memory to hand over the entry ``large``."""

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        assert self._metadata is not None
        for name in self._metadata.loads:
            if name in encoder_cache:
                continue
            if name == "large":
                raise MemoryError
            encoder_cache[name] = torch.empty(4, 1)


class StuckStore(Store):
    """Fails to say what a step loads, and doesn't forget it then."""

    broken = True

    def build_connector_meta(self) -> ECConnectorMetadata:
        if self.broken:
            raise OSError("the connector is broken")
        return super().build_connector_meta()


def state_of(sequence: Sequence) -> RequestState:
    request = GenerateRequest(sequence.request_id, sequence.prompt, SamplingParams(), deadline=60.0)
    state = RequestState(request, asyncio.new_event_loop(), asyncio.Queue(), 0.0, BlockHasher(4, sequence.items, ""))
    state.choices = [SimpleNamespace(sequence=sequence)]  # type: ignore[list-item]
    state.loop.close()
    return state


def test_tensors_are_freed_also_while_every_step_fails() -> None:
    scheduler = Driver(cache_rows=4).scheduler
    embeddings = Embeddings(scheduler, entry_width=1)
    for number in range(10):
        name = f"image {number}"
        assert scheduler.encoder_cache.allocate(name, 4 * BYTES_PER_ROW, rank=(False, 0.0, number))
        embeddings.entries[name] = torch.empty(4, 1)
        embeddings.forget_unfilled()
    assert embeddings.entries.keys() == {"image 9"}
    assert not scheduler.encoder_cache.take_evicted()


def test_what_is_needed_is_asked_for_before_what_is_only_counted() -> None:
    driver, store = Driver(), Store("c", "d")
    embeddings = Embeddings(driver.scheduler, entry_width=1, connectors=(store, store))
    states = [state_of(driver.add(prompt(2, (first, 4), (second, 4)))) for first, second in ("ab", "cd", "ed")]
    for state in states:
        embeddings.admit(state)
    assert not store.asked
    embeddings.update({state.request.request_id: state for state in states})
    needed = ["a", "c", "d", "e"]
    assert store.asked[: len(needed)] == needed
    assert set(store.asked[len(needed) :]) <= {*"abe"}
    outcomes = {item.identifier: item.outcome for state in states for item in state.timing.items}
    assert {name for name, outcome in outcomes.items() if outcome is ItemOutcome.HIT} == {"c", "d"}
    assert embeddings.outcomes == {ItemOutcome.HIT: 3}
    assert embeddings.wait_seconds == 0


def test_an_embedding_that_finds_no_memory_costs_only_the_requests_that_want_it() -> None:
    driver, store = Driver(), NarrowStore("first", "large", "last")
    embeddings = Embeddings(driver.scheduler, entry_width=1, connectors=(store, store))
    states = {name: state_of(driver.add(prompt(2, (name, 4)))) for name in ("first", "large", "last")}
    failed = embeddings.update({state.request.request_id: state for state in states.values()})
    assert [state for state, _ in failed] == [states["large"]]
    assert "MemoryError" in failed[0][1].message
    assert embeddings.entries.keys() == {"first", "last"}
    assert driver.scheduler.encoder_cache.identifiers == {"first", "last"}


def test_an_embedding_that_arrives_has_the_connector_asked_for_it_alone_however_many_requests_wait() -> None:
    waiting = Waiting(256)
    for number in (0, 200, 77):
        waiting.arrive(f"image {number}")
        assert waiting.steps_until_nothing_is_new() == [f"image {number}"]
    assert sum(sequence.finished for sequence in waiting.driver.sequences) == 3


def test_an_embedding_that_was_lost_has_the_connector_asked_for_all_once() -> None:
    waiting = Waiting(256)
    waiting.embeddings.look_again()
    assert waiting.steps_until_nothing_is_new() == [f"image {number}" for number in range(256)]


def test_an_arrival_that_the_connector_takes_back_has_it_asked_for_all_in_order() -> None:
    waiting = Waiting(4)
    waiting.embeddings.look_again("image 2")
    assert waiting.steps_until_nothing_is_new() == ["image 2", *(f"image {number}" for number in range(4))]


def test_a_request_that_comes_has_the_connector_asked_for_all_in_order_of_need() -> None:
    waiting = Waiting(3)
    waiting.add("new", due=0.5)
    assert waiting.steps_until_nothing_is_new()[:4] == ["image 0", "new", "image 1", "image 2"]


def test_an_arrival_without_room_is_asked_for_again_when_there_may_be_some() -> None:
    waiting = Waiting(3, cache_rows=4)
    held = waiting.add("held", due=-0.5)
    waiting.arrive("held")
    waiting.embeddings.update(waiting.states)
    waiting.arrive("image 1")
    waiting.embeddings.update(waiting.states)
    assert "image 1" not in waiting.embeddings.entries
    waiting.store.asked.clear()
    assert waiting.embeddings.seconds_to_update == 0
    waiting.embeddings.update(waiting.states)
    assert waiting.store.asked == ["image 0", "image 1", "image 2"]
    waiting.steps_until_nothing_is_new()
    assert held.finished
    assert [sequence.finished for sequence in waiting.driver.sequences[:3]] == [False, True, False]


def test_an_arrival_that_nobody_takes_because_others_that_wait_have_all_is_asked_for_afterwards() -> None:
    waiting = Waiting(2, max_num_seqs=1, text_tokens=8)
    waiting.arrive("image 0")
    waiting.arrive("image 1")
    waiting.step()
    assert waiting.embeddings.entries.keys() == {"image 0"}
    waiting.steps_until_nothing_is_new()
    assert all(sequence.finished for sequence in waiting.driver.sequences)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_when_its_image_has_come_in_any_order_of_events(seed: int) -> None:
    chance = random.Random(seed)
    waiting = Waiting(0, max_num_seqs=chance.randint(1, 3), text_tokens=20)
    for number in range(60):
        match chance.choice(["come", "arrive", "step"]):
            case "come":
                waiting.add(f"image {chance.randrange(6)}", due=float(number % 7))
            case "arrive":
                waiting.arrive(f"image {chance.randrange(6)}")
            case "step":
                waiting.step()
    for number in range(6):
        waiting.arrive(f"image {number}")
    for _ in range(200):
        waiting.step()
    assert all(sequence.finished for sequence in waiting.driver.sequences)


def test_what_was_noted_for_a_step_that_failed_is_not_loaded_later() -> None:
    driver, store = Driver(), StuckStore("first", "second")
    embeddings = Embeddings(driver.scheduler, entry_width=1, connectors=(store, store))
    first = state_of(driver.add(prompt(2, ("first", 4))))
    failed = embeddings.update({first.request.request_id: first})
    assert [state for state, _ in failed] == [first]
    driver.scheduler.finish(first.sequences[0])
    store.broken = False
    second = state_of(driver.add(prompt(2, ("second", 4))))
    assert not embeddings.update({second.request.request_id: second})
    assert embeddings.entries.keys() == driver.scheduler.encoder_cache.identifiers == {"second"}
