"""Prefill and decode in engines of their own: what comes out is what one engine would have said."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
import pytest

from chiasm.errors import ChiasmError, InvalidRequestError, KVUnavailableError
from chiasm.wire import KVTransferParams, Role
from tests.engine.conftest import Answer, Instance, sample_image
from tests.engine.test_engine import until

A, B = sample_image(1), sample_image(2, height=128, width=64)

PLEASE = KVTransferParams(do_remote_decode=True, continues=True)

MESSAGES = {
    "text": ("what is this?",),
    "one image": ("what is", A, "this?"),
    "two images": (A, "and", B, "?"),
    "the same image twice": (A, "and", A, "?"),
    "a long text": ("word " * 90,),
}

SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5},
    "penalties": {"temperature": 0.8, "seed": 1, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    "frequency penalty": {"frequency_penalty": 2.0},
    "min_tokens": {"min_tokens": 5, "ignore_eos": False},
    "logprobs": {"logprobs": 3},
}


@dataclass
class Pair:
    """A prefill and a decode engine."""

    prefill: Instance
    decode: Instance

    async def ask(self, *parts, **options) -> Answer:
        """Both in turn, as the proxy has them answer a stream: what the client would get."""
        first = await self.prefill.ask(*parts, kv=PLEASE, **options)
        handle = first.last.kv_transfer_params
        if handle is None:
            return first
        return joined(first, await self.go_on(handle, *parts, **options))

    async def go_on(self, handle: KVTransferParams, *parts, **options) -> Answer:
        sent = msgspec.structs.replace(over_the_wire(handle), num_sent=len(handle.output_token_ids))
        return await self.decode.ask(*parts, kv=sent, **options)

    def is_empty(self) -> bool:
        return self.prefill.is_empty() and self.decode.is_empty()


def over_the_wire(handle: KVTransferParams) -> KVTransferParams:
    return msgspec.json.decode(msgspec.json.encode(handle), type=KVTransferParams)


def joined(first: Answer, rest: Answer) -> Answer:
    new = [output for output in rest.outputs if not output.already_sent]
    outputs = [*first.outputs, *new]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    return Answer(token_ids, "".join(output.text for output in outputs), outputs)


@pytest.fixture
def pair(start) -> Pair:
    return Pair(start(Role.PREFILL), start(Role.DECODE))


@pytest.mark.parametrize("parts", MESSAGES.values(), ids=MESSAGES.keys())
async def test_prefill_apart_from_decode_answers_as_one_engine_does(start, encoder, pair, parts):
    expected = await start(Role.AGGREGATED).ask(*parts)
    await encoder.encode(*[part for part in parts if not isinstance(part, str)])
    answer = await pair.ask(*parts)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.last.finish_reason == expected.last.finish_reason
    await until(pair.is_empty)


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
async def test_sampling_goes_on_as_in_one_engine(start, encoder, pair, options):
    expected = await start(Role.AGGREGATED).ask("what is", A, "this?", **options)
    await encoder.encode(A)
    answer = await pair.ask("what is", A, "this?", **options)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    if "logprobs" in options:
        found, wanted = (
            [logprob for output in each.outputs for logprob in output.logprobs] for each in (answer, expected)
        )
        assert [one.token_id for one in found] == [one.token_id for one in wanted]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-4)


async def test_without_a_seed_decode_goes_on_with_the_one_that_prefill_drew(pair):
    first = await pair.prefill.ask("hello", kv=PLEASE, temperature=1.0)
    handle = first.last.kv_transfer_params
    rest = await pair.go_on(handle, "hello", temperature=1.0)
    again = await pair.prefill.ask("hello", temperature=1.0, kv=PLEASE, seed=handle.seed)
    repeated = await pair.go_on(again.last.kv_transfer_params, "hello", temperature=1.0)
    assert joined(again, repeated).token_ids == joined(first, rest).token_ids


async def test_a_stop_string_across_the_handover_ends_the_answer_where_one_engine_would(start, pair):
    aggregated = start(Role.AGGREGATED)
    plain = await aggregated.ask("hello", max_tokens=12, temperature=1.0, seed=3)
    text = plain.text
    for begin in range(3):
        for length in (2, 5):
            options = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "stop": (text[begin : begin + length],)}
            expected = await aggregated.ask("hello", **options)
            answer = await pair.ask("hello", **options)
            assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
            assert answer.last.stop_reason == expected.last.stop_reason


async def test_an_answer_of_one_token_ends_at_prefill(pair):
    answer = await pair.prefill.ask("hello", kv=PLEASE, max_tokens=1)
    assert answer.last.finish_reason == "length"
    assert answer.last.kv_transfer_params is None
    assert pair.prefill.is_empty()


async def test_a_sender_that_speaks_as_vllm_does_gets_a_handle_and_decode_says_it_all(start, pair):
    expected = await start(Role.AGGREGATED).ask("hello", logprobs=0)
    first = await pair.prefill.ask("hello", kv=KVTransferParams(do_remote_decode=True), max_tokens=1, logprobs=0)
    answer = await pair.decode.ask("hello", kv=over_the_wire(first.last.kv_transfer_params), logprobs=0)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert sum(len(output.logprobs) for output in answer.outputs) == 8
    await until(pair.is_empty)


async def test_a_handle_whose_token_ends_the_answer_ends_it_at_decode(start, pair):
    expected = await start(Role.AGGREGATED).ask("hello", max_tokens=1)
    first = await pair.prefill.ask("hello", kv=KVTransferParams(do_remote_decode=True), max_tokens=1)
    answer = await pair.decode.ask("hello", kv=first.last.kv_transfer_params, max_tokens=1)
    assert answer.token_ids == expected.token_ids
    assert answer.last.finish_reason == "length"
    await until(pair.is_empty)


async def test_several_choices_are_all_sampled_at_decode(start, encoder, pair):
    options = {"choices": 3, "temperature": 1.0, "seed": 9}
    expected = await start(Role.AGGREGATED).choices("what is", A, **options)
    await encoder.encode(A)
    first = await pair.prefill.ask("what is", A, kv=KVTransferParams(do_remote_decode=True), temperature=1.0, seed=9)
    handle = msgspec.structs.replace(first.last.kv_transfer_params, output_token_ids=[])
    answers = await pair.decode.choices("what is", A, kv=handle, **options)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    await until(pair.is_empty)


async def test_an_answer_broken_off_anywhere_goes_on_elsewhere(start, encoder, pair):
    options = {"max_tokens": 10, "temperature": 0.9, "seed": 4}
    expected = await start(Role.AGGREGATED).ask(A, "?", **options)
    await encoder.encode(A)
    for sent in (1, 4, 9):
        given = expected.token_ids[:sent]
        please = msgspec.structs.replace(PLEASE, output_token_ids=given, num_sent=sent, seed=4)
        first = await pair.prefill.ask(A, "?", kv=please, **options)
        handle = first.last.kv_transfer_params
        rest = first if handle is None else joined(first, await pair.go_on(handle, A, "?", **options))
        before = sum(len(output.text) for output in first.outputs if output.already_sent)
        assert rest.token_ids == expected.token_ids
        assert rest.text == expected.text
        assert rest.text[:before] == expected.text[:before]
    await until(pair.is_empty)


async def test_blocks_that_decode_has_already_are_not_moved(pair):
    parts = ("word " * 60,)
    await pair.ask(*parts)
    before = pair.decode.engine.stats().kv.transferred_bytes
    again = await pair.ask(*parts)
    moved = pair.decode.engine.stats().kv.transferred_bytes - before
    block = pair.decode.engine._runner.kv_cache.blocks.shape[1]
    assert moved <= block
    assert again.token_ids == (await pair.ask(*parts)).token_ids


async def test_many_requests_at_once(start, encoder, pair):
    aggregated = start(Role.AGGREGATED)
    await encoder.encode(A, B)
    messages = [(f"number {n}", A if n % 2 else B, "?") for n in range(12)]
    expected = [(await aggregated.ask(*parts)).token_ids for parts in messages]
    answers = await asyncio.gather(*[pair.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    await until(pair.is_empty)


async def test_a_full_decode_engine_makes_requests_wait(start):
    prefill = start(Role.PREFILL)
    per_token = prefill.engine._runner.kv_cache.blocks.shape[1] // 16
    pair = Pair(prefill, start(Role.DECODE, kv_cache_bytes=per_token * 16 * 5, max_model_len=80))
    messages = [(f"number {n}",) for n in range(8)]
    expected = [(await start(Role.AGGREGATED).ask(*parts)).token_ids for parts in messages]
    answers = await asyncio.gather(*[pair.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    await until(pair.is_empty)


async def test_a_decode_engine_short_of_blocks_breaks_off_an_answer_about_an_image_and_says_so(start, encoder):
    prefill = start(Role.PREFILL, block_size=4)
    block = prefill.engine._runner.kv_cache.blocks.shape[1]
    await encoder.encode(A)
    length = len(prefill.prompt(A, "number 1").token_ids)
    # Room for both prompts and one answer: however late the second comes, both can't be finished.
    tokens = 100
    num_blocks = 2 * -(-length // 4) + tokens // 4 + 1
    limits = {"kv_cache_bytes": block * num_blocks, "max_model_len": length + tokens + 4}
    pair = Pair(prefill, start(Role.DECODE, block_size=4, **limits))
    handles = [(await prefill.ask(A, f"number {n}", kv=PLEASE)).last.kv_transfer_params for n in (1, 2)]
    asked = [pair.go_on(handle, A, f"number {n}", max_tokens=tokens) for n, handle in zip((1, 2), handles, strict=True)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    broken = [answer for answer in answers if isinstance(answer, KVUnavailableError)]
    assert [error.code for error in broken] == ["preempted"]
    assert len([answer for answer in answers if isinstance(answer, Answer)]) == 1
    await until(pair.is_empty)


async def test_a_handle_of_another_prompt_is_refused(pair):
    handle = (await pair.prefill.ask("number 1", kv=PLEASE)).last.kv_transfer_params
    with pytest.raises(InvalidRequestError, match="another prompt"):
        await pair.go_on(handle, "number 2")
    with pytest.raises(InvalidRequestError, match="tokens"):
        await pair.go_on(handle, "number 1 and more")


async def test_a_handle_of_another_salt_is_refused(pair):
    handle = (await pair.prefill.ask("number 1", kv=PLEASE, salt="a")).last.kv_transfer_params
    with pytest.raises(InvalidRequestError, match="another prompt"):
        await pair.go_on(handle, "number 1", salt="b")


async def test_a_handle_is_good_once(pair):
    handle = (await pair.prefill.ask("hello", kv=PLEASE)).last.kv_transfer_params
    await pair.go_on(handle, "hello")
    with pytest.raises(KVUnavailableError):
        await pair.go_on(handle, "hello")
    assert (await pair.ask("hello")).last.finish_reason == "length"
    await until(pair.is_empty)


async def test_a_handle_of_an_engine_that_has_ended_is_refused_and_the_next_request_is_right(start, pair):
    other = start(Role.PREFILL)
    handle = (await other.ask("hello", kv=PLEASE)).last.kv_transfer_params
    other.engine.stop()
    with pytest.raises(KVUnavailableError):
        await pair.go_on(handle, "hello")
    assert (await pair.ask("hello")).last.finish_reason == "length"


@pytest.mark.parametrize(("field", "value"), [("dtype", "bfloat16"), ("block_size", 8)])
async def test_engines_that_differ_do_not_exchange_kv(start, field, value):
    prefill, decode = start(Role.PREFILL), start(Role.DECODE, **{field: value})
    handle = (await prefill.ask("hello", kv=PLEASE)).last.kv_transfer_params
    with pytest.raises(ChiasmError, match=r"block|dtype|model|fingerprint"):
        await Pair(prefill, decode).go_on(handle, "hello")


async def test_a_lease_that_ran_out_gives_its_blocks_back(start):
    prefill, decode = start(Role.PREFILL, kv={"lease_seconds": 0.2}), start(Role.DECODE)
    handle = (await prefill.ask("hello", kv=PLEASE)).last.kv_transfer_params
    assert not prefill.is_empty()
    await until(prefill.is_empty)
    assert prefill.engine.stats().kv.leases_expired == 1
    with pytest.raises(KVUnavailableError):
        await Pair(prefill, decode).go_on(handle, "hello")


async def test_a_request_cancelled_at_decode_gives_its_blocks_back_on_both_sides(pair):
    parts = ("word " * 90,)
    for outputs_before in (0, 1, 3):
        handle = (await pair.prefill.ask(*parts, kv=PLEASE, max_tokens=100)).last.kv_transfer_params
        sent = msgspec.structs.replace(handle, num_sent=1)
        outputs = pair.decode.engine.generate(pair.decode.request(*parts, kv=sent, max_tokens=100))
        if outputs_before == 0:
            task = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for _ in range(outputs_before):
            await anext(outputs)
        await outputs.aclose()
        await until(pair.is_empty)


async def test_prefill_leaves_no_decoding_to_do(pair):
    await pair.prefill.ask("hello", kv=PLEASE)
    assert pair.prefill.engine.stats().generation_tokens == 1


async def test_params_belong_to_prefill_and_decode(start, pair):
    with pytest.raises(InvalidRequestError):
        await start(Role.AGGREGATED).ask("hello", kv=PLEASE)
    with pytest.raises(InvalidRequestError):
        await pair.prefill.ask("hello")
