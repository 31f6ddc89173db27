"""Chat completions: fields, answers, streams."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from chiasm.engine.request import GenerateRequest, Output
from chiasm.errors import EmbeddingUnavailableError, OverloadedError
from tests.server.conftest import Served
from tests.server.serving import get, parse_timing, post

HI: list[Any] = [{"role": "user", "content": "Hi"}]


def test_answers_a_chat(pd: Served) -> None:
    answer = pd.client.chat.completions.create(model="bytes", messages=HI)
    assert answer.object == "chat.completion"
    assert answer.model == "bytes"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"


def test_usage_counts_prompt_answer_and_cached_tokens(pd: Served) -> None:
    usage = pd.client.chat.completions.create(model="bytes", messages=HI, n=2).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 10, 12)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_n_gives_that_many_choices(pd: Served) -> None:
    answer = pd.client.chat.completions.create(model="bytes", messages=HI, n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "Hello") for i in range(3)]


def test_stream_has_role_then_text_then_finish_then_usage_then_done(pd: Served) -> None:
    reply = post(pd.chat, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-2]] == list("Hello")
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_openai_client_reads_a_stream_of_several_choices(pd: Served) -> None:
    texts = ["", ""]
    for chunk in pd.client.chat.completions.create(model="bytes", messages=HI, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello", "Hello"]


def test_stream_without_usage_has_no_usage_field(pd: Served) -> None:
    assert all("usage" not in chunk for chunk in post(pd.chat, {"messages": HI, "stream": True}).events[:-1])


def test_continuous_usage_counts_up(pd: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = post(pd.chat, {"messages": HI, "stream": True, "stream_options": options}).events[1:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5, 5]


def test_text_with_characters_that_json_escapes_arrives_unchanged(pd: Served) -> None:
    text = 'a "quoted"\nline\t\\ é 漢 🙂 \x07'

    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, text, finish_reason="stop")

    pd.engine.script = script
    stream = pd.client.chat.completions.create(model="bytes", messages=HI, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_outputs_without_text_send_nothing(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, "")
        yield pd.engine.output(request, "ab")
        yield pd.engine.output(request, "", finish_reason="length")

    pd.engine.script = script
    chunks = post(pd.chat, {"messages": HI, "stream": True}).events
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "ab"},
        {},
    ]


def test_stop_reason_names_the_stop_string(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, "a", finish_reason="stop", stop_reason="###")

    pd.engine.script = script
    assert post(pd.chat, {"messages": HI}).json["choices"][0]["stop_reason"] == "###"
    assert post(pd.chat, {"messages": HI, "stream": True}).events[-2]["choices"][0]["stop_reason"] == "###"


def test_logprobs_have_the_tokens_bytes_and_alternatives(pd: Served) -> None:
    answer = pd.client.chat.completions.create(model="bytes", messages=HI, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list("Hello")
    assert logprobs.content[0].bytes == [72]
    assert [candidate.logprob for candidate in logprobs.content[0].top_logprobs] == [-0.5, -1.5]


def test_streamed_logprobs_are_those_of_the_chunk(pd: Served) -> None:
    stream = pd.client.chat.completions.create(model="bytes", messages=HI, logprobs=True, stream=True)
    tokens = [
        entry.token
        for chunk in stream
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert tokens == list("Hello")


def test_sampling_fields_reach_the_engine(pd: Served) -> None:
    fields = {
        "max_completion_tokens": 9,
        "max_tokens": 100,
        "min_tokens": 2,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 42,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -10},
        "stop": ["x", "yz"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert post(pd.chat, {"messages": HI, **fields}).status == 200
    sampling = pd.engine.requests[0].sampling
    assert sampling.max_tokens == 9
    assert sampling.stop == ("x", "yz")
    assert sampling.stop_token_ids == (9,)
    assert sampling.logit_bias == {5: -10}
    same = set(fields) - {"max_completion_tokens", "max_tokens", "stop", "stop_token_ids", "logit_bias"}
    assert {name: getattr(sampling, name) for name in same} == {name: fields[name] for name in same}


def test_sampling_fields_that_are_left_out_come_from_the_checkpoint(pd: Served) -> None:
    post(pd.chat, {"messages": HI, "top_k": None})
    assert pd.engine.requests[0].sampling.temperature == 0.5
    assert pd.engine.requests[0].sampling.top_k == 7


def test_a_chat_may_fill_the_context_unless_told_otherwise(pd: Served) -> None:
    post(pd.chat, {"messages": HI})
    post(pd.chat, {"messages": HI, "max_tokens": 512})
    assert [request.sampling.max_tokens for request in pd.engine.requests] == [510, 510]


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("input_text", '{"type": "text"'),
        ("output_text", '{"type": "text"'),
        ("refusal", '{"type": "text"'),
        ("input_image", '{"type": "image_url"'),
        ("input_audio", "Audio is not supported"),
        ("video_url", "Video is not supported"),
        ("file", "Files are not supported"),
        ("wonder", "text and image_url"),
    ],
)
def test_content_parts_of_other_types_are_refused_with_advice(pd: Served, kind: str, advice: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: "x"}]
    error = post(pd.chat, {"messages": [*HI, {"role": "user", "content": parts}]}).error
    assert f"messages[1].content[1] has the type {kind!r}" in error["message"]
    assert advice in error["message"]


def test_messages_reach_the_template(pd: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert post(pd.chat, body).status == 200
    rendered, options = pd.engine.processor.rendered[0]
    assert rendered[0] == {"role": "system", "content": "Be brief."}
    assert rendered[1]["content"] == messages[1]["content"]
    assert rendered[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert rendered[3]["tool_call_id"] == "1"
    assert options["template_kwargs"] == {"enable_thinking": False}
    assert options["add_generation_prompt"] is True


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_what_the_assistant_thought_reaches_the_template_under_both_names(pd: Served, name: str) -> None:
    messages = [
        *HI,
        {"role": "assistant", "content": "Yes.", name: "Is it?"},
        {"role": "user", "content": "sure?", name: "x"},
    ]
    assert post(pd.chat, {"messages": messages}).status == 200
    _, answer, question = pd.engine.processor.rendered[0][0]
    assert answer == {"role": "assistant", "content": "Yes.", "reasoning": "Is it?", "reasoning_content": "Is it?"}
    assert question == {"role": "user", "content": "sure?"}


def test_calls_of_earlier_turns_may_have_nulls(pd: Served) -> None:
    call = {"index": 0, "id": None, "type": None, "function": {"name": "f", "arguments": None}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    assert post(pd.chat, {"messages": messages}).status == 200
    function = {"name": "f", "arguments": {}}
    assert pd.engine.processor.rendered[0][0][1]["tool_calls"] == [{"id": "", "type": "function", "function": function}]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "high", "enable_thinking": False},
        ),
        ({"reasoning_effort": None}, {}),
    ],
)
def test_the_effort_of_reasoning_reaches_the_template(pd: Served, fields: dict[str, Any], told: dict[str, Any]) -> None:
    assert post(pd.chat, {"messages": HI, **fields}).status == 200
    assert pd.engine.processor.rendered[0][1]["template_kwargs"] == told


def test_final_message_can_be_continued(pd: Served) -> None:
    body: dict[str, Any] = {"messages": HI, "continue_final_message": True}
    assert post(pd.chat, body).status == 200
    assert pd.engine.processor.rendered[0][1]["continue_final_message"] is True
    assert pd.engine.processor.rendered[0][1]["add_generation_prompt"] is False
    assert post(pd.chat, {**body, "add_generation_prompt": True}).error["param"] == "continue_final_message"


def test_long_text_is_answered_too(pd: Served) -> None:
    pd.engine.max_model_len = 100_000
    try:
        usage = post(pd.chat, {"messages": [{"role": "user", "content": "x" * 50_000}]}).json["usage"]
    finally:
        pd.engine.max_model_len = 512
    assert usage["prompt_tokens"] == 50_000


def test_unknown_fields_are_ignored(pd: Served) -> None:
    body = {"messages": [{**HI[0], "mood": "good"}], "user": "me", "metadata": {"a": "b"}, "store": True, "zzz": [1]}
    assert post(pd.chat, body).status == 200


def test_unsupported_fields_without_effect_are_accepted(pd: Served) -> None:
    body: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "functions": None,
        "echo": False,
        "add_special_tokens": False,
        "best_of": 1,
        "length_penalty": 0,
        "suffix": "",
    }
    assert post(pd.chat, {"messages": HI, **body}).status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"use_beam_search": True},
        {"chat_template": "{{ x }}"},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 0},
        {"thinking_token_budget": 0},
        {"add_special_tokens": True},
    ],
)
def test_fields_that_would_change_the_answer_are_refused(pd: Served, fields: dict[str, Any]) -> None:
    reply = post(pd.chat, {"messages": HI, **fields})
    assert reply.status == 400
    assert reply.error["param"] in fields
    assert "not supported" in reply.error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 9}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"seed": 1 << 70}, "seed"),
        ({"cache_salt": "s" * 2000}, "cache_salt"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_fields_are_named(pd: Served, fields: dict[str, Any], param: str) -> None:
    reply = post(pd.chat, {"messages": HI, **fields})
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param
    assert pd.engine.requests == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nonsense", b'{"messages": "\xff"}', b"[" * 200_000, b'{"model":"b"}']
)
def test_a_malformed_request_is_refused(pd: Served, body: bytes) -> None:
    reply = post(pd.chat, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"tool_choice":' + b"[" * 200_000])
def test_a_body_that_is_not_json_has_a_code_of_its_own(pd: Served, body: bytes) -> None:
    assert post(pd.chat, body).error["code"] == "invalid_json"


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(pd: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        pd.client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "é" * 256}])
    assert caught.value.code == "context_length_exceeded"
    assert re.search(r"maximum context length is 512 tokens.* \d{3} tokens", str(caught.value))


def test_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(pd: Served) -> None:
    reply = post(pd.chat, {"messages": [{"role": "user", "content": "x" * 300_000}]})
    assert reply.error["code"] == "context_length_exceeded"
    assert "at least" in reply.error["message"]
    assert pd.engine.processor.rendered == []


def test_wrong_model_is_not_found(pd: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        pd.client.chat.completions.create(model="other", messages=HI)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_output_keeps_its_status(pd: Served, stream: bool) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        raise OverloadedError("the queue is full", retry_after_seconds=7)
        yield

    pd.engine.script = script
    reply = post(pd.chat, {"messages": HI, "stream": stream})
    assert reply.status == 503
    assert reply.headers["retry-after"] == "7"
    assert reply.error == {"message": "the queue is full", "type": "overloaded_error", "param": None, "code": None}


def test_error_after_the_first_output_ends_the_stream_with_an_event(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, "a")
        raise EmbeddingUnavailableError("it was lost")

    pd.engine.script = script
    before = stream_errors(pd)
    reply = post(pd.chat, {"messages": HI, "stream": True})
    assert reply.status == 200
    assert reply.events[-1]["error"]["message"] == "it was lost"
    assert "[DONE]" not in reply.events
    assert stream_errors(pd) == before + 1
    with pytest.raises(openai.APIError, match="it was lost"):
        list(pd.client.chat.completions.create(model="bytes", messages=HI, stream=True))
    counted = stream_errors(pd)
    assert post(pd.chat, {"messages": HI}).status == 503
    assert stream_errors(pd) == counted


def stream_errors(served: Served) -> float:
    lines = get(f"{served.url}/metrics").body.decode().splitlines()
    (value,) = [line.split(" ")[1] for line in lines if line.startswith("chiasm_stream_errors_total ")]
    return float(value)


def test_an_unexpected_error_is_a_500_without_details(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        raise RuntimeError("secret")
        yield

    pd.engine.script = script
    with pytest.raises(openai.InternalServerError) as caught:
        pd.client.chat.completions.create(model="bytes", messages=HI)
    assert "secret" not in str(caught.value)


def test_server_timing_says_where_the_time_went(pd: Served) -> None:
    timing = post(pd.chat, {"messages": HI}).timing
    assert timing["queue"] == 1
    assert timing["wait"] == 20
    assert timing["transfer"] == 3
    assert timing["prefill"] == 4
    assert timing["prefill_work"] == 3
    assert timing["ttft"] is not None
    assert timing["total"] is not None


def test_stream_ends_with_the_complete_server_timing(pd: Served) -> None:
    reply = post(pd.chat, {"messages": HI, "stream": True})
    assert "ttft" in reply.timing
    assert "total" not in reply.timing
    assert b"\n\n: server-timing " in reply.body
    assert "total" in parse_timing(reply.comments[0].removeprefix("server-timing "))
    usage = post(pd.chat, {"messages": HI}).json["usage"]
    assert f'prompt_tokens;desc="{usage["prompt_tokens"]}"' in reply.headers["server-timing"]
    assert f'completion_tokens;desc="{usage["completion_tokens"]}"' in reply.comments[0]
    assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")
