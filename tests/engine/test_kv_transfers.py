"""Prefill and decode in separate engines give the answers of one engine."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from chiasm.errors import ChiasmError, InvalidRequestError, KVUnavailableError
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.wire import KVTransferParams, Role
from tests.engine.conftest import A, Answer, B, Encoder, ImageFile, Instance, Parts, Start, until

PLEASE = KVTransferParams(do_remote_decode=True, continues=True)

MESSAGES: dict[str, Parts] = {
    "text": ("what is this?",),
    "one image": ("what is", A, "this?"),
    "two images": (A, "and", B, "?"),
    "the same image twice": (A, "and", A, "?"),
    "a long text": ("word " * 90,),
}

SAMPLING: dict[str, dict[str, Any]] = {
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

    async def begin(self, *parts: str | ImageFile, **options: Any) -> KVTransferParams:
        """Have the prompt prefilled, and return the handle."""
        return (await self.prefill.ask(*parts, kv=PLEASE, **options)).handle

    async def ask(self, *parts: str | ImageFile, **options: Any) -> Answer:
        """Return what a client would get for a stream, for which the proxy asks both in turn."""
        first = await self.prefill.ask(*parts, kv=PLEASE, **options)
        if first.last.kv_transfer_params is None:
            return first
        return joined(first, await self.go_on(first.handle, *parts, **options))

    async def go_on(self, handle: KVTransferParams, *parts: str | ImageFile, **options: Any) -> Answer:
        sent = msgspec.structs.replace(over_the_wire(handle), num_sent=len(handle.output_token_ids))
        return await self.decode.ask(*parts, kv=sent, **options)

    def is_empty(self) -> bool:
        return self.prefill.is_empty() and self.decode.is_empty()


def over_the_wire(handle: KVTransferParams) -> KVTransferParams:
    return msgspec.json.decode(msgspec.json.encode(handle), type=KVTransferParams)


def resumed(given: list[int], **fields: Any) -> KVTransferParams:
    """Return what a prefill instance is sent to continue an answer of which the client has these tokens."""
    return msgspec.structs.replace(PLEASE, output_token_ids=given, num_sent=len(given), **fields)


def joined(first: Answer, rest: Answer) -> Answer:
    new = [output for output in rest.outputs if not output.already_sent]
    outputs = [*first.outputs, *new]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    return Answer(token_ids, "".join(output.text for output in outputs), outputs)


@pytest.fixture
def pair(start: Start) -> Pair:
    return Pair(start(Role.PREFILL), start(Role.DECODE))


@pytest.mark.parametrize("parts", MESSAGES.values(), ids=MESSAGES.keys())
async def test_separate_prefill_and_decode_give_the_same_answer_as_one_engine(
    start: Start, encoder: Encoder, pair: Pair, parts: Parts
) -> None:
    expected = await start(Role.AGGREGATED).ask(*parts)
    await encoder.encode(*[part for part in parts if not isinstance(part, str)])
    answer = await pair.ask(*parts)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.last.finish_reason == expected.last.finish_reason
    await until(pair.is_empty)


@pytest.mark.parametrize("key", [None, FleetKey([make_fleet_key()])], ids=["without a key", "with a fleet key"])
async def test_the_answer_is_the_same_over_tcp(start: Start, encoder: Encoder, key: FleetKey | None) -> None:
    kv = {"connector": "TcpConnector", "fleet_key": key}
    pair = Pair(start(Role.PREFILL, kv=kv), start(Role.DECODE, kv=kv))
    expected = await start(Role.AGGREGATED).ask("what is", A, "this?")
    await encoder.encode(A)
    assert (await pair.ask("what is", A, "this?")).token_ids == expected.token_ids
    await until(pair.is_empty)


async def test_a_decode_instance_with_another_fleet_key_gets_no_kv(start: Start, encoder: Encoder) -> None:
    pair = Pair(*(start(role, kv={"fleet_key": FleetKey([make_fleet_key()])}) for role in (Role.PREFILL, Role.DECODE)))
    await encoder.encode(A)
    with pytest.raises(KVUnavailableError, match="no proof of the fleet key"):
        await pair.ask("what is", A, "this?")


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
async def test_decode_continues_sampling_as_one_engine_does(
    start: Start, encoder: Encoder, pair: Pair, options: dict[str, Any]
) -> None:
    expected = await start(Role.AGGREGATED).ask("what is", A, "this?", **options)
    await encoder.encode(A)
    answer = await pair.ask("what is", A, "this?", **options)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    if "logprobs" in options:
        assert [token.token_id for token in answer.logprobs] == expected.token_ids
        wanted = [token.logprob for token in expected.logprobs]
        assert [token.logprob for token in answer.logprobs] == pytest.approx(wanted, abs=1e-4)


async def test_without_a_seed_decode_continues_with_the_one_that_prefill_drew(pair: Pair) -> None:
    first = await pair.prefill.ask("hello", kv=PLEASE, temperature=1.0)
    rest = await pair.go_on(first.handle, "hello", temperature=1.0)
    again = await pair.prefill.ask("hello", temperature=1.0, kv=PLEASE, seed=first.handle.seed)
    repeated = await pair.go_on(again.handle, "hello", temperature=1.0)
    assert joined(again, repeated).token_ids == joined(first, rest).token_ids


async def test_a_stop_string_across_the_handover_ends_the_answer_where_one_engine_would(
    start: Start, pair: Pair
) -> None:
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


async def test_an_answer_of_one_token_ends_at_prefill(pair: Pair) -> None:
    answer = await pair.prefill.ask("hello", kv=PLEASE, max_tokens=1)
    assert answer.last.finish_reason == "length"
    assert answer.last.kv_transfer_params is None
    assert pair.prefill.is_empty()


async def test_a_sender_that_speaks_vllms_protocol_always_gets_a_handle_and_the_whole_answer_from_decode(
    start: Start, pair: Pair
) -> None:
    expected = await start(Role.AGGREGATED).ask("hello", logprobs=0)
    first = await pair.prefill.ask("hello", kv=KVTransferParams(do_remote_decode=True), max_tokens=1, logprobs=0)
    answer = await pair.decode.ask("hello", kv=over_the_wire(first.handle), logprobs=0)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert [token.token_id for token in answer.logprobs] == answer.token_ids
    await until(pair.is_empty)


async def test_a_handle_whose_token_ends_the_answer_ends_it_at_decode(start: Start, pair: Pair) -> None:
    expected = await start(Role.AGGREGATED).ask("hello", max_tokens=1)
    first = await pair.prefill.ask("hello", kv=KVTransferParams(do_remote_decode=True), max_tokens=1)
    answer = await pair.decode.ask("hello", kv=first.handle, max_tokens=1)
    assert answer.token_ids == expected.token_ids
    assert answer.last.finish_reason == "length"
    await until(pair.is_empty)


async def test_several_choices_are_all_sampled_at_decode(start: Start, encoder: Encoder, pair: Pair) -> None:
    options: dict[str, Any] = {"choices": 3, "temperature": 1.0, "seed": 9}
    expected = await start(Role.AGGREGATED).choices("what is", A, **options)
    await encoder.encode(A)
    first = await pair.prefill.ask("what is", A, kv=KVTransferParams(do_remote_decode=True), temperature=1.0, seed=9)
    handle = msgspec.structs.replace(first.handle, output_token_ids=[])
    answers = await pair.decode.choices("what is", A, kv=handle, **options)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    await until(pair.is_empty)


async def test_an_answer_cut_off_at_any_token_continues_on_other_engines(
    start: Start, encoder: Encoder, pair: Pair
) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.9, "seed": 4}
    expected = await start(Role.AGGREGATED).ask(A, "?", **options)
    await encoder.encode(A)
    for sent in (1, 4, 9):
        given = expected.token_ids[:sent]
        first = await pair.prefill.ask(A, "?", kv=resumed(given, seed=4), **options)
        ended = first.last.kv_transfer_params is None
        rest = first if ended else joined(first, await pair.go_on(first.handle, A, "?", **options))
        before = sum(len(output.text) for output in first.outputs if output.already_sent)
        assert rest.token_ids == expected.token_ids
        assert rest.text == expected.text
        assert rest.text[:before] == expected.text[:before]
    await until(pair.is_empty)


async def test_blocks_in_decodes_prefix_cache_are_not_transferred(pair: Pair) -> None:
    parts = ("word " * 60,)
    await pair.ask(*parts)
    before = pair.decode.kv_stats().transferred_bytes
    again = await pair.ask(*parts)
    assert pair.decode.kv_stats().transferred_bytes - before <= pair.decode.bytes_per_block
    assert again.token_ids == (await pair.ask(*parts)).token_ids


async def test_many_requests_at_once_get_the_same_answers_as_from_one_engine(
    start: Start, encoder: Encoder, pair: Pair
) -> None:
    aggregated = start(Role.AGGREGATED)
    await encoder.encode(A, B)
    messages = [(f"number {n}", A if n % 2 else B, "?") for n in range(12)]
    expected = [(await aggregated.ask(*parts)).token_ids for parts in messages]
    answers = await asyncio.gather(*[pair.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    await until(pair.is_empty)


async def test_a_full_decode_engine_makes_requests_wait(start: Start) -> None:
    prefill = start(Role.PREFILL)
    pair = Pair(prefill, start(Role.DECODE, kv_cache_bytes=prefill.bytes_per_block * 5, max_model_len=80))
    messages = [(f"number {n}",) for n in range(8)]
    expected = [(await start(Role.AGGREGATED).ask(*parts)).token_ids for parts in messages]
    answers = await asyncio.gather(*[pair.ask(*parts) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    await until(pair.is_empty)


def short_of_blocks(start: Start, *parts: str | ImageFile, tokens: int) -> Pair:
    """Return engines of which decode has room for one answer of so many tokens, and for another prompt."""
    prefill = start(Role.PREFILL, block_size=4)
    length = len(prefill.prompt(*parts).token_ids)
    num_blocks = 2 * -(-length // 4) + tokens // 4 + 1
    limits = {"kv_cache_bytes": prefill.bytes_per_block * num_blocks, "max_model_len": length + tokens + 4}
    return Pair(prefill, start(Role.DECODE, block_size=4, **limits))


async def test_answers_about_images_for_which_decode_is_short_of_blocks_all_end(start: Start, encoder: Encoder) -> None:
    """However late the second comes, both can't be finished at the same time."""
    pair = short_of_blocks(start, A, "number 1", tokens=100)
    await encoder.encode(A)
    messages = [(A, f"number {n}") for n in (1, 2)]
    expected = [(await start(Role.AGGREGATED).ask(*parts, max_tokens=100)).token_ids for parts in messages]
    answers = await asyncio.gather(*[pair.ask(*parts, max_tokens=100) for parts in messages])
    assert [answer.token_ids for answer in answers] == expected
    assert pair.decode.engine.stats().preemptions > 0
    await until(pair.is_empty)


async def test_choices_about_an_image_for_which_decode_is_short_of_blocks_all_end(
    start: Start, encoder: Encoder
) -> None:
    options: dict[str, Any] = {"choices": 4, "temperature": 1.0, "seed": 9, "max_tokens": 100}
    pair = short_of_blocks(start, "what is", A, tokens=100)
    await encoder.encode(A)
    expected = await start(Role.AGGREGATED).choices("what is", A, **options)
    first = await pair.prefill.ask("what is", A, kv=KVTransferParams(do_remote_decode=True), temperature=1.0, seed=9)
    handle = msgspec.structs.replace(first.handle, output_token_ids=[])
    answers = await pair.decode.choices("what is", A, kv=handle, **options)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert pair.decode.engine.stats().preemptions > 0
    await until(pair.is_empty)


async def test_a_handle_of_another_prompt_is_refused(pair: Pair) -> None:
    handle = await pair.begin("number 1")
    with pytest.raises(InvalidRequestError, match="another prompt"):
        await pair.go_on(handle, "number 2")
    with pytest.raises(InvalidRequestError, match="tokens"):
        await pair.go_on(handle, "number 1 and more")


async def test_a_handle_of_another_salt_is_refused(pair: Pair) -> None:
    handle = await pair.begin("number 1", salt="a")
    with pytest.raises(InvalidRequestError, match="another prompt"):
        await pair.go_on(handle, "number 1", salt="b")


async def test_a_handle_can_be_used_once(pair: Pair) -> None:
    handle = await pair.begin("hello")
    await pair.go_on(handle, "hello")
    with pytest.raises(KVUnavailableError):
        await pair.go_on(handle, "hello")
    assert (await pair.ask("hello")).last.finish_reason == "length"
    await until(pair.is_empty)


async def test_a_handle_of_a_stopped_engine_is_refused_and_the_next_request_is_answered(
    start: Start, pair: Pair
) -> None:
    other = start(Role.PREFILL)
    handle = (await other.ask("hello", kv=PLEASE)).handle
    other.engine.stop()
    with pytest.raises(KVUnavailableError):
        await pair.go_on(handle, "hello")
    assert (await pair.ask("hello")).last.finish_reason == "length"


@pytest.mark.parametrize(("field", "value"), [("dtype", "bfloat16"), ("block_size", 8)])
async def test_engines_that_differ_do_not_exchange_kv(start: Start, field: str, value: Any) -> None:
    pair = Pair(start(Role.PREFILL), start(Role.DECODE, **{field: value}))
    handle = await pair.begin("hello")
    with pytest.raises(ChiasmError, match=r"block|dtype|model|fingerprint"):
        await pair.go_on(handle, "hello")


async def test_an_expired_lease_frees_its_blocks(start: Start) -> None:
    pair = Pair(start(Role.PREFILL, kv={"lease_seconds": 3.0}), start(Role.DECODE))
    handle = await pair.begin("hello")
    assert not pair.prefill.is_empty()
    await until(pair.prefill.is_empty)
    assert pair.prefill.kv_stats().leases_expired == 1
    with pytest.raises(KVUnavailableError):
        await pair.go_on(handle, "hello")


async def test_cancelling_a_request_at_decode_frees_its_blocks_on_both_sides(pair: Pair) -> None:
    parts = ("word " * 90,)
    for outputs_before in (0, 1, 3):
        handle = await pair.begin(*parts, max_tokens=100)
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


async def test_prefill_samples_one_token_and_stops(pair: Pair) -> None:
    await pair.prefill.ask("hello", kv=PLEASE)
    assert pair.prefill.engine.stats().generation_tokens == 1


async def test_the_engine_asserts_what_the_server_has_checked(pair: Pair) -> None:
    with pytest.raises(AssertionError):
        await pair.prefill.ask("hello")
    with pytest.raises(AssertionError):
        await pair.decode.ask("hello")
    for given in ([10**6], [1] * 10**6):
        with pytest.raises(AssertionError):
            await pair.prefill.ask("hello", kv=resumed(given))
    with pytest.raises(AssertionError):
        await pair.prefill.ask("hello", choices=2, kv=resumed([1]))


async def test_kv_that_nobody_will_fetch_is_free_when_it_is_given_back(pair: Pair) -> None:
    leased = msgspec.structs.replace(PLEASE, lease="mine")
    handle = (await pair.prefill.ask("hello", kv=leased)).handle
    assert handle.lease == ""
    other = (await pair.prefill.ask("hello", kv=msgspec.structs.replace(PLEASE, lease="other"))).handle
    assert not pair.prefill.is_empty()
    pair.prefill.engine.give_back_kv(["mine", "unknown"])
    with pytest.raises(KVUnavailableError, match="lease has ended"):
        await pair.go_on(handle, "hello")
    await pair.go_on(other, "hello")
    await until(pair.is_empty)


async def test_kv_that_was_given_back_before_it_was_left_is_not_held(pair: Pair) -> None:
    pair.prefill.engine.give_back_kv(["early"])
    await pair.prefill.ask("hello", kv=msgspec.structs.replace(PLEASE, lease="early"))
    await until(pair.prefill.is_empty)
