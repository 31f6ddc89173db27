"""A KV connector that raises errors: only the requests that it was called for fail, and their KV counts as lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import pytest

from chiasm.engine import kv_transfers
from chiasm.engine.request import GenerateRequest
from chiasm.errors import Code, KVUnavailableError
from chiasm.kv_transfer import FinishedTransfers, KVConnector, KVConnectorMetadata
from chiasm.kv_transfer.base import KVClaim, KVLoad, KVSend
from chiasm.wire import KVTransferParams, Role
from tests import broken_connector
from tests.broken_connector import faults
from tests.engine.conftest import Instance, Start, until
from tests.engine.test_kv_transfers import PLEASE, Pair, over_the_wire

Named = Callable[[object], set[str]]
HIT, SPARED = ("word " * 40,), ("what is this?",)


def roles(instance: Instance) -> tuple[KVConnector, KVConnector]:
    transfers = instance.engine._kv_transfers
    assert transfers is not None
    return transfers._scheduler_role, transfers._worker_role


def requests_in(subject: object) -> set[str]:
    """Return the requests that something given to a connector, or returned by it, is about."""
    if isinstance(subject, GenerateRequest):
        return {subject.request_id}
    if isinstance(subject, KVConnectorMetadata):
        noted: list[KVSend | KVClaim | KVLoad] = [*subject.sends, *subject.claims, *subject.loads]
        return {*subject.given_back, *subject.dropped, *(one.request_id for one in noted)}
    if isinstance(subject, FinishedTransfers):
        return {*subject.sent, *subject.failed, *(request_id for request_id, _ in subject.loaded | subject.broken_off)}
    return {subject} if isinstance(subject, str) else set()


def loads_in(subject: object) -> set[str]:
    return {load.request_id for load in subject.loads} if isinstance(subject, KVConnectorMetadata) else set()


def break_for(
    patch: pytest.MonkeyPatch, instance: Instance, request: GenerateRequest, method: str, named: Named = requests_in
) -> None:
    """Have both halves raise an error in each call of ``method`` for this request."""
    for role in roles(instance):
        broken_connector.break_for(patch, role, request.request_id, method, named)


def broken(*given: object) -> NoReturn:
    raise OSError("the connector is broken")


def leased(name: str) -> KVTransferParams:
    return msgspec.structs.replace(PLEASE, lease=name)


def to_decode(pair: Pair, handle: KVTransferParams, *parts: str, **options: Any) -> GenerateRequest:
    return pair.decode.request(*parts, kv=over_the_wire(handle), **options)


def names(fault: str, request: GenerateRequest) -> bool:
    """Whether a line of the log names the connector and the request."""
    return "KV connector SharedMemoryConnector failed" in fault and request.request_id in fault


@pytest.fixture
def pair(start: Start) -> Pair:
    return Pair(start(Role.PREFILL), start(Role.DECODE))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have blocks that a broken connector may write to count as free at once."""
    monkeypatch.setattr(kv_transfers, "SETTLE_SECONDS", 0.0)


@pytest.mark.parametrize("method", ["leave", "build_connector_meta", "start_load_kv"])
async def test_an_error_at_prefill_costs_the_request_and_is_logged_once(
    start: Start, pair: Pair, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    aggregated = start(Role.AGGREGATED)
    request = pair.prefill.request(*HIT, kv=PLEASE)
    with monkeypatch.context() as patch:
        break_for(patch, pair.prefill, request, method)
        spared = [asyncio.create_task(pair.ask(*SPARED)) for _ in range(3)]
        with pytest.raises(KVUnavailableError, match="KV connector failed: OSError") as raised:
            await pair.prefill.send(request)
        for each in spared:
            assert (await each).token_ids == (await aggregated.ask(*SPARED)).token_ids
    assert raised.value.code == Code.KV_UNAVAILABLE
    assert [names(fault, request) for fault in faults(caplog)] == [True]
    assert pair.prefill.kv_stats().failures == 1
    assert (await pair.ask(*HIT)).token_ids == (await aggregated.ask(*HIT)).token_ids
    await until(pair.is_empty)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("claim", requests_in),
        ("build_connector_meta", requests_in),
        ("start_load_kv", requests_in),
        ("update_state_after_alloc", requests_in),
        ("build_connector_meta", loads_in),
        ("start_load_kv", loads_in),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.usefixtures("at_once")
async def test_an_error_at_decode_costs_the_request_and_is_logged_once(
    start: Start,
    pair: Pair,
    method: str,
    named: Named,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    aggregated = start(Role.AGGREGATED)
    handle = (await pair.prefill.ask(*HIT, kv=leased("hit"))).handle
    request = to_decode(pair, handle, *HIT)
    with monkeypatch.context() as patch:
        break_for(patch, pair.decode, request, method, named)
        spared = [asyncio.create_task(pair.ask(*SPARED)) for _ in range(3)]
        with pytest.raises(KVUnavailableError, match="KV connector failed: OSError") as raised:
            await pair.decode.send(request)
        for each in spared:
            assert (await each).token_ids == (await aggregated.ask(*SPARED)).token_ids
    assert raised.value.code == Code.KV_UNAVAILABLE
    assert [names(fault, request) for fault in faults(caplog)] == [True]
    assert pair.decode.kv_stats().failures == 1
    pair.prefill.engine.give_back_kv(["hit"])  # as the proxy does
    assert (await pair.ask(*HIT)).token_ids == (await aggregated.ask(*HIT)).token_ids
    await until(pair.is_empty)


@pytest.mark.usefixtures("at_once")
async def test_a_decode_connector_that_cannot_tell_what_has_ended_costs_the_requests_that_wait_for_it(
    start: Start, pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    aggregated = start(Role.AGGREGATED)
    stream = asyncio.create_task(pair.ask(*SPARED, max_tokens=100))
    await until(lambda: pair.decode.engine.stats().generation_tokens > 0)
    request = to_decode(pair, await pair.begin(*HIT), *HIT)
    with monkeypatch.context() as patch:
        break_for(patch, pair.decode, request, "get_finished")
        with pytest.raises(KVUnavailableError, match="KV connector failed: OSError"):
            await pair.decode.send(request)
    assert [names(fault, request) for fault in faults(caplog)] == [True]
    assert (await stream).token_ids == (await aggregated.ask(*SPARED, max_tokens=100)).token_ids
    assert (await pair.ask(*HIT)).token_ids == (await aggregated.ask(*HIT)).token_ids
    await until(pair.is_empty)


async def test_a_decode_connector_that_can_tell_nothing_leaves_no_request_waiting(
    start: Start, pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(roles(pair.decode)[1], "get_finished", broken)
        for _ in range(2):
            with pytest.raises(KVUnavailableError, match="KV connector failed: OSError"):
                await pair.ask(*HIT)
    assert len([fault for fault in faults(caplog) if "counts as lost" in fault]) == 1
    assert roles(pair.decode)[1].faults.count >= 2
    assert (await pair.ask(*HIT)).token_ids == (await start(Role.AGGREGATED).ask(*HIT)).token_ids
    await until(pair.is_empty)


async def test_blocks_of_a_load_that_has_begun_are_held_until_it_has_ended(
    start: Start, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfers, "SETTLE_SECONDS", 3600.0)
    worker = roles(pair.decode)[1]
    begin = worker.start_load_kv
    request = to_decode(pair, await pair.begin(*HIT), *HIT)

    def begin_and_fail(metadata: KVConnectorMetadata) -> None:
        begin(metadata)
        if request.request_id in loads_in(metadata):
            raise OSError("the connector is broken")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "start_load_kv", begin_and_fail)
        with pytest.raises(KVUnavailableError, match="KV connector failed: OSError"):
            await pair.decode.send(request)
        await until(pair.is_empty)
    assert (await pair.ask(*HIT)).token_ids == (await start(Role.AGGREGATED).ask(*HIT)).token_ids


async def test_a_prefill_connector_that_cannot_tell_what_was_fetched_holds_it_until_it_can(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(roles(pair.prefill)[1], "get_finished", broken)
        asked = [asyncio.create_task(pair.ask(*parts)) for parts in (HIT, SPARED, SPARED)]
        for each in asked:
            assert len((await each).token_ids) == 8
        assert not pair.prefill.is_empty()
    await until(pair.is_empty)
    assert len(faults(caplog)) == 1


async def test_blocks_that_cannot_be_given_back_are_held_until_their_lease_ends(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = start(Role.PREFILL, kv={"lease_seconds": 0.5})
    request = prefill.request(*HIT, kv=leased("hit"))
    break_for(monkeypatch, prefill, request, "give_back")
    prefill.engine.give_back_kv(["early"])
    await prefill.send(request)
    await prefill.ask(*SPARED, kv=leased("early"))
    prefill.engine.give_back_kv(["hit"])
    await until(prefill.is_empty)
    assert [names(fault, request) for fault in faults(caplog)] == [True]
    assert prefill.kv_stats().leases_expired == 1
    assert (await prefill.ask(*SPARED, kv=PLEASE)).handle


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_an_error_when_a_request_has_ended_costs_nothing(
    pair: Pair, role: Role, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if role is Role.PREFILL:
        instance, request = pair.prefill, pair.prefill.request(*HIT, kv=PLEASE, max_tokens=1)
    else:
        instance, request = pair.decode, to_decode(pair, await pair.begin(*HIT), *HIT)
    break_for(monkeypatch, instance, request, "drop")
    assert (await instance.send(request))[0].last.finish_reason == "length"
    await pair.ask(*SPARED)
    await until(pair.is_empty)
    assert [names(fault, request) for fault in faults(caplog)] == [True]


async def test_a_cancelled_request_that_cannot_be_dropped_holds_its_blocks_until_its_load_has_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that has not begun would end with the lease, since the prefill instance isn't told either."""
    request = to_decode(pair, await pair.begin(*HIT), *HIT, max_tokens=200)
    break_for(monkeypatch, pair.decode, request, "drop")
    scheduler_role, _ = roles(pair.decode)
    begin, begun = scheduler_role.update_state_after_alloc, threading.Event()

    def note(*given: Any) -> None:
        begin(*given)
        begun.set()

    monkeypatch.setattr(scheduler_role, "update_state_after_alloc", note)
    outputs = pair.decode.engine.generate(request)
    await anext(outputs)
    await until(begun.is_set)
    await outputs.aclose()
    await pair.ask(*SPARED)
    await until(pair.is_empty)


async def test_both_halves_are_shut_down_although_one_fails(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = start(Role.PREFILL)
    monkeypatch.setattr(roles(prefill)[0], "shutdown", broken)
    handle = (await prefill.ask(*HIT, kv=PLEASE)).handle
    prefill.engine.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(handle.remote_host, handle.remote_port)
    assert len(faults(caplog)) == 1
