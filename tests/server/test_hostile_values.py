"""Whatever value a client puts into a field, the answer is an answer or an error that names the field, never a failure."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.mutations import mutations
from tests.server.conftest import Served, ServedEncoder
from tests.server.images import image_part, png
from tests.server.serving import Reply, post

SAMPLING: dict[str, Any] = {
    "model": "bytes",
    "max_tokens": 3,
    "min_tokens": 1,
    "n": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"65": 1},
    "stop": ["x"],
    "stop_token_ids": [3],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "cache_salt": "salt",
}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\ud800"}'}}
CHAT: dict[str, Any] = SAMPLING | {
    "messages": [
        {"role": "system", "content": "be brief", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "x", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ],
    "max_completion_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {"a": {"b": 1}},
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}, "strict": True}},
}
COMPLETION: dict[str, Any] = SAMPLING | {
    "prompt": ["a", "b"],
    "logprobs": 2,
    "structured_outputs": {"json": {"type": "object", "properties": {"a": {"minimum": 1, "maxLength": 3}}}},
}
HANDLE: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e",
    "remote_block_ids": [1],
    "remote_host": "h",
    "remote_port": 1,
    "remote_request_id": "r",
    "tp_size": 1,
    "continues": True,
    "num_tokens": 1,
    "digest": "d",
    "output_token_ids": [65],
    "output_logprobs": [[-0.5, [[1, -0.5]], 65]],
    "num_sent": 0,
    "seed": 1,
    "created": 1,
    "cached_tokens": 0,
}


def check(url: str, request: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        replies = [(body, names, post(url, body)) for body, names in mutations(request)]
    wrong = [(body[:400], reply.body[:400]) for body, names, reply in replies if not is_fine(reply, names)]
    assert not wrong, f"{len(wrong)} of {len(replies)}: {wrong[:10]}"
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def is_fine(reply: Reply, names: tuple[str, ...]) -> bool:
    """Whether it is an answer, or an error in OpenAI's form that names the field, or the place of bad JSON."""
    if reply.status == 200:
        return True
    error = reply.error
    said = f"{error['message']} {error['param']}"
    return (
        reply.status in {400, 404}
        and set(error) == {"message", "type", "param", "code"}
        and len(error["message"]) < 1000
        and (any(name in said for name in names) or (error["code"] == "invalid_json" and ", near " in said))
    )


def test_a_chat(pd: Served, caplog: pytest.LogCaptureFixture) -> None:
    check(pd.chat, CHAT, caplog)


def test_a_completion(pd: Served, caplog: pytest.LogCaptureFixture) -> None:
    check(pd.completions, COMPLETION, caplog)


def test_a_chat_with_embeddings(pd: Served, caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "image_embeds", "image_embeds": {"image_size": [28, 56]}, "uuid": "a" * 64}
    check(pd.chat, {"messages": [{"role": "user", "content": [part]}]}, caplog)


def test_images_for_an_encoder(encoder: ServedEncoder, caplog: pytest.LogCaptureFixture) -> None:
    part = image_part(png(), uuid="a" * 64)
    check(encoder.chat, {"messages": [{"role": "user", "content": [part]}], "stream": False}, caplog)


def test_a_handle_for_decode(decode: Served, caplog: pytest.LogCaptureFixture) -> None:
    request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True}
    check(decode.chat, request | {"top_logprobs": 1, "kv_transfer_params": HANDLE}, caplog)


def test_what_prefill_is_asked(prefill: Served, caplog: pytest.LogCaptureFixture) -> None:
    asked = HANDLE | {"do_remote_prefill": False, "do_remote_decode": True}
    check(prefill.chat, {"messages": [{"role": "user", "content": "hi"}], "kv_transfer_params": asked}, caplog)


@pytest.mark.parametrize(
    "value", ["9" * 400, "9" * 5000, "9e400", "nan", "inf", "-0.0", "1.5", "true", "", "0x10", "١"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_deadline_that_is_no_number_is_refused(pd: Served, path: str, value: str) -> None:
    headers = {"X-Request-Deadline-Ms": value.encode().decode("latin-1")}
    reply = post(pd.url + path, {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}, headers)
    assert reply.status == 400
    assert "X-Request-Deadline-Ms" in reply.error["message"]
