"""Answers that call tools.

The demo checkpoint knows nothing of tools. So whatever is right in its calls is the grammar's doing.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from chiasm.engine.request import GenerateRequest, Output
from chiasm.models.tool_format import HERMES
from tests.server.conftest import Demo, Served
from tests.server.images import image_part, png
from tests.server.serving import post
from tests.server.test_prefill_decode import HANDLE
from tests.server.test_structured_output import DRAW, HI, SCHEMA, TOOLS, Shape, json_schema


def _called(answer: ChatCompletion) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls or []]  # type: ignore[union-attr]


def test_a_named_tool_is_called_once(demo: Demo) -> None:
    answer = demo.client.chat.completions.create(model="demo", messages=HI, tools=TOOLS, tool_choice=DRAW)
    ((name, arguments),) = _called(answer)
    assert name == "draw"
    Shape.model_validate_json(arguments)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    assert re.fullmatch(r"call_\w{24}", choice.message.tool_calls[0].id)


def test_required_calls_some_tool(demo: Demo) -> None:
    choice = demo.choice(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("draw", "clear")
    assert choice["finish_reason"] == "tool_calls"


def test_allowed_tools_leave_the_others_out(demo: Demo) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}}
    choice = demo.choice(tools=TOOLS, tool_choice=allowed, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["clear"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {}


def test_a_stream_has_the_name_first_and_then_pieces_of_the_arguments(demo: Demo) -> None:
    stream = demo.client.chat.completions.create(model="demo", messages=HI, tools=TOOLS, tool_choice=DRAW, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert calls[0].id
    assert calls[0].type == "function"
    assert calls[0].function
    assert calls[0].function.name == "draw"
    assert all(call.index == 0 and not call.id and call.function and not call.function.name for call in calls[1:])
    assert len(calls) > 2
    Shape.model_validate_json("".join(call.function.arguments or "" for call in calls if call.function))
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)


def test_auto_may_answer_in_text(demo: Demo) -> None:
    choice = demo.choice(tools=TOOLS, tool_choice="auto", max_tokens=10)
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]


def test_auto_with_a_schema_gives_the_schema_or_calls(demo: Demo) -> None:
    choice = demo.choice(tools=TOOLS, response_format=json_schema(SCHEMA))
    if "tool_calls" not in choice["message"]:
        Shape.model_validate_json(choice["message"]["content"])


def test_none_calls_nothing_and_keeps_tools_from_the_model(demo: Demo) -> None:
    plain, none = (demo.post(**fields).json for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}))
    assert none["choices"] == plain["choices"]
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_a_conversation_with_calls_and_results_goes_on(demo: Demo) -> None:
    answer = demo.client.chat.completions.create(model="demo", messages=HI, tools=TOOLS, tool_choice=DRAW)
    call = answer.choices[0].message
    assert call.tool_calls
    image = [image_part(png(64, 64, "red")), {"type": "text", "text": "and this?"}]
    messages = [
        *HI,
        call.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": [{"type": "text", "text": "done"}]},
        {"role": "user", "content": image},
    ]
    assert demo.choice(messages=messages, tools=TOOLS, tool_choice=DRAW)["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_says_so(demo: Demo) -> None:
    choice = demo.choice(tools=TOOLS, tool_choice=DRAW, max_tokens=45)
    assert choice["finish_reason"] == "length"


def test_calls_with_choices_and_log_probabilities(demo: Demo) -> None:
    body = {"tools": TOOLS, "tool_choice": DRAW, "n": 2, "logprobs": True, "temperature": 1.0, "seed": 4}
    for choice in demo.post(**body).json["choices"]:
        Shape.model_validate_json(choice["message"]["tool_calls"][0]["function"]["arguments"])
        assert choice["logprobs"]["content"]
    events = demo.post(**body, stream=True).events[:-1]
    told = [entry for event in events if (one := event["choices"][0]["logprobs"]) for entry in one["content"]]
    assert len(told) > 40


# ---- text, then a call ---------------------------------------------------------------------------------------------------

WRITTEN = HERMES.opening("draw") + '{"colour": "red", "count": 1, "corners": []}' + HERMES.closing


def _next(pd: Served, text: str) -> str:
    """What may follow a text, as letters; the processor of the fake engine makes a token of every byte."""
    (request,) = pd.engine.requests
    assert request.sampling.grammar is not None
    tokenizer = pd.engine.processor.tokenizer
    allowed = request.sampling.grammar.matcher().allowed(tokenizer.encode(text).ids).tokens
    return "".join(sorted(tokenizer.decode([token]) for token in allowed.nonzero().flatten().tolist() if token < 256))


@pytest.mark.parametrize("several", [True, False])
def test_in_auto_mode_text_is_free_until_it_begins_a_call(pd: Served, several: bool) -> None:
    assert post(pd.chat, {"messages": HI, "tools": TOOLS, "parallel_tool_calls": several}).status == 200
    assert len(_next(pd, "I draw. <tool_cal")) > 100
    assert _next(pd, "I draw. <tool_call>") == "\n"
    assert _next(pd, "I draw. <tool_call>\n{") == '"'
    assert _next(pd, 'I draw. <tool_call>\n{"name": "') == "cd"
    assert _next(pd, HERMES.opening("draw") + '{"colour": "') == "bgr"
    assert _next(pd, WRITTEN) == ("\n" if several else "")


@pytest.mark.parametrize("choice", ["required", DRAW])
def test_a_call_that_is_required_comes_first(pd: Served, choice: Any) -> None:
    assert post(pd.chat, {"messages": HI, "tools": TOOLS, "tool_choice": choice}).status == 200
    assert _next(pd, "") == "<"
    assert _next(pd, '<tool_call>\n{"name": "') == ("cd" if choice == "required" else "d")


def test_the_prompt_has_the_tools(pd: Served) -> None:
    post(pd.chat, {"messages": HI, "tools": TOOLS})
    assert pd.engine.processor.rendered[-1][1]["tools"] == TOOLS


def test_text_before_a_call_is_the_content(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        for letter in "I draw.\n" + WRITTEN:
            yield pd.engine.output(request, letter)
        yield pd.engine.output(request, "", finish_reason="stop")

    pd.engine.script = script
    choice = post(pd.chat, {"messages": HI, "tools": TOOLS}).json["choices"][0]
    assert choice["message"]["content"] == "I draw."
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "draw"
    assert choice["finish_reason"] == "tool_calls"
    events = post(pd.chat, {"messages": HI, "tools": TOOLS, "stream": True}).events[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I draw."
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert json.loads("".join(pieces))["colour"] == "red"


@pytest.mark.parametrize(
    ("text", "reason"),
    [(WRITTEN.partition("red")[0], "stop"), (WRITTEN.removesuffix(HERMES.closing), "tool_calls")],
    ids=["within its arguments", "behind its arguments"],
)
def test_an_answer_ends_with_its_calls_only_if_no_stop_string_cuts_off_the_last(
    pd: Served, text: str, reason: str
) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, text, finish_reason="stop")

    pd.engine.script = script
    choice = post(pd.chat, {"messages": HI, "tools": TOOLS}).json["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "draw"
    assert choice["finish_reason"] == reason
    events = post(pd.chat, {"messages": HI, "tools": TOOLS, "stream": True}).events[:-1]
    assert events[-1]["choices"][0]["finish_reason"] == reason


def test_what_looks_like_a_call_in_a_structured_answer_is_text(pd: Served) -> None:
    answer = json.dumps({"how": WRITTEN})

    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        for letter in answer:
            yield pd.engine.output(request, letter)
        yield pd.engine.output(request, "", finish_reason="stop")

    pd.engine.script = script
    body = {"messages": HI, "tools": TOOLS, "response_format": {"type": "json_object"}}
    choice = post(pd.chat, body).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
    events = post(pd.chat, body | {"stream": True}).events[:-1]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == answer


def test_what_looks_like_a_call_is_text_without_tools(pd: Served) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield pd.engine.output(request, WRITTEN, finish_reason="stop")

    pd.engine.script = script
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = post(pd.chat, {"messages": HI, **fields}).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (WRITTEN, "stop")


def test_decode_goes_on_where_prefill_stopped_in_the_middle_of_a_call(decode: Served) -> None:
    sent = WRITTEN[: len(HERMES.opening("draw")) + 5]
    handle = HANDLE | {"output_token_ids": decode.engine.processor.tokenizer.encode(sent).ids, "num_sent": len(sent)}

    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield replace(decode.engine.output(request, sent), already_sent=True)
        yield decode.engine.output(request, WRITTEN[len(sent) :], finish_reason="stop")

    decode.engine.script = script
    body = {"messages": HI, "tools": TOOLS, "stream": True, "kv_transfer_params": handle}
    events = post(decode.chat, body).events[:-1]
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert not any("id" in call for call in calls)
    arguments = WRITTEN.removeprefix(HERMES.opening("draw")).removesuffix(HERMES.closing)
    assert "".join(call["function"]["arguments"] for call in calls) == arguments[5:]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_what_a_token_adds_to_a_stream_is_one_event(decode: Served) -> None:
    """A stream may break off behind any event, and goes on elsewhere behind the last token that was announced."""
    handle = HANDLE | {"output_token_ids": decode.engine.processor.tokenizer.encode("<").ids, "num_sent": 1}

    async def script(request: GenerateRequest) -> AsyncIterator[Output]:
        yield replace(decode.engine.output(request, "<"), already_sent=True)
        for letter in WRITTEN[1:]:
            yield decode.engine.output(request, letter)
        yield decode.engine.output(request, "", finish_reason="stop")

    decode.engine.script = script
    body = {"messages": HI, "tools": TOOLS, "stream": True, "kv_transfer_params": handle | {"continues": True}}
    events = post(decode.chat, body).body.decode().split("\n\n")
    pieces = [event for event in events if '"finish_reason":null' in event]
    assert pieces
    assert all(event.startswith(": tokens ") for event in pieces)
