"""Language engines on a small random checkpoint: answers, late embeddings, faults."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.ec_transfer.base import FROM_MEMORY
from chiasm.engine import EngineConfig, create_engine
from chiasm.engine.attention import AttentionStep
from chiasm.engine.block_manager import BlockHasher
from chiasm.engine.core_sharing import Worker
from chiasm.engine.inbox import MAX_TAKEN
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.request import GenerateRequest, ItemOutcome
from chiasm.engine.request_state import RequestState
from chiasm.engine.sampler import Sampled
from chiasm.engine.step import Step
from chiasm.errors import (
    ChiasmError,
    Code,
    ConfigurationError,
    DeadlineExceededError,
    EmbeddingUnavailableError,
    InvalidRequestError,
    OverloadedError,
)
from chiasm.models.base import Pixels, Prompt
from chiasm.tasks import end_tasks
from chiasm.wire import KVTransferParams, Role
from tests.engine.conftest import (
    A,
    B,
    Encoder,
    Instance,
    Parts,
    Start,
    StartEncoder,
    entries,
    sample_image,
    until,
    vision_of,
)
from tests.engine.connectors import CountingConnector

MESSAGES: dict[str, Parts] = {
    "text": ("what is this?",),
    "one image": ("what is", A, "this?"),
    "two images": (A, "and", B, "?"),
    "the same image twice": (A, "and", A, "?"),
}


@pytest.mark.parametrize("parts", MESSAGES.values(), ids=MESSAGES.keys())
async def test_a_separate_encoder_gives_the_same_answer_as_an_aggregated_engine(
    start: Start, encoder: Encoder, parts: Parts
) -> None:
    aggregated, pd = start(Role.AGGREGATED), start(Role.PD)
    expected = await aggregated.ask(*parts)
    await encoder.encode(*[part for part in parts if not isinstance(part, str)])
    answer = await pd.ask(*parts)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert len(answer.token_ids) == 8


async def test_the_work_of_a_prompt_is_a_part_of_its_prefill(start: Start) -> None:
    timing = (await start(Role.PD, max_num_batched_tokens=7).ask("a text that takes several steps")).last.timing
    assert timing.prefill_seconds is not None
    assert 0 < timing.prefill_work_seconds <= timing.prefill_seconds


async def test_bfloat16_answers_are_equal_too(start: Start, encoders: StartEncoder) -> None:
    expected = await start(Role.AGGREGATED, dtype="bfloat16").ask(A, "and", B, "?")
    await encoders(dtype="bfloat16").encode(A, B)
    assert (await start(Role.PD, dtype="bfloat16").ask(A, "and", B, "?")).token_ids == expected.token_ids


async def test_an_embedding_of_another_dtype_is_not_taken(start: Start, encoders: StartEncoder) -> None:
    pd = start(Role.PD)
    await encoders(dtype="bfloat16").encode(A)
    with pytest.raises(EmbeddingUnavailableError):
        await pd.ask(A, "?", seconds=3)


@pytest.mark.parametrize("budget", [7, 64])
async def test_embeddings_that_come_late_and_out_of_order_change_nothing(
    start: Start, encoder: Encoder, budget: int
) -> None:
    expected = await start(Role.AGGREGATED).ask(A, "and", B, "?")
    pd = start(Role.PD, max_num_batched_tokens=budget)
    answer = asyncio.create_task(pd.ask(A, "and", B, "?"))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    await encoder.encode(B)
    assert pd.engine.stats().num_stalled == 1
    await encoder.encode(A)
    result = await answer
    assert result.token_ids == expected.token_ids
    assert [item.outcome for item in result.last.timing.items] == [ItemOutcome.WAITED] * 2
    assert result.last.timing.wait_seconds > 0
    assert pd.engine.stats().items == {ItemOutcome.WAITED: 2}


async def test_only_steps_that_decode_leave_cores_to_threads_that_may_begin(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    seen: list[bool] = []
    computing = Worker.computing

    def noted(worker: Worker, seconds: float, *, steady: bool) -> AbstractContextManager[None]:
        seen.append(steady)
        return computing(worker, seconds, steady=steady)

    monkeypatch.setattr(Worker, "computing", noted)
    answer = await pd.ask("look")
    assert seen == [False] + [True] * (len(answer.token_ids) - 1)


async def test_an_engine_keeps_its_cores_from_step_to_step(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = start(Role.PD)
    seen: list[str] = []
    execute, rest = ModelRunner.execute, Worker.rest

    def noted_execute(runner: ModelRunner, step: Step, entries: Mapping[str, Tensor]) -> dict[str, Sampled]:
        seen.append("step")
        return execute(runner, step, entries)

    def noted_rest(worker: Worker) -> None:
        seen.append("rest")
        rest(worker)

    monkeypatch.setattr(ModelRunner, "execute", noted_execute)
    monkeypatch.setattr(Worker, "rest", noted_rest)
    answer = await pd.ask("look")
    await until(lambda: seen[-1] == "rest")
    steps = [index for index, name in enumerate(seen) if name == "step"]
    assert len(steps) == len(answer.token_ids) == steps[-1] - steps[0] + 1


async def test_a_swapped_image_changes_the_answer(start: Start) -> None:
    aggregated = start(Role.AGGREGATED)
    assert (await aggregated.ask(A, "?")).token_ids != (await aggregated.ask(sample_image(3), "?")).token_ids


async def test_text_is_answered_while_a_request_waits_for_its_embedding(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    late = asyncio.create_task(pd.ask("look:", A))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    assert len((await pd.ask("hello")).token_ids) == 8
    assert not late.done()
    await encoder.encode(A)
    await late


async def test_an_embedding_that_exists_counts_as_hit(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    for _ in range(2):
        answer = await pd.ask(A, "?")
        assert [item.outcome for item in answer.last.timing.items] == [ItemOutcome.HIT]
    assert pd.engine.stats().items == {ItemOutcome.HIT: 2}
    ec = pd.engine.stats().ec
    assert ec is not None
    assert ec.loads == 1


async def test_an_embedding_that_never_comes_fails_its_request_alone(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    with pytest.raises(EmbeddingUnavailableError, match="No embedding came within"):
        await pd.ask("see", A, seconds=3)
    assert pd.engine.stats().items == {ItemOutcome.MISSED: 1}
    assert pd.is_empty()
    await encoder.encode(A)
    assert (await pd.ask("see", A)).token_ids == (await start(Role.AGGREGATED).ask("see", A)).token_ids


async def test_a_torn_entry_is_waited_for_and_never_used(start: Start, encoder: Encoder, store: Path) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    (entry,) = entries(store)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    answer = asyncio.create_task(pd.ask(A, "?"))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    await encoder.encode(A)
    assert (await answer).token_ids == (await start(Role.AGGREGATED).ask(A, "?")).token_ids


async def test_a_deleted_store_only_delays_requests_with_images(start: Start, encoder: Encoder, store: Path) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    shutil.rmtree(store)
    late = asyncio.create_task(pd.ask(A, "?"))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    assert len((await pd.ask("hello")).token_ids) == 8
    await encoder.encode(A)
    assert (await late).token_ids == (await start(Role.AGGREGATED).ask(A, "?")).token_ids


async def test_a_failing_connector_fails_its_requests_and_not_the_engine(
    start: Start, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)

    def broken(*args: object) -> NoReturn:
        raise OSError("the file system is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pd.engine._embeddings._worker_role, "start_load_caches", broken)
        with pytest.raises(ChiasmError, match="OSError"):
            await pd.ask(A, "?")
    assert pd.is_empty()
    assert len((await pd.ask(A, "?")).token_ids) == 8


def request_of_another_size(pd: Instance) -> GenerateRequest:
    lying = pd.request(A, "?")
    wrong = pd.engine.processor.geometry_of_size(192, 192)
    name = lying.prompt.items[0].identifier
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    object.__setattr__(lying, "prompt", pd.engine.processor.build_chat(message, [(name, wrong)]))
    return lying


async def test_a_wrong_image_size_fails_its_request_alone(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    expected = await pd.ask(A, "?")
    with pytest.raises(EmbeddingUnavailableError, match="the image size sent is right"):
        await pd.send(request_of_another_size(pd))
    assert (await pd.ask(A, "?")).token_ids == expected.token_ids


async def test_an_entry_of_another_shape_is_removed_so_that_it_can_be_published_again(
    start: Start, encoder: Encoder, store: Path
) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    request = request_of_another_size(pd)
    answers = asyncio.create_task(pd.send(request))
    await until(lambda: not entries(store))
    assert await pd.engine.awaited_embeddings() == [request.prompt.items[0].identifier]
    await encoder.encode(A)
    with pytest.raises(EmbeddingUnavailableError, match="the image size sent is right"):
        await answers  # it came back like that: the request is wrong
    assert (await pd.ask(A, "?")).token_ids == (await start(Role.AGGREGATED).ask(A, "?")).token_ids


# Embeddings that are lost.


async def test_an_engine_tells_which_embeddings_it_awaits(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    answers = [asyncio.create_task(pd.ask(*parts)) for parts in ((B, A, "?"), (A, "!"))]
    await until(lambda: pd.engine.stats().num_stalled == 1)
    names = [item.identifier for item in pd.request(B, A).prompt.items]
    assert await pd.engine.awaited_embeddings() == names[:1]
    await encoder.encode(B)
    await asyncio.gather(*answers)
    assert await pd.engine.awaited_embeddings() == []


async def test_an_engine_tells_by_itself_which_published_embeddings_it_awaits(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD)
    await encoder.encode(A)
    a, b = (item.identifier for item in pd.request(A, B).prompt.items)
    asking = asyncio.create_task(pd.engine.lost_embeddings("proxy", [a, b]))
    losses = pd.engine._embeddings.losses
    await until(lambda: losses.is_asked)
    await pd.ask(A, "!")  # which is there
    assert not asking.done()
    answer = asyncio.create_task(pd.ask(B, A, "?"))
    assert await asking == [b]
    again = asyncio.create_task(pd.engine.lost_embeddings("proxy", [b]))
    assert await again == [b]  # it is lost still
    await encoder.encode(B)
    await answer
    gone = asyncio.create_task(pd.engine.lost_embeddings("proxy", [b]))
    await until(lambda: losses.is_asked)
    await end_tasks(gone)
    assert not losses.is_asked


async def test_an_engine_that_stops_ends_the_questions_that_wait(start: Start) -> None:
    pd = start(Role.PD)
    asking = asyncio.create_task(pd.engine.lost_embeddings("proxy", ["a" * 64]))
    await until(lambda: pd.engine._embeddings.losses.is_asked)
    await asyncio.to_thread(pd.engine.stop)
    assert await asking == []
    assert await pd.engine.lost_embeddings("proxy", ["a" * 64]) == []


def connector(name: str, store: Path) -> ECTransferConfig:
    return ECTransferConfig(
        connector=name,
        connector_module_path="tests.engine.connectors",
        role=ECTransferRole.CONSUMER,
        connector_extra_config={"shared_storage_path": store},
    )


async def test_text_streams_neither_ask_for_embeddings_nor_read_them(
    start: Start, encoder: Encoder, store: Path
) -> None:
    pd = start(Role.PD, ec=connector("CountingConnector", store), max_queued_requests=300)
    late = [asyncio.create_task(pd.ask(A, "?")) for _ in range(256)]
    await until(lambda: pd.engine.stats().num_stalled == 256)
    roles = pd.engine._embeddings._scheduler_role, pd.engine._embeddings._worker_role
    scheduler_role, worker_role = roles
    assert isinstance(scheduler_role, CountingConnector)
    assert isinstance(worker_role, CountingConnector)
    asked = scheduler_role.asked
    await pd.ask("hello", max_tokens=20)
    assert scheduler_role.asked == asked
    await encoder.encode(A)
    for each in late:
        await each
    assert scheduler_role.readers | worker_role.readers == {"chiasm-arrivals"}


@pytest.mark.parametrize("name", ["SilentConnector", "LossyConnector"])
async def test_an_embedding_is_waited_for_whatever_the_connector_knows_or_loses(
    start: Start, encoder: Encoder, store: Path, name: str
) -> None:
    pd = start(Role.PD, ec=connector(name, store))
    late = asyncio.create_task(pd.ask(A, "?"))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    await encoder.encode(A)
    assert (await late).token_ids == (await start(Role.AGGREGATED).ask(A, "?")).token_ids


async def test_an_engine_that_has_stopped_awaits_nothing(start: Start) -> None:
    pd = start(Role.PD)
    pd.engine.stop()
    assert await pd.engine.awaited_embeddings() == []


async def test_many_requests_at_once_get_the_same_answers_as_one_by_one(start: Start, encoder: Encoder) -> None:
    pd = start(Role.PD, max_num_batched_tokens=48)
    await encoder.encode(A, B)
    messages = [("one",), (A, "two"), ("three", B), (A, B), ("five " * 9,), (B, "six", A), (A, A), ("eight",)]
    alone = [(await start(Role.PD).ask(*parts)).token_ids for parts in messages[:3]]
    together = await asyncio.gather(*[pd.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in together[:3]] == alone
    again = await asyncio.gather(*[pd.ask(*parts) for parts in reversed(messages)])
    assert [answer.token_ids for answer in reversed(again)] == [answer.token_ids for answer in together]
    assert pd.engine.stats().prefix_cache_hit_tokens > 0


async def test_preemption_changes_no_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = start(Role.AGGREGATED)
    tight = start(Role.AGGREGATED, kv_cache_bytes=roomy.bytes_per_block * 9, max_model_len=144, block_size=4)
    messages = [(name, A) for name in ("abc", "def", "ghi", "jkl")]
    expected = [(await roomy.ask(*parts, max_tokens=32)).token_ids for parts in messages]
    vision = vision_of(tight)
    encode, may_encode = vision.encode, threading.Event()

    def encode_later(pixels: Pixels) -> Tensor:
        assert may_encode.wait(60)
        return encode(pixels)

    monkeypatch.setattr(vision, "encode", encode_later)
    answers = [asyncio.create_task(tight.ask(*parts, max_tokens=32)) for parts in messages]
    await until(lambda: tight.engine.stats().num_stalled == len(messages))  # so that all run at the same time
    may_encode.set()
    assert [(await answer).token_ids for answer in answers] == expected
    assert tight.engine.stats().preemptions > 0
    assert tight.is_empty()


async def test_choices_differ_by_seed_and_repeat_with_it(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    first = await instance.choices("hello", A, choices=3, temperature=1.0, seed=5)
    second = await instance.choices("hello", A, choices=3, temperature=1.0, seed=5)
    assert [choice.token_ids for choice in first] == [choice.token_ids for choice in second]
    assert len({tuple(choice.token_ids) for choice in first}) == 3
    assert (await instance.ask("hello", A, temperature=1.0, seed=6)).token_ids == first[1].token_ids


async def test_an_answer_ends_at_max_tokens_with_length(start: Start) -> None:
    answer = await start(Role.AGGREGATED).ask("hello", max_tokens=3)
    assert (len(answer.token_ids), answer.last.finish_reason) == (3, "length")


async def test_an_answer_ends_at_the_end_of_the_context(start: Start) -> None:
    answer = await start(Role.AGGREGATED, max_model_len=48).ask("hello", max_tokens=1000)
    assert answer.last.finish_reason == "length"
    assert len(answer.token_ids) < 48


async def test_a_stop_string_ends_the_answer(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    whole = await instance.ask("hello", max_tokens=12)
    stop = whole.text[4:6]
    answer = await instance.ask("hello", max_tokens=12, stop=(stop,))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", stop)


async def test_a_stop_token_ends_the_answer(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    whole = await instance.ask("hello")
    stop = whole.token_ids[3]
    answer = await instance.ask("hello", stop_token_ids=(stop,))
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert answer.last.stop_reason == stop


async def test_the_text_of_a_stop_token_can_be_kept(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    whole = await instance.ask("hello")
    stop = whole.token_ids[3]
    up_to_stop = await instance.ask("hello", max_tokens=whole.token_ids.index(stop) + 1)
    answer = await instance.ask("hello", stop_token_ids=(stop,), include_stop_str_in_output=True)
    assert answer.text == up_to_stop.text
    assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", stop)


async def test_logprobs_come_with_each_token(start: Start) -> None:
    answer = await start(Role.AGGREGATED).ask("hello", logprobs=2)
    assert [token.token_id for token in answer.logprobs] == answer.token_ids
    for token in answer.logprobs:
        assert token.top[0] == (token.token_id, token.logprob)


async def test_closing_the_iterator_frees_everything(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    stream = instance.engine.generate(instance.request("hello", A, max_tokens=500))
    await anext(stream)
    assert not instance.is_empty()
    await stream.aclose()
    await until(instance.is_empty)


async def test_cancelling_a_request_that_waits_frees_everything(start: Start) -> None:
    pd = start(Role.PD)
    task = asyncio.create_task(pd.ask("hello", A))
    await until(lambda: pd.engine.stats().num_stalled == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(pd.is_empty)


async def test_a_deadline_ends_a_running_request(start: Start) -> None:
    instance = start(Role.AGGREGATED, max_model_len=4096, kv_cache_bytes=64 << 20)
    with pytest.raises(DeadlineExceededError):
        await instance.ask("hello", max_tokens=4000, seconds=0.3)
    assert instance.is_empty()


async def test_a_full_queue_refuses_and_goes_on(start: Start) -> None:
    pd = start(Role.PD, max_queued_requests=2)
    waiting = [asyncio.create_task(pd.ask(A, str(number))) for number in range(2)]
    await until(lambda: pd.engine.stats().num_stalled == 2)
    with pytest.raises(OverloadedError):
        await pd.ask("hello")
    await end_tasks(*waiting)
    await until(pd.is_empty)
    assert len((await pd.ask("hello")).token_ids) == 8


@pytest.mark.parametrize("option", [{"logit_bias": {10**6: 1.0}}, {"stop_token_ids": (10**6,)}], ids=str)
async def test_a_token_outside_the_vocabulary_is_refused_by_name(start: Start, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary") as caught:
        await start(Role.AGGREGATED).ask("hello", **option)
    assert caught.value.param in option


async def test_an_item_that_can_never_fit_the_encoder_cache_is_refused(start: Start) -> None:
    with pytest.raises(InvalidRequestError, match="encoder cache"):
        await start(Role.AGGREGATED, encoder_cache_bytes=64).ask(A)


@pytest.mark.parametrize("connector", FROM_MEMORY)
async def test_an_embedding_that_can_never_be_received_is_refused_when_its_request_comes(
    start: Start, connector: str
) -> None:
    any_pd = start()
    (small,) = any_pd.prompt(B).items
    limit = any_pd.engine._scheduler.items.entry_bytes(small)
    pd = start(ec=ECTransferConfig(connector, ECTransferRole.CONSUMER, receive_bytes=limit))
    with pytest.raises(InvalidRequestError, match="--ec-receive-bytes") as caught:
        await pd.ask(B, A)
    assert caught.value.code == Code.EMBEDDING_TOO_LARGE
    waits = asyncio.create_task(pd.ask(B))  # it would fit, and nobody makes it
    await until(lambda: pd.engine.stats().num_stalled == 1)
    waits.cancel()


async def test_the_engine_asserts_what_the_server_has_checked(start: Start) -> None:
    instance = start(Role.AGGREGATED, max_model_len=64, max_items=2)
    for request in (
        instance.request("word " * 100),
        instance.request(A, A, A),
        instance.request("hello", choices=17),
        replace(instance.request(), prompt=Prompt([])),
        instance.request("hello", kv=KVTransferParams(do_remote_decode=True)),
    ):
        with pytest.raises(AssertionError):
            await instance.send(request)
    assert len((await instance.ask("hello")).token_ids) == 8


async def test_a_failing_step_fails_its_requests_and_not_the_engine(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = start(Role.AGGREGATED)
    whole = instance.engine._language.forward

    def broken(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(instance.engine._language, "forward", broken)
    with pytest.raises(Exception, match="RuntimeError"):
        await instance.ask("hello")
    monkeypatch.setattr(instance.engine._language, "forward", whole)
    assert len((await instance.ask("hello")).token_ids) == 8
    assert instance.engine.healthy


async def test_a_request_that_needs_too_much_memory_fails_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = start(Role.AGGREGATED)
    texts = ["hello", "what is this?", "and"]
    expected = [(await instance.ask(text, max_tokens=40)).token_ids for text in texts]
    whole = instance.engine._language.forward

    def forward(token_ids: Tensor, positions: Tensor, attention: AttentionStep, *args: Any) -> Tensor:
        padded = sum(group.slots.numel() for group in attention.decodes)
        if padded > 3 * 100 or any(len(segment.slots) > 100 for segment in attention.prefills):
            raise torch.OutOfMemoryError("Tried to allocate 8 GiB.")
        return whole(token_ids, positions, attention, *args)

    monkeypatch.setattr(instance.engine._language, "forward", forward)
    streams = [asyncio.create_task(instance.ask(text, max_tokens=40)) for text in texts]
    with pytest.raises(ChiasmError, match="too little memory"):
        await instance.ask("long " * 120)
    assert [(await stream).token_ids for stream in streams] == expected
    assert instance.is_empty()


def hold_steps(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have no step end before the event is set."""
    may_step, execute = threading.Event(), instance.engine._runner.execute

    def execute_later(step: Step, entries: Mapping[str, Tensor]) -> dict[str, Sampled]:
        assert may_step.wait(60)
        return execute(step, entries)

    monkeypatch.setattr(instance.engine._runner, "execute", execute_later)
    return may_step


async def test_a_request_that_cannot_be_queued_fails_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = start()
    may_step = hold_steps(pd, monkeypatch)
    stream = asyncio.create_task(pd.ask("hello", max_tokens=100))
    await until(lambda: pd.engine.stats().num_running == 1)
    may_step.set()

    def make_choices(state: RequestState, *args: Any, **options: Any) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RequestState, "make_choices", make_choices)
        with pytest.raises(ChiasmError, match="failed on this request: MemoryError"):
            await pd.choices("one of many", choices=16)
    assert len((await stream).token_ids) == 100
    assert pd.is_empty()


async def test_an_error_in_what_the_engine_is_told_costs_no_later_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = start()
    may_step = hold_steps(pd, monkeypatch)
    stream = asyncio.create_task(pd.ask("hello", max_tokens=400))
    await until(lambda: pd.engine.stats().num_running == 1)

    def look_again() -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pd.engine._embeddings, "look_again", look_again)
        pd.engine._item_news()
        may_step.set()
        with pytest.raises(ChiasmError, match="The engine failed: MemoryError"):
            await stream
    assert pd.engine.healthy
    assert len((await pd.ask("hello")).token_ids) == 8
    assert pd.is_empty()


async def test_requests_are_handled_a_few_at_a_time_so_that_streams_go_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = start(Role.AGGREGATED)
    events: list[str] = []
    add, execute = instance.engine._loop._add, instance.engine._runner.execute

    def noted_add(state: RequestState) -> None:
        events.append("add")
        add(state)

    def noted_execute(step: Step, entries: Mapping[str, Tensor]) -> dict[str, Sampled]:
        events.append("step")
        return execute(step, entries)

    monkeypatch.setattr(instance.engine._loop, "_add", noted_add)
    monkeypatch.setattr(instance.engine._runner, "execute", noted_execute)
    await asyncio.gather(*(instance.ask("hello", max_tokens=2) for _ in range(3 * MAX_TAKEN)))
    in_a_row = [len(list(group)) for event, group in itertools.groupby(events) if event == "add"]
    assert sum(in_a_row) == 3 * MAX_TAKEN
    assert max(in_a_row) <= MAX_TAKEN


async def test_the_engines_thread_hashes_nothing_that_came_with_a_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = start(Role.AGGREGATED, max_num_batched_tokens=2048)
    request = instance.request("word " * 600, choices=3, max_tokens=20)
    hashed: list[tuple[str, int]] = []
    chained = BlockHasher._chained

    def noted(self: BlockHasher, before: bytes, start: int, token_ids: Sequence[int]) -> bytes:
        hashed.append((threading.current_thread().name, start))
        return chained(self, before, start, token_ids)

    monkeypatch.setattr(BlockHasher, "_chained", noted)
    await instance.send(request)
    given = len(request.prompt.token_ids)
    by_engine = [start for name, start in hashed if name == "chiasm-engine"]
    assert by_engine
    assert min(by_engine) > given - 16
    assert len([start for name, start in hashed if name != "chiasm-engine"]) == given // 16
    assert threading.current_thread().name not in {name for name, _ in hashed}


def test_a_kv_cache_that_does_not_fit_is_refused_at_start(start: Start) -> None:
    with pytest.raises(ConfigurationError, match="lower --kv-cache-bytes"):
        start(Role.AGGREGATED, kv_cache_bytes=1 << 50)
    with pytest.raises(ConfigurationError, match="lower --max-model-len or raise --kv-cache-bytes"):
        start(Role.AGGREGATED, kv_cache_bytes=1 << 20, max_model_len=4096)


def test_default_sampling_out_of_range_is_refused_at_start(checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "generation_config.json").write_text('{"top_p": 0}')
    with pytest.raises(ConfigurationError, match=r"generation_config.json: top_p must be above 0"):
        create_engine(EngineConfig(model, Role.AGGREGATED))


async def test_stopping_ends_running_requests_with_an_error(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    stream = instance.engine.generate(instance.request("hello", max_tokens=500))
    await anext(stream)
    await asyncio.to_thread(instance.engine.stop)
    with pytest.raises(Exception, match="stopped"):
        async for _ in stream:
            pass
    assert not instance.engine.healthy
