"""Images in vLLM's APIs of responses and messages: encoder and PD apart answer what one vLLM instance answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chiasm.wire import COUNT_TOKENS_PATH, IMAGE_PATHS, MESSAGES_PATH, RESPONSES_PATH

from .fleet import front, images, record_of, spans_of, wait_until_encoders_rest
from .processes import CALL_SECONDS, CLIENT, MODEL, Server
from .wire import Body, image_bytes

QUESTION = "what shape is it?"


def block(data: bytes) -> Body:
    """Return an image of the API of messages."""
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def part(data: bytes, **more: Any) -> Body:
    """Return an image of the API of responses."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "input_image", "image_url": url, **more}


def messages(*some: Body, **more: Any) -> Body:
    return {"model": MODEL, "messages": list(some), "temperature": 0, "max_tokens": 12} | more


def responses(*some: Body, **more: Any) -> Body:
    return {"model": MODEL, "input": list(some), "temperature": 0, "max_output_tokens": 12} | more


def user(*content: str | Body, kind: str) -> Body:
    return {
        "role": "user",
        "content": [{"type": kind, "text": one} if isinstance(one, str) else one for one in content],
    }


def bodies(first_seed: int) -> list[tuple[str, Body]]:
    """Return requests to both APIs, about one to three images each."""
    one, two, three, four, *_ = images(first_seed)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "done"}, block(three)]}
    use = {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "t", "name": "draw", "input": {"image_url": "x"}}],
    }
    call = {"type": "function_call", "call_id": "t", "name": "draw", "arguments": '{"image_url": "x"}'}
    output = {"type": "function_call_output", "call_id": "t", "output": [part(three, detail="auto")]}
    return [
        (MESSAGES_PATH, messages(user(block(one), QUESTION, kind="text"))),
        (
            MESSAGES_PATH,
            messages(user("first", block(two), "then", block(one), QUESTION, kind="text"), system="be brief"),
        ),
        (MESSAGES_PATH, messages(user(QUESTION, kind="text"), use, user(result, block(four), kind="text"))),
        (RESPONSES_PATH, responses(user(part(one), QUESTION, kind="input_text"))),
        (RESPONSES_PATH, responses(user(part(four, detail="high"), part(two), QUESTION, kind="input_text"))),
        (RESPONSES_PATH, responses(user(QUESTION, kind="input_text"), call, output, instructions="be brief")),
    ]


def post(server: Server, path: str, body: Body) -> Any:
    answered = CLIENT.post(server.url + path, json=body, timeout=CALL_SECONDS)
    assert answered.status_code == 200, answered.text
    return answered.json()


def ask(server: Server, path: str, body: Body) -> Any:
    """Return what an answer says and counts, without what is random or depends on caches."""
    answer = post(server, path, body)
    usage = answer["usage"]
    if path == RESPONSES_PATH:
        said = [content["text"] for item in answer["output"] for content in item["content"]]
        return said, answer["status"], usage["input_tokens"], usage["output_tokens"]
    return answer["content"], answer["stop_reason"], usage["output_tokens"], usage["input_tokens"]


def ask_for_stream(server: Server, path: str, body: Body) -> str:
    """Return the text of a stream."""
    with CLIENT.stream("POST", server.url + path, json=body | {"stream": True}, timeout=CALL_SECONDS) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    assert events[-1]["type"] in ("message_stop", "response.completed", "response.incomplete"), events[-1]
    deltas = [event.get("delta", "") for event in events if event["type"].endswith("delta")]
    return "".join(one if isinstance(one, str) else one.get("text", "") for one in deltas)


def ask_all(server: Server, some: list[tuple[str, Body]], how: Callable[..., Any] = ask) -> list[Any]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda one: how(server, *one), some))


@dataclass
class Fleet:
    encoder: Server
    pd: Server
    aggregated: Server
    split: Server
    """A proxy for the encoder and the PD."""
    whole: Server
    """A proxy for the aggregated instance."""
    split_twice: Server
    """A proxy for the encoder, a prefill and a decode instance."""
    prefill: Server


@pytest.fixture(scope="module")
def fleet(
    encoder: Server, pd: Server, aggregated: Server, prefill_decode: tuple[Server, Server], logs: Path
) -> Iterator[Fleet]:
    prefill, decode = prefill_decode
    with ExitStack() as stack:

        def keep(name: str, **instances: list[Server]) -> Server:
            server = front(logs, f"image-apis-{name}", **instances)
            stack.callback(server.stop)
            return server

        split = keep("split", encoder=[encoder], pd=[pd])
        whole = keep("whole", aggregated=[aggregated])
        split_twice = keep("twice", encoder=[encoder], prefill=[prefill], decode=[decode])
        for server in (split, whole, split_twice):
            server.wait_ready()
        yield Fleet(encoder, pd, aggregated, split, whole, split_twice, prefill)


def test_the_instances_say_that_they_take_names(fleet: Fleet) -> None:
    assert fleet.pd.health().image_paths == fleet.aggregated.health().image_paths == list(IMAGE_PATHS)


def test_answers_are_those_of_one_instance(fleet: Fleet) -> None:
    some = bodies(9000)
    saved = fleet.encoder.count("saves")
    assert ask_all(fleet.split, some) == ask_all(fleet.aggregated, some)
    fleet.encoder.until(lambda: fleet.encoder.count("saves") == saved + 4)
    assert fleet.pd.count("failed_requests") == 0


def test_streams_say_the_same(fleet: Fleet) -> None:
    some = bodies(9100)
    expected = ask_all(fleet.aggregated, some, ask_for_stream)
    assert all(expected)
    assert ask_all(fleet.split, some, ask_for_stream) == expected


def test_prefill_answers_alone(fleet: Fleet) -> None:
    some = bodies(9200)
    assert ask_all(fleet.split_twice, some) == ask_all(fleet.aggregated, some)


@pytest.mark.parametrize("stream", [False, True])
def test_records_have_the_stages_of_all_instances(fleet: Fleet, stream: bool) -> None:
    language = {"prepare", "queue", "prefill", "decode"}
    for path, body in bodies(9500 + 10 * stream):
        record = record_of(fleet.split, body | {"stream": stream}, path)
        spans = spans_of(record)
        assert spans[fleet.pd.url] >= language, path
        assert "call" not in spans[fleet.pd.url]
        assert record["covered"] >= 0.98
        check_first_token(record)
        apart = spans_of(record_of(fleet.split_twice, body | {"stream": stream}, path))
        assert apart[fleet.prefill.url] >= language, path


def test_an_image_that_an_encoder_has_just_encoded_has_its_stages_too(fleet: Fleet) -> None:
    for path, body in (bodies(9530)[0], bodies(9540)[3]):  # other images, since a PD that has one waits for no encoder
        record = record_of(fleet.split, body, path)
        encoding = spans_of(record)[fleet.encoder.url]
        # Its answer may come after that of the PD, which has the embedding from it before.
        assert encoding >= {"preprocess", "encode"} or encoding == {"open call"}, path
        assert {"await encoder", *encoding} <= {span["name"] for span in record["spans"] if span.get("item") == 0}


@pytest.mark.parametrize("stream", [False, True])
def test_records_of_text_have_the_stages_of_the_instance(fleet: Fleet, stream: bool) -> None:
    some = [
        (MESSAGES_PATH, messages(user(QUESTION, kind="text"))),
        (RESPONSES_PATH, responses(user(QUESTION, kind="input_text"))),
    ]
    for path, body in some:
        record = record_of(fleet.split, body | {"stream": stream}, path)
        assert spans_of(record)[fleet.pd.url] == {"prepare", "queue", "prefill", "decode"}, path
        assert record["covered"] >= 0.98
        check_first_token(record)


def test_a_batch_of_chats_has_the_stages_of_the_one_that_answers_first(fleet: Fleet) -> None:
    chats = [[{"role": "user", "content": text}] for text in (QUESTION, "who are you?")]
    body = {"model": MODEL, "messages": chats, "temperature": 0, "max_tokens": 4}
    record = record_of(fleet.split, body, "/v1/chat/completions/batch")
    assert spans_of(record)[fleet.pd.url] == {"prepare", "queue", "prefill", "decode"}
    assert record["covered"] >= 0.98


def check_first_token(record: Any) -> None:
    """Check that the first token came when the prompt was computed, and that decoding began with it."""
    first = record["first_token_seconds"]
    prefilled = max(span["end"] for span in record["spans"] if span["name"] == "prefill")
    (decode,) = [span for span in record["spans"] if span["name"] == "decode"]
    assert prefilled <= first + 1e-6
    assert decode["start"] == pytest.approx(first)


def test_tokens_are_counted_without_an_encoder(fleet: Fleet) -> None:
    wait_until_encoders_rest(fleet.split, fleet.split_twice)
    saved = fleet.encoder.count("saves")
    for path, body in bodies(9300):
        if path == MESSAGES_PATH:
            counted = {"model": MODEL, "messages": body["messages"]}
            assert post(fleet.split, COUNT_TOKENS_PATH, counted) == post(fleet.aggregated, COUNT_TOKENS_PATH, counted)
    assert fleet.encoder.count("saves") == saved


def test_tenants_share_no_embedding(fleet: Fleet) -> None:
    wait_until_encoders_rest(fleet.split, fleet.split_twice)
    data = image_bytes(9400)
    content = user(block(data), QUESTION, kind="text"), user(part(data), QUESTION, kind="input_text")
    plain, saved = [messages(content[0]), responses(content[1])], fleet.encoder.count("saves")
    expected = [
        ask(fleet.aggregated, path, body) for path, body in zip((MESSAGES_PATH, RESPONSES_PATH), plain, strict=True)
    ]
    for number, salt in enumerate(("a", "b"), 1):
        salted = [(MESSAGES_PATH, plain[0] | {"cache_salt": salt}), (RESPONSES_PATH, plain[1] | {"cache_salt": salt})]
        assert ask_all(fleet.split, salted) == expected
        assert ask_all(fleet.whole, salted) == expected
        fleet.encoder.until(partial(_has_saved, fleet.encoder, saved + number))


def test_a_client_cannot_write_a_stand_in(fleet: Fleet) -> None:
    named = {"type": "input_image", "image_url": f"chiasm-image:{'0' * 32}-0"}
    body = responses(user(named, QUESTION, kind="input_text"))
    refused = CLIENT.post(fleet.split.url + RESPONSES_PATH, json=body, timeout=CALL_SECONDS)
    assert refused.status_code == 400, refused.text
    refused = CLIENT.post(fleet.pd.url + RESPONSES_PATH, json=body, timeout=CALL_SECONDS)
    assert (refused.status_code, "send the whole conversation" in refused.text) == (400, True)


def _has_saved(encoder: Server, count: float) -> bool:
    return encoder.count("saves") == count
