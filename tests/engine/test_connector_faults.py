"""A connector that raises errors: only the requests that want what it was asked for fail."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from chiasm.ec_transfer import ECConnector, ECConnectorMetadata
from chiasm.engine.request import ItemOutcome
from chiasm.engine.sequence import Sequence
from chiasm.errors import ChiasmError
from chiasm.wire import ECPlace, Role
from tests import broken_connector
from tests.broken_connector import faults
from tests.engine.conftest import A, B, Encoder, Instance, Start, StartEncoder, entries, sample_image, until

THIRD = sample_image(3)

OF_ONE_ITEM = ("has_cache_item", "update_state_after_alloc")
OF_A_STEP = ("build_connector_meta", "bind_connector_metadata", "start_load_caches")
OF_NO_REQUEST = ("clear_connector_metadata", "request_finished")


def roles(pd: Instance) -> tuple[ECConnector, ECConnector]:
    embeddings = pd.engine._embeddings
    assert embeddings._scheduler_role is not None
    assert embeddings._worker_role is not None
    return embeddings._scheduler_role, embeddings._worker_role


def name_of(pd: Instance, image: object) -> str:
    return pd.prompt(image).items[0].identifier  # type: ignore[arg-type]


def identifiers_in(subject: object) -> set[str]:
    """Return the items that something given to a connector, or returned by it, is about."""
    if isinstance(subject, ECConnectorMetadata):
        return {*subject.loads}
    if isinstance(subject, Sequence):
        return {item.identifier for item in subject.items}
    return {subject} if isinstance(subject, str) else set()


def break_for(patch: pytest.MonkeyPatch, pd: Instance, identifier: str, method: str) -> None:
    """Have both halves raise an error in each call of ``method`` for this item."""
    for role in roles(pd):
        broken_connector.break_for(patch, role, identifier, method, identifiers_in)


@pytest.mark.parametrize("method", [*OF_ONE_ITEM, *OF_A_STEP])
async def test_an_error_costs_the_requests_that_want_the_item_and_is_logged_once(
    start: Start,
    encoder: Encoder,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pd = start(Role.PD)
    hit = [asyncio.create_task(pd.ask(A, text)) for text in ("?", "!")]
    spared = [asyncio.create_task(pd.ask(B, text)) for text in ("?", "!")]
    await until(lambda: pd.engine.stats().num_stalled == 4)
    stream = asyncio.create_task(pd.ask("hello", max_tokens=100))
    with monkeypatch.context() as patch:
        break_for(patch, pd, name_of(pd, A), method)
        await encoder.encode(A)
        for each in hit:
            with pytest.raises(ChiasmError, match="EC connector failed: OSError"):
                await each
        assert len(faults(caplog)) == 1
    assert len((await stream).token_ids) == 100
    await encoder.encode(B)
    aggregated = start(Role.AGGREGATED)
    for each, text in zip(spared, ("?", "!"), strict=True):
        assert (await each).token_ids == (await aggregated.ask(B, text)).token_ids
    assert (await pd.ask(A, "?")).token_ids == (await aggregated.ask(A, "?")).token_ids
    assert pd.is_empty()


async def test_an_error_on_admission_costs_the_request(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A, B)
    break_for(monkeypatch, pd, name_of(pd, A), "ensure_cache_available")
    with pytest.raises(ChiasmError, match="EC connector failed: OSError"):
        await pd.ask(A, "?")
    assert (await pd.ask(B, "?")).token_ids == (await start(Role.AGGREGATED).ask(B, "?")).token_ids
    assert pd.is_empty()


async def test_an_error_on_what_a_request_needs_later_costs_the_request(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    break_for(monkeypatch, pd, name_of(pd, A), "has_cache_item")
    late = asyncio.create_task(pd.ask(B, "?"))
    with pytest.raises(ChiasmError, match="EC connector failed: OSError"):
        await pd.ask(B, "and", A, "?")  # B isn't there, so A isn't needed yet
    await encoder.encode(B)
    assert len((await late).token_ids) == 8


@pytest.mark.parametrize("method", OF_NO_REQUEST)
async def test_an_error_when_all_is_done_costs_no_request(
    start: Start, encoder: Encoder, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    break_for(monkeypatch, pd, name_of(pd, A), method)
    for _ in range(2):
        assert len((await pd.ask(A, "?")).token_ids) == 8
    await until(pd.is_empty)


async def test_what_the_connector_cannot_tell_is_awaited(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    late = [asyncio.create_task(pd.ask(each, "?")) for each in (A, B)]
    await until(lambda: pd.engine.stats().num_stalled == 2)
    with monkeypatch.context() as patch:
        break_for(patch, pd, name_of(pd, A), "is_coming")
        assert set(await pd.engine.awaited_embeddings()) == {name_of(pd, A), name_of(pd, B)}
    await encoder.encode(A, B)
    await asyncio.gather(*late)


async def test_a_place_that_cannot_be_noted_costs_no_other(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = start(Role.PD)
    places = {letter * 64: ECPlace(host="127.0.0.1", port=1, engine_id=letter) for letter in "abc"}
    noted: dict[str, ECPlace] = {}
    stored: set[str] = set()

    def expect(places: Mapping[str, ECPlace], names: list[str] | tuple[str, ...] = ()) -> None:
        if "b" * 64 in places or "d" * 64 in names:
            raise OSError("the connector is broken")
        noted.update(places)
        stored.update(names)

    monkeypatch.setattr(roles(pd)[0], "expect", expect)
    pd.engine.expect_embeddings(places, ["d" * 64, "e" * 64])
    assert noted == {name: place for name, place in places.items() if name != "b" * 64}
    assert stored == {"e" * 64}


@pytest.mark.parametrize("method", ["has_cache_item", "restore"])
async def test_an_encoder_encodes_what_the_connector_cannot_be_asked_for(
    encoders: StartEncoder, store: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders(cache=f"file://{tmp_path}/cache" if method == "restore" else "")
    await encoder.encode(A)
    if method == "restore":
        shutil.rmtree(store)

    def broken(*given: object) -> NoReturn:
        raise OSError("the connector is broken")

    for role in (encoder.engine._ec_scheduler, encoder.engine._ec_worker):
        monkeypatch.setattr(role, method, broken)
    items = await encoder.encode(A, B)
    assert [item.outcome for item in items] == [ItemOutcome.ENCODED] * 2
    assert len(entries(store)) == 2


async def test_an_entry_that_cannot_be_discarded_costs_the_request_that_it_does_not_fit(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A, B)
    name = name_of(pd, A)
    request = pd.request(A, "?")
    wrong = pd.engine.processor.geometry_of_size(192, 192)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    object.__setattr__(request, "prompt", pd.engine.processor.build_chat(message, [(name, wrong)]))
    break_for(monkeypatch, pd, name, "discard")
    failing = asyncio.create_task(pd.send(request))
    assert len((await pd.ask(B, "?")).token_ids) == 8
    await encoder.encode(A)
    with pytest.raises(ChiasmError, match="the image size sent is right"):
        await failing


async def test_a_connector_that_fails_in_every_step_costs_only_what_these_load_and_is_logged_once(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    assert len((await pd.ask(A, "?")).token_ids) == 8  # so A is in memory
    waits = asyncio.create_task(pd.ask(B, "?"))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    stream = asyncio.create_task(pd.ask("hello", max_tokens=100))
    caplog.clear()

    def fail() -> NoReturn:
        raise OSError("the connector is broken")

    with monkeypatch.context() as patch:
        patch.setattr(roles(pd)[0], "build_connector_meta", fail)
        await encoder.encode(THIRD)
        for text in "?!.":
            with pytest.raises(ChiasmError, match="EC connector failed: OSError"):
                await pd.ask(THIRD, text)
            assert len((await pd.ask(A, text)).token_ids) == 8
        assert len(faults(caplog)) == 1
        assert pd.engine.ec_faults >= 3
    assert len((await stream).token_ids) == 100
    await encoder.encode(B)
    aggregated = start(Role.AGGREGATED)
    assert (await waits).token_ids == (await aggregated.ask(B, "?")).token_ids
    assert (await pd.ask(THIRD, "?")).token_ids == (await aggregated.ask(THIRD, "?")).token_ids
    assert pd.is_empty()


@pytest.mark.parametrize("role", [Role.ENCODER, Role.PD])
def test_both_halves_are_shut_down_although_one_fails(
    start: Start, encoder: Encoder, role: Role, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if role is Role.ENCODER:
        stop, first, second = encoder.engine.stop, encoder.engine._ec_scheduler, encoder.engine._ec_worker
    else:
        pd = start(Role.PD)
        stop, (first, second) = pd.engine.stop, roles(pd)
    ended: list[str] = []

    def fail() -> NoReturn:
        raise OSError("the connector is broken")

    monkeypatch.setattr(first, "shutdown", fail)
    monkeypatch.setattr(second, "shutdown", lambda: ended.append("second"))
    stop()
    assert ended == ["second"]
    assert len(faults(caplog)) == 1
