"""An aggregated engine encodes beside its steps: images come late to their prompts, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from torch import Tensor

from chiasm.engine.late_items import LateItems
from chiasm.engine.local_encoder import MAX_FINISHED
from chiasm.engine.request import ItemOutcome
from chiasm.engine.sequence import Sequence
from chiasm.errors import ChiasmError, DeadlineExceededError
from chiasm.models.base import Pixels, PromptItem
from chiasm.wire import Role
from tests.engine.conftest import A, B, Instance, Start, sample_image, until, vision_of


class Gate:
    """Stops an encoder before each item until it is opened."""

    def __init__(self, encode: Callable[[Pixels], Tensor]) -> None:
        self.opened = threading.Event()
        self.begun: list[Pixels] = []
        self._encode = encode

    def __call__(self, pixels: Pixels) -> Tensor:
        self.begun.append(pixels)
        self.opened.wait()
        return self._encode(pixels)


@pytest.fixture
def instance(start: Start) -> Instance:
    return start(Role.AGGREGATED)


@pytest.fixture
def gate(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    vision = vision_of(instance)
    gate = Gate(vision.encode)
    monkeypatch.setattr(vision, "encode", gate)
    yield gate
    gate.opened.set()


async def test_text_is_answered_while_an_image_is_encoded(instance: Instance, gate: Gate) -> None:
    image = asyncio.create_task(instance.ask("look:", A))
    await until(lambda: bool(gate.begun))
    assert len((await instance.ask("hello")).token_ids) == 8
    assert not image.done()
    gate.opened.set()
    await image


async def test_what_comes_before_an_image_is_prefilled_while_it_is_encoded(instance: Instance, gate: Gate) -> None:
    text = "some words before the image " * 4
    image = asyncio.create_task(instance.ask(text, A))
    await until(lambda: instance.engine.stats().num_stalled == 1)
    assert instance.engine.stats().kv_blocks_used > 0
    gate.opened.set()
    assert (await image).token_ids == (await instance.ask(text, A)).token_ids


async def test_an_image_that_two_requests_need_is_encoded_once(instance: Instance, gate: Gate) -> None:
    both = [asyncio.create_task(instance.ask(text, A)) for text in ("first", "second")]
    await until(lambda: instance.engine.stats().num_stalled == 2)
    gate.opened.set()
    answers = await asyncio.gather(*both)
    stats = instance.engine.stats()
    assert stats.images_encoded == len(gate.begun) == 1
    assert stats.items == {ItemOutcome.ENCODED: 1, ItemOutcome.WAITED: 1}
    times = [answer.last.timing.encode_seconds for answer in answers]
    assert sum(times) == stats.encode_seconds > 0
    assert sorted(times)[0] == 0


async def test_an_image_that_was_encoded_before_is_a_hit(instance: Instance) -> None:
    await instance.ask("first", A)
    answer = await instance.ask("second", A)
    assert [item.outcome for item in answer.last.timing.items] == [ItemOutcome.HIT]
    assert instance.engine.stats().images_encoded == 1


async def test_the_image_of_the_smaller_request_is_encoded_first(instance: Instance, gate: Gate) -> None:
    first = asyncio.create_task(instance.ask(sample_image(9)))
    await until(lambda: bool(gate.begun))
    large = instance.request(*[sample_image(seed) for seed in range(10, 14)], "word " * 20)
    small = instance.request(A)
    others = [asyncio.create_task(instance.send(request)) for request in (large, small)]
    await until(lambda: instance.engine.stats().num_stalled == 3)
    gate.opened.set()
    await asyncio.gather(first, *others)
    assert gate.begun[1] is next(iter(small.pixels.values()))


async def test_an_image_that_fails_fails_all_requests_that_need_it_and_not_the_engine(
    instance: Instance, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pixels: Pixels) -> NoReturn:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(gate, "_encode", broken)
        both = [asyncio.create_task(instance.ask(text, A)) for text in ("first", "second")]
        await until(lambda: instance.engine.stats().num_stalled == 2)
        gate.opened.set()
        for answer in both:
            with pytest.raises(ChiasmError, match="The encoder failed on an image: RuntimeError"):
                await answer
    assert len(gate.begun) == 1
    assert instance.is_empty()
    assert instance.engine.stats().items == {ItemOutcome.MISSED: 2}
    assert len((await instance.ask("first", A)).token_ids) == 8
    assert instance.engine.stats().images_encoded == 1


async def test_an_embedding_that_is_dropped_just_before_it_is_taken_is_made_again(
    instance: Instance, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, items = instance.engine._embeddings._encoder, instance.engine._scheduler.items
    assert encoder is not None
    dropped: list[str] = []

    def make_room(sequence: Sequence, item: PromptItem) -> bool:
        """Do what the encoder's thread may do at this moment."""
        if not dropped:
            dropped.append(item.identifier)
            with encoder._changed:
                del encoder._encoded[item.identifier]
                encoder._changed.notify()
        return LateItems.make_room(items, sequence, item)

    monkeypatch.setattr(items, "make_room", make_room)
    gate.opened.set()
    both = await asyncio.gather(instance.ask("look:", A), instance.ask("hello"))
    assert [len(answer.token_ids) for answer in both] == [8, 8]
    assert len(dropped) == 1
    assert len(gate.begun) == 2


async def test_an_encoder_that_has_waited_until_what_it_finished_is_taken_goes_on(instance: Instance) -> None:
    encoder, pixels = instance.engine._embeddings._encoder, instance.engine.processor.preprocess(A.image)
    assert encoder is not None
    wanted = {str(number): pixels for number in range(MAX_FINISHED + 2)}
    encoder.want(wanted)
    await until(lambda: len(encoder._encoded) == MAX_FINISHED)
    for name in list(wanted)[:MAX_FINISHED]:
        assert encoder.take(name) is not None
        del wanted[name]
        encoder.want(wanted)
    await until(lambda: all(name in encoder for name in wanted))


async def test_images_of_an_aborted_request_are_not_encoded(instance: Instance, gate: Gate) -> None:
    first = asyncio.create_task(instance.ask("first", A))
    await until(lambda: bool(gate.begun))
    aborted = asyncio.create_task(instance.ask("second", B))
    await until(lambda: instance.engine.stats().num_stalled == 2)
    aborted.cancel()
    await until(lambda: instance.engine.stats().num_stalled == 1)
    gate.opened.set()
    await first
    await instance.ask("third", sample_image(3))
    assert instance.engine.stats().images_encoded == len(gate.begun) == 2


async def test_a_deadline_ends_a_request_whose_image_is_being_encoded(instance: Instance, gate: Gate) -> None:
    with pytest.raises(DeadlineExceededError, match="within its deadline"):
        await instance.ask("look:", A, seconds=3)
    assert instance.is_empty()


async def test_an_encoder_cache_of_one_image_serves_requests_of_several(start: Start, instance: Instance) -> None:
    messages = [("see", A, B, "?"), (B, A), (A, sample_image(3), B)]
    expected = [(await instance.ask(*parts)).token_ids for parts in messages]
    rows = max(len(instance.prompt(image).items[0].geometry.rows) for image in (A, B))
    tight = start(Role.AGGREGATED, encoder_cache_bytes=rows * instance.engine._language.entry_width * 4)
    answers = await asyncio.gather(*[tight.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    assert tight.engine.stats().images_encoded > 3, "entries that were evicted are encoded again"
    assert tight.is_empty()


async def test_stopping_ends_requests_whose_images_are_being_encoded(instance: Instance, gate: Gate) -> None:
    answer = asyncio.create_task(instance.ask("look:", A))
    await until(lambda: bool(gate.begun))
    stopped = asyncio.create_task(asyncio.to_thread(instance.engine.stop))
    with pytest.raises(ChiasmError, match="stopped"):
        await answer
    gate.opened.set()
    await stopped
    assert not instance.engine.healthy
