"""A connector that raises errors: vLLM's engine goes on, and only the requests that want what it was asked for fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chiasm.ec_transfer import ECConnector, ECConnectorMetadata, ECTransferRole
from chiasm.integrations.vllm.items import Wanted
from chiasm.integrations.vllm.settings import Settings
from tests import broken_connector
from tests.broken_connector import faults

from .engine import WAIT_SECONDS, Engine, embedding_of, identifier_of, request
from .minimal import ENTRIES

MODULE = "tests.integrations.vllm.minimal"


@pytest.fixture(autouse=True)
def published() -> Iterator[None]:
    """``a`` and ``b`` are published."""
    ENTRIES.update({identifier_of(name): embedding_of(name) for name in "ab"})
    yield
    ENTRIES.clear()


@pytest.fixture
def pd() -> Iterator[Engine]:
    engine = Engine(Settings("MinimalConnector", MODULE, wait_seconds=WAIT_SECONDS), ECTransferRole.CONSUMER)
    yield engine
    engine.close()


@pytest.fixture
def encoder() -> Iterator[Engine]:
    engine = Engine(Settings("MinimalConnector", MODULE, wait_seconds=WAIT_SECONDS), ECTransferRole.PRODUCER)
    engine.embeddings = {identifier_of(name): embedding_of(name) for name in "abc"}
    yield engine
    engine.close()


def identifiers_in(subject: object) -> set[str]:
    if isinstance(subject, ECConnectorMetadata):
        return {*subject.loads}
    if isinstance(subject, Wanted) or hasattr(subject, "mm_features"):
        return {item.identifier for item in getattr(subject, "items", ())}
    return {subject} if isinstance(subject, str) else set()


def break_for(patch: pytest.MonkeyPatch, store: ECConnector, name: str, method: str) -> None:
    broken_connector.break_for(patch, store, identifier_of(name), method, identifiers_in)


@pytest.mark.parametrize("method", ["ensure_cache_available", "has_cache_item", "layout_of"])
def test_an_error_before_a_promise_costs_the_requests_that_want_the_item(
    pd: Engine, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = request(("a", 2), of="one"), request(("a", 2), of="two")
    fine = request(("b", 2), of="fine")
    is_told = method == "ensure_cache_available"
    with monkeypatch.context() as patch:
        if not is_told:
            patch.setattr(pd.scheduler_store, "ensure_cache_available", lambda request, num_computed_tokens: False)
        break_for(patch, pd.scheduler_store, "a", method)
        step = pd.schedule(*broken, fine)
        assert step.tokens.keys() == {"fine"}
        assert pd.update(*broken, fine, report=pd.run(step)) == {"one", "two"}
    assert len(faults(caplog)) == 1
    assert pd.scheduler_store.faults.count == (2 if is_told else 1)  # each request is told of once
    assert torch.equal(pd.encoder_cache[identifier_of("b")], embedding_of("b"))
    assert pd.step(request(("a", 2), of="later")).tokens.keys() == {"later"}


@pytest.mark.parametrize("method", ["update_state_after_alloc", "build_connector_meta"])
def test_an_error_after_a_promise_costs_the_requests_that_use_the_item(
    pd: Engine, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pd.step(request(("b", 2), of="before", tokens=100))
    broken, fine = request(("a", 2), of="broken", tokens=100), request(("b", 2), of="fine", tokens=100)
    with monkeypatch.context() as patch:
        patch.setattr(pd.scheduler_store, method, fail)
        step = pd.schedule(broken, fine)
        report = pd.run(step)
    assert pd.update(broken, fine, report=report) == set()
    assert pd.update(broken, fine) == {"broken"}
    assert len(faults(caplog)) == 1
    pd.step(fine)
    assert pd.step(request(("a", 2), of="later")).tokens.keys() == {"later"}
    assert torch.equal(pd.encoder_cache[identifier_of("a")], embedding_of("a"))


def fail(*given: object) -> Any:
    raise OSError("the connector is broken")


@pytest.mark.parametrize("method", ["bind_connector_metadata", "start_load_caches"])
def test_an_error_of_the_worker_costs_the_requests_of_the_step_that_lack_an_embedding(
    pd: Engine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.step(request(("b", 2), of="before", tokens=100))
    broken, fine = request(("a", 2), of="broken", tokens=100), request(("b", 2), of="fine", tokens=100)
    step = pd.schedule(broken, fine)
    with monkeypatch.context() as patch:
        patch.setattr(pd.worker_store, method, fail)
        report = pd.run(step)
    assert pd.update(broken, fine, report=report) == set()
    assert pd.update(broken, fine) == {"broken"}
    pd.step(fine)


def test_an_error_when_all_is_done_costs_nobody_anything(
    pd: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pd.scheduler_store, "request_finished", fail)
    monkeypatch.setattr(pd.worker_store, "clear_connector_metadata", fail)
    one = request(("a", 2))
    assert pd.step(one).tokens
    pd.finish(one)
    assert len(faults(caplog)) == 2


@pytest.mark.parametrize("role", ["scheduler_store", "worker_store"])
def test_an_entry_that_cannot_be_discarded_costs_its_request(
    pd: Engine, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ENTRIES[identifier_of("a")] = embedding_of("a", rows=7)
    store = getattr(pd, role)
    monkeypatch.setattr(store, "discard", fail)
    if role == "scheduler_store":
        monkeypatch.setattr(store, "layout_of", lambda name: (tuple(ENTRIES[name].shape), ENTRIES[name].dtype))
    one = request(("a", 2), tokens=100)
    failed: set[str] = set()
    while not failed:
        step = pd.schedule(one)
        failed = pd.update(one, report=pd.run(step)) or pd.update(one)
    assert failed == {"request"}
    assert pd.step(request(("b", 2), of="later")).tokens


def test_what_can_be_encoded_is_encoded_when_the_connector_cannot_be_asked(
    encoder: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.scheduler_store, "has_cache_item", fail)
    one = request(("a", 2), pixels=True)
    assert encoder.step(one).encoded == [identifier_of("a")]
    assert not encoder.scheduler.is_published(identifier_of("a"))


def test_an_encoder_goes_on_when_an_embedding_cannot_be_published(
    encoder: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoder.worker_store, "save_caches", fail)
        encoder.step(request(("c", 2), of="broken", pixels=True))
    assert not encoder.scheduler.is_published(identifier_of("c"))
    assert len(faults(caplog)) == 1
    encoder.step(request(("c", 2), of="again", pixels=True))  # it is in memory, and is published again
    assert encoder.scheduler.is_published(identifier_of("c"))


def test_what_the_connector_cannot_tell_is_awaited(pd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ENTRIES.clear()
    requests = request(("a", 2), of="one"), request(("b", 2), of="two")
    assert not pd.step(*requests).tokens
    break_for(monkeypatch, pd.scheduler_store, "a", "is_coming")
    assert pd.awaited() == [identifier_of("a"), identifier_of("b")]
