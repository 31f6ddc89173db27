"""What the integration relies on in vLLM's engine.

The same cases run against the stand-in of these tests (test_contract.py here) and against vLLM's own scheduler, encoder
cache manager and worker mixin, without a model (tests/vllm/test_contract.py). A case that holds for one and not for the other
means that the stand-in no longer behaves like vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.integrations.vllm.scheduler import SchedulerHalf
from chiasm.integrations.vllm.worker import WorkerHalf

from .conftest import Encoder
from .engine import ROWS, embedding_of, identifier_of

BLOCK_TOKENS = 16
STEP_TOKENS = 128
"""The most that a step computes."""
MAX_AHEAD = 2

_SCHEDULER_HOOKS = (
    "ensure_cache_available",
    "is_out_of_reach",
    "can_get",
    "has_cache_item",
    "update_state_after_alloc",
    "build_connector_meta",
    "released",
    "request_finished",
    "take_unavailable_requests",
    "update_connector_output",
)
_WORKER_HOOKS = ("bind", "start_save_caches", "start_load_caches", "save_caches", "report", "clear")


@dataclass(frozen=True)
class Outcome:
    """What came of one step."""

    tokens: dict[str, int]
    """How many tokens were computed, by request; none if it is not there."""
    encoded: list[str]
    """Identifiers of the items that were encoded here."""
    failed: set[str]
    """Requests that failed."""
    calls: list[str]
    """The hooks that were called, in order."""


class Instance(ABC):
    """One instance under test: a scheduler and a worker with their halves of the connector."""

    width: int
    """Values in a row of an embedding."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @abstractmethod
    def begin(
        self,
        *places: tuple[str, int],
        of: str = "request",
        tokens: int = 0,
        pixels: bool = False,
        cached_tokens: int = 0,
    ) -> None:
        """Add a request with items of these names at these offsets, which is finished once its prompt is computed.

        ``cached_tokens``: how many of its tokens are in the prefix cache, if it is read.
        """

    @abstractmethod
    def pass_time(self, seconds: float) -> None:
        """Move the connector's clock on."""

    @abstractmethod
    def step(self, meanwhile: Callable[[], object] = lambda: None, *, is_far: bool = False) -> Outcome:
        """Plan a step, run it and end it.

        ``meanwhile`` is called when it has been planned. ``is_far``: the worker is on another host. Fails if the model would
        read an embedding that isn't there, or is of another shape.
        """

    def embedding_of(self, name: str) -> torch.Tensor:
        """Return the embedding that only this name has."""
        return embedding_of(name, ROWS, self.width)

    def record(self, half: SchedulerHalf | WorkerHalf) -> None:
        """Note each call of a hook in ``calls``."""
        for name in _SCHEDULER_HOOKS if isinstance(half, SchedulerHalf) else _WORKER_HOOKS:
            setattr(half, name, self._recorded(name, getattr(half, name)))

    def _recorded(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return hook(*args, **kwargs)

        return recorded


Start = Callable[[ECTransferRole], Instance]
"""Starts an instance of a role on the folder of ``encoder``."""

_LOOK = ["ensure_cache_available"]
_PROMISE = ["is_out_of_reach", "can_get", "has_cache_item"]
_LOAD = ["bind", "start_load_caches", "report", "clear"]


class EngineContract:
    """The cases; a subclass provides the fixtures ``encoder`` and ``start``."""

    def test_hooks_of_a_step_that_loads(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2))
        outcome = pd.step()
        assert outcome.tokens == {"request": 8}
        end = ["released", "request_finished", "take_unavailable_requests", "update_connector_output"]
        planned = [*_LOOK, *_PROMISE, "update_state_after_alloc", "build_connector_meta"]
        assert outcome.calls == [*planned, *_LOAD, *end]

    def test_hooks_of_a_step_in_which_a_request_waits(self, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        pd.begin(("a", 2))
        outcome = pd.step()
        assert outcome.tokens == {}
        assert outcome.calls == [*_LOOK, "build_connector_meta", "take_unavailable_requests"]

    def test_items_are_promised_one_by_one_and_get_room_together(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        for name in "ab":
            encoder.publish(name, pd.embedding_of(name))
        pd.begin(("a", 2), ("b", 8))
        outcome = pd.step()
        assert outcome.tokens == {"request": 14}
        room = ["update_state_after_alloc"] * 2
        assert outcome.calls[:10] == [*_LOOK, *_PROMISE, *_PROMISE, *room, "build_connector_meta"]

    def test_an_item_in_memory_is_not_asked_for_again(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        path = encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="first")
        pd.step()
        path.unlink()
        pd.begin(("a", 2), of="second", tokens=9)
        outcome = pd.step()
        assert outcome.tokens == {"second": 9}
        assert outcome.calls[:2] == [*_LOOK, "build_connector_meta"]

    def test_an_item_that_occurs_twice_is_asked_for_once(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), ("a", 8))
        outcome = pd.step()
        assert outcome.tokens == {"request": 14}
        assert outcome.calls.count("has_cache_item") == 1

    def test_two_requests_with_one_item_load_it_once(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="1")
        pd.begin(("a", 3), of="2")
        outcome = pd.step()
        assert outcome.tokens == {"1": 8, "2": 9}
        assert outcome.calls.count("update_state_after_alloc") == 1

    def test_a_request_that_waits_runs_when_its_item_has_come(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        pd.begin(("a", 2))
        assert pd.step().tokens == {}
        encoder.publish("a", pd.embedding_of("a"))
        assert pd.step().tokens == {"request": 8}

    def test_others_run_while_one_waits(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("b", pd.embedding_of("b"))
        pd.begin(("a", 2), of="waiting")
        pd.begin(("b", 2), of="good")
        assert pd.step().tokens == {"good": 8}

    def test_one_that_has_waited_too_long_fails_and_is_finished(self, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        pd.begin(("a", 2))
        pd.step()
        pd.pass_time(1000)
        outcome = pd.step()
        assert outcome.failed == {"request"}
        assert outcome.calls == [*_LOOK, "build_connector_meta", "take_unavailable_requests", "request_finished"]
        assert pd.step().calls == ["build_connector_meta", "take_unavailable_requests"]

    def test_prefill_runs_up_to_the_first_item_that_is_missing(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), ("b", 80), tokens=100)
        assert pd.step().tokens == {"request": 80}
        assert pd.step().tokens == {}
        encoder.publish("b", pd.embedding_of("b"))
        assert pd.step().tokens == {"request": 20}

    def test_prefill_stops_before_an_item_that_goes_during_planning(self, encoder: Encoder, start: Start) -> None:
        """``can_get`` says no to an item that was there a moment ago."""
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        path = encoder.publish("b", pd.embedding_of("b"))
        pd.begin(("a", 2), ("b", 80), tokens=100)
        os_bytes = path.read_bytes()
        path.write_bytes(os_bytes[:-1] + bytes([os_bytes[-1] ^ 1]))  # only a promise reads the bytes
        assert pd.step().tokens == {"request": 80}

    def test_an_item_with_pixels_is_encoded_and_published(self, encoder: Encoder, start: Start) -> None:
        both = start(ECTransferRole.BOTH)
        both.begin(("a", 2), pixels=True)
        outcome = both.step()
        assert outcome.encoded == [identifier_of("a")]
        assert encoder.path("a").exists()
        run = ["bind", "start_save_caches", "start_load_caches", "save_caches", "report", "clear"]
        assert [call for call in outcome.calls if call in _WORKER_HOOKS] == run

    def test_an_item_with_pixels_is_loaded_if_the_store_has_it(self, encoder: Encoder, start: Start) -> None:
        both = start(ECTransferRole.BOTH)
        encoder.publish("a", both.embedding_of("a"))
        both.begin(("a", 2), pixels=True)
        outcome = both.step()
        assert (outcome.tokens, outcome.encoded) == ({"request": 8}, [])

    def test_what_a_worker_could_not_load_fails_its_request_in_the_next_step(
        self, encoder: Encoder, start: Start
    ) -> None:
        pd = start(ECTransferRole.CONSUMER)
        path = encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), tokens=200)
        assert pd.step(path.unlink, is_far=True).tokens == {"request": STEP_TOKENS}
        assert pd.step().failed == {"request"}

    def test_a_request_told_to_skip_the_prefix_cache_computes_all_its_tokens(
        self, encoder: Encoder, start: Start
    ) -> None:
        """Blocks that were computed from zeros are not used."""
        pd = start(ECTransferRole.CONSUMER)
        path = encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="lost", tokens=200)
        pd.step(path.unlink, is_far=True)
        pd.step()
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="again", tokens=100, cached_tokens=96)
        assert pd.step().tokens == {}
        assert pd.step().tokens == {"again": 100}

    def test_tokens_in_the_prefix_cache_are_not_computed(self, encoder: Encoder, start: Start) -> None:
        pd = start(ECTransferRole.CONSUMER)
        encoder.publish("a", pd.embedding_of("a"))
        pd.begin(("a", 2), of="first", tokens=100)
        pd.step()
        pd.begin(("a", 2), of="second", tokens=100, cached_tokens=96)
        assert pd.step().tokens == {"second": 4}


def store_in(folder: Path) -> dict[str, Any]:
    """Return the settings of a connector that reads what ``Encoder(folder)`` publishes."""
    return {"shared_storage_path": str(folder), "fingerprint": "aa"}
