"""Text completions: kinds of prompts, answers, streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from chiasm.engine.request import GenerateRequest, Output
from chiasm.engine.shares import largest_share
from chiasm.errors import InvalidRequestError, StorageError
from chiasm.server.sampling import MAX_ANSWER_ENTRIES, answer_tokens, check_answers
from chiasm.wire import TokenLogprob
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import never
from tests.server.serving import post


def test_continues_a_text(pd: Served) -> None:
    answer = pd.client.completions.create(model="bytes", prompt="Say it")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6


def test_an_answer_has_16_tokens_unless_told_otherwise(pd: Served) -> None:
    pd.client.completions.create(model="bytes", prompt="Say it")
    pd.client.completions.create(model="bytes", prompt="Say it", max_tokens=3)
    assert [request.sampling.max_tokens for request in pd.engine.requests] == [16, 3]


def test_several_prompts_give_their_choices_in_order(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        text = pd.engine.processor.tokenizer.decode(request.prompt.token_ids)
        for index in range(request.num_choices):
            yield pd.engine.output(request, f"{text}{index}", index=index, finish_reason="stop")

    pd.engine.script = script
    answer = pd.client.completions.create(model="bytes", prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 6


def test_one_failing_prompt_fails_the_request_and_aborts_the_others(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        if request.prompt.token_ids == [0]:
            raise StorageError("the disk is gone")
        async for output in never(request):
            yield output

    pd.engine.script = script
    reply = post(pd.completions, {"prompt": [[1], [0]]})
    assert reply.status == 503
    assert reply.error["message"] == "the disk is gone"
    ids = {request.request_id for request in pd.engine.requests}
    assert {pd.engine.aborted.get(timeout=60), pd.engine.aborted.get(timeout=60)} == ids


def test_token_ids_are_not_tokenized(pd: Served) -> None:
    post(pd.completions, {"prompt": [5, 6]})
    post(pd.completions, {"prompt": [[7], [8, 9]]})
    assert [request.prompt.token_ids for request in pd.engine.requests] == [[5, 6], [7], [8, 9]]


def test_the_tokenizer_adds_its_special_tokens_unless_told_otherwise(pd: Served) -> None:
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert post(pd.completions, {"prompt": "Say it", **fields}).status == 200
    assert pd.engine.processor.texts == [("Say it", True), ("Say it", True), ("Say it", False)]


def test_streams_text_and_usage(pd: Served) -> None:
    stream = pd.client.completions.create(
        model="bytes", prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6


def test_logprobs_are_parallel_lists(pd: Served) -> None:
    logprobs = pd.client.completions.create(model="bytes", prompt="x", logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("Hello")
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"H": -0.5, "!": -0.5}


def test_the_sampled_token_is_among_the_candidates_however_few_are_wanted(pd: Served) -> None:
    logprobs = post(pd.completions, {"prompt": "x", "logprobs": 0}).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{letter: -0.5} for letter in "Hello"]


def test_streamed_logprobs_count_characters_across_chunks(pd: Served) -> None:
    events = post(pd.completions, {"prompt": "x", "logprobs": 0, "stream": True}).events
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events[:-2]]
    assert offsets == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], ["a", 1], ["a", ""], [True], [1.5], [257], [-1], {"a": 1}, ["a"] * 5, "\x01"]
)
def test_a_malformed_prompt_is_refused(pd: Served, prompt: Any) -> None:
    reply = post(pd.completions, {"prompt": prompt})
    assert reply.status == 400
    assert reply.error["param"] == "prompt"
    assert pd.engine.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 3},
        {"prompt_logprobs": 0},
        {"max_tokens": 0},
        {"max_tokens": 513},
        {"logprobs": 21},
        {"n": 99},
    ],
)
def test_unsupported_values_are_refused(pd: Served, fields: dict[str, Any]) -> None:
    reply = post(pd.completions, {"prompt": "x", **fields})
    assert reply.status == 400
    assert reply.error["param"] in fields


def test_empty_prompt_is_refused(pd: Served) -> None:
    reply = post(pd.completions, {"prompt": ""})
    assert reply.status == 400
    assert "empty" in reply.error["message"]
    assert reply.error["param"] == "prompt"


def test_prompt_longer_than_the_context_is_refused(pd: Served) -> None:
    reply = post(pd.completions, {"prompt": [1] * 512})
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"
    assert reply.error["param"] == "prompt"


def test_an_encoder_generates_no_text(encoder: ServedEncoder) -> None:
    reply = post(encoder.completions, {"prompt": "x"})
    assert reply.status == 400
    assert "encoder" in reply.error["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_tokens_that_are_parts_of_characters_have_the_offset_of_their_character(pd: Served, streamed: bool) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, "a")
        whole = pd.engine.output(request, "🙂")
        for place, token_id in enumerate(whole.token_ids):
            text = "🙂" if place == 3 else ""
            yield replace(whole, token_ids=(token_id,), text=text, logprobs=(TokenLogprob(-0.5, (), token_id),))
        yield pd.engine.output(request, "b", finish_reason="stop")

    pd.engine.script = script
    reply = post(pd.completions, {"prompt": "x", "logprobs": 0, "stream": streamed})
    parts = [event["choices"][0] for event in (reply.events[:-1] if streamed else [reply.json])]
    offsets = [offset for part in parts if part["logprobs"] for offset in part["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 1, 1, 2]


def test_more_answers_than_a_request_may_ever_queue_are_refused() -> None:
    check_answers(128, largest_share(256))
    with pytest.raises(InvalidRequestError, match="129 answers"):
        check_answers(129, largest_share(256))


def test_the_prompts_of_a_request_share_its_places_and_are_due_together(pd: Served) -> None:
    assert post(pd.completions, {"prompt": ["a", "bc"], "n": 2, "max_tokens": 1}).status == 200
    assert len({request.part_of for request in pd.engine.requests}) == 1
    assert [(request.key, request.work_tokens) for request in pd.engine.requests] == [("", 3.0)] * 2


def test_an_answer_with_more_log_probabilities_than_one_may_hold_is_refused() -> None:
    answer_tokens(10, None, answers=2, candidates=20, context_tokens=4096)
    with pytest.raises(InvalidRequestError, match=str(MAX_ANSWER_ENTRIES)) as caught:
        answer_tokens(2000, None, answers=16, candidates=20, context_tokens=4096)
    assert caught.value.param == "max_tokens"


def test_an_answer_of_no_given_length_ends_where_it_would_hold_too_much() -> None:
    assert answer_tokens(None, 131_072, answers=16, candidates=20, context_tokens=131_072) == MAX_ANSWER_ENTRIES // 336
    assert answer_tokens(None, 131_072, answers=1, candidates=0, context_tokens=1 << 20) == 131_072
    assert answer_tokens(1 << 20, None, answers=1, candidates=0, context_tokens=1 << 20) == 1 << 20


def test_the_proxy_names_the_key_by_which_requests_take_turns(pd: Served) -> None:
    post(pd.completions, {"prompt": "a"}, {"X-Chiasm-Client": "k1", "Authorization": "Bearer unchecked"})
    assert pd.engine.requests[0].key == "k1"
