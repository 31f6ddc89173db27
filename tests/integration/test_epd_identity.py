"""What clients get with encoder, prefill and decode apart equals what one process answers, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
from safetensors.torch import load_file, save_file

from chiasm.wire import Role
from tests.integration.conftest import (
    MODEL,
    Service,
    calls_a_tool,
    chat,
    follows_a_schema,
    run,
    said,
    sample_image,
    second_round,
    various_chats,
)

A, B = sample_image(1), sample_image(2, height=64, width=160)
SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.9}


Token = tuple[str, Any, list[str]]
"""Text, log probability (compared with a tolerance), the likeliest candidates."""


class Told(NamedTuple):
    """What an answer says of one choice."""

    text: str
    finish_reason: str
    stop_reason: int | str | None
    tokens: list[Token]
    """With log probability and the likeliest candidates, where they were asked for."""


class Answer(NamedTuple):
    choices: list[Told]
    prompt_tokens: int
    completion_tokens: int


def completion(prompt: object, **options: Any) -> dict[str, Any]:
    """The body of a greedy text completion."""
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True} | options


REQUESTS = {
    "text": chat("hello there"),
    "one image": chat("what is", A, "this?"),
    "image first": chat(A),
    "two images": chat(A, "and", B, "?"),
    "two images swapped": chat(B, "and", A, "?"),
    "the same image twice": chat(A, "and", A, "?"),
    "seeded sampling": chat("tell me", A, **SAMPLED),
    "penalties": chat("tell me", B, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "log probabilities": chat("tell me", A, logprobs=True, top_logprobs=3),
    "log probabilities of samples": chat("tell me", A, logprobs=True, **SAMPLED),
    "one token": chat("tell me", A, max_tokens=1),
    "one token with its log probability": chat("tell me", A, max_tokens=1, logprobs=True),
    "two tokens": chat("tell me", A, max_tokens=2),
    "biased": chat("tell me", A, logit_bias={"7": 5, "9": -5}),
    "ends by itself, or not before three tokens": chat("tell me", B, ignore_eos=False, min_tokens=3, **SAMPLED),
    "three choices": chat("tell me", A, n=3, **SAMPLED),
    "three greedy choices of one token": chat("tell me", A, n=3, max_tokens=1),
    "choices with log probabilities": chat("tell me", A, n=2, logprobs=True, top_logprobs=2, **SAMPLED),
    "a longer answer": chat("tell me", A, max_tokens=70),
    "a schema": follows_a_schema("tell me", A, logprobs=True),
    "a schema and choices": follows_a_schema("tell me", A, n=2, **SAMPLED),
    "a call": calls_a_tool("tell me", A, logprobs=True),
    "calls in choices": calls_a_tool("tell me", A, n=2, **SAMPLED),
    "text or a call": calls_a_tool("tell me", A, tool_choice="auto", max_tokens=20),
    "completion": completion("once upon a time"),
    "completion of token ids": completion([5, 6, 7, 8]),
    "completion with log probabilities": completion("once upon a time", logprobs=2),
    "several prompts": completion(["once", "upon a time"]),
    "a pattern": completion("once", structured_outputs={"regex": "[a-z]{5,20}"}, max_tokens=40, ignore_eos=False),
    "several prompts, choices and log probabilities": completion(["once", "upon a time"], n=2, logprobs=1, **SAMPLED),
    "a prompt as long as some blocks": completion([5] * 32),
    "a prompt of one token": completion([5]),
}


def whole(service: Service, body: dict[str, Any]) -> Answer:
    """What a service answers in one piece."""
    response = service.post(body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert "kv_transfer_params" not in answer
    choices = [
        Told(
            said(choice["message"]) if "message" in choice else choice["text"],
            choice["finish_reason"],
            choice["stop_reason"],
            _tokens(choice["logprobs"]),
        )
        for choice in answer["choices"]
    ]
    return Answer(choices, answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])


def streamed(service: Service, body: dict[str, Any]) -> Answer:
    """The same of a stream, put together."""
    response = service.post(body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    assert ": tokens" not in response.text
    assert "kv_transfer_params" not in response.text
    *data, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    *chunks, last = map(json.loads, data)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    texts: dict[int, str] = {}
    tokens: dict[int, list[Token]] = {}
    ends: dict[int, tuple[str, int | str | None]] = {}
    roles: list[int] = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert index not in ends, "nothing comes after a choice's end"
        if "delta" in choice and "role" in choice["delta"]:
            assert index not in texts
            roles.append(index)
        texts[index] = texts.get(index, "") + (said(choice["delta"]) if "delta" in choice else choice["text"])
        tokens.setdefault(index, []).extend(_tokens(choice["logprobs"]))
        if choice["finish_reason"]:
            ends[index] = (choice["finish_reason"], choice["stop_reason"])
    if "messages" in body:
        assert sorted(roles) == sorted(texts)
    choices = [Told(texts[index], *ends[index], tokens[index]) for index in sorted(texts)]
    return Answer(choices, last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])


def _tokens(logprobs: dict[str, Any] | None) -> list[Token]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [
            (entry["token"], pytest.approx(entry["logprob"], abs=1e-3), [top["token"] for top in entry["top_logprobs"]])
            for entry in logprobs["content"]
        ]
    return [
        (token, pytest.approx(logprob, abs=1e-3), list(top))
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    ]


@pytest.fixture(autouse=True)
def nothing_stays_behind(epd: Service) -> Iterator[None]:
    """After each answer all blocks are free, of prefill and of decode."""
    yield
    epd.wait_until_blocks_are_free()


@pytest.mark.parametrize("body", REQUESTS.values(), ids=REQUESTS.keys())
def test_answers_equal_those_of_one_process(epd: Service, aggregated: Service, body: dict[str, Any]) -> None:
    expected = whole(aggregated, body)
    assert whole(epd, body) == expected
    assert streamed(epd, body) == expected


def test_text_offsets_of_a_stream_go_on_counting(epd: Service, aggregated: Service) -> None:
    body = completion("once upon a time", logprobs=0, stream=True)
    offsets = []
    for service in (epd, aggregated):
        data = [line[6:] for line in service.post(body).text.splitlines() if line.startswith("data: {")]
        logprobs = [json.loads(line)["choices"][0]["logprobs"] for line in data]
        offsets.append([offset for one in logprobs if one for offset in one["text_offset"]])
    assert offsets[0] == offsets[1]
    assert len(offsets[0]) == 8


def readable_beginning(service: Service) -> tuple[dict[str, Any], list[str]]:
    """A chat whose answer begins with tokens that are characters each, and these tokens."""
    for number in range(50):
        body = chat(f"story {number}", max_tokens=6, logprobs=True)
        tokens = [token for token, _, _ in whole(service, body).choices[0].tokens]
        if all(token and "\ufffd" not in token for token in tokens[:3]):
            return body, tokens
    raise AssertionError("no answer begins with whole characters")


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_ends_an_answer_wherever_it_begins(
    epd: Service, aggregated: Service, first: int, included: bool
) -> None:
    """In the token of prefill, in that and the first of decode, or in decode's alone."""
    body, tokens = readable_beginning(aggregated)
    stop = {0: tokens[0], 1: tokens[0][-1] + tokens[1], 2: tokens[1] + tokens[2]}[first]
    body |= {"stop": stop, "include_stop_str_in_output": included}
    expected = whole(aggregated, body)
    assert expected.choices[0].stop_reason == stop
    assert whole(epd, body) == expected
    assert streamed(epd, body) == expected


def test_a_beginning_that_looks_like_a_stop_string_is_shown_when_it_is_none(epd: Service, aggregated: Service) -> None:
    body, tokens = readable_beginning(aggregated)
    body |= {"stop": tokens[0] + "\u2603"}
    expected = whole(aggregated, body)
    assert expected.choices[0].text.startswith(tokens[0])
    assert whole(epd, body) == expected
    assert streamed(epd, body) == expected


def test_a_stop_token_that_comes_first_ends_the_answer_at_prefill(epd: Service, aggregated: Service) -> None:
    body = chat("tell me", max_tokens=8)
    prefill, decode = (epd.deployment.urls(role)[0] for role in (Role.PREFILL, Role.DECODE))
    handle = post(epd, prefill, body | {"kv_transfer_params": {"do_remote_decode": True}})["kv_transfer_params"]
    post(epd, decode, body | {"kv_transfer_params": handle})
    body |= {"stop_token_ids": handle["output_token_ids"]}
    expected = whole(aggregated, body)
    assert (expected.completion_tokens, expected.choices[0].finish_reason) == (1, "stop")
    before = epd.proxy_metric("chiasm_proxy_handovers_total")
    assert whole(epd, body) == expected
    assert streamed(epd, body) == expected
    assert epd.proxy_metric("chiasm_proxy_handovers_total") == before


def test_many_at_once_are_answered_as_one_by_one(epd: Service, aggregated: Service) -> None:
    bodies = various_chats()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: whole(epd, body), bodies))
    assert together == [whole(aggregated, body) for body in bodies]


def test_a_second_round_about_the_same_image(epd: Service, aggregated: Service) -> None:
    first = chat("look:", A)
    answer = aggregated.answer(first)
    second = second_round(first, answer)
    assert epd.answer(first) == answer
    assert whole(epd, second) == whole(aggregated, second)


def test_the_same_prompt_again_moves_only_what_decode_lacks(epd: Service) -> None:
    body = completion([9] * 100)
    moved = []
    for _ in range(2):
        before = epd.metric(Role.DECODE, "chiasm_kv_transferred_bytes_total")
        whole(epd, body)
        moved.append(epd.metric(Role.DECODE, "chiasm_kv_transferred_bytes_total") - before)
    assert 0 < moved[1] < moved[0] / 5


def test_cached_tokens_are_those_of_prefill(epd: Service) -> None:
    body = completion([11] * 100)
    cached = [epd.post(body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 96]


def test_prefill_prefills_and_decode_decodes(epd: Service) -> None:
    before = [epd.metric(role, "chiasm_generation_tokens_total") for role in (Role.PREFILL, Role.DECODE)]
    whole(epd, chat("tell me", A, max_tokens=9))
    after = [epd.metric(role, "chiasm_generation_tokens_total") for role in (Role.PREFILL, Role.DECODE)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 8]


def test_the_answer_says_where_its_time_went(epd: Service) -> None:
    timing = epd.post(chat("tell me", A)).headers["server-timing"]
    for name in ("encode", "prefill_call", "kv"):
        assert f"{name};dur=" in timing


# ---- by vLLM's messages, without the proxy --------------------------------------------------------------------------------


def by_hand(service: Service, body: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The messages of vLLM's proxies: to the encoder, to P, and what P says to D."""
    encoder, prefill, decode = (service.deployment.urls(role)[0] for role in (Role.ENCODER, Role.PREFILL, Role.DECODE))
    to_encoder = {"messages": [{"role": "user", "content": [data]}], "stream": False}
    published = post(service, encoder, to_encoder)["ec_transfer_params"]
    ((identifier, entry),) = published.items()
    part = {"type": "image_embeds", "image_embeds": entry["metadata"], "uuid": identifier}
    (message,) = body["messages"]
    content = [part if each == data else each for each in message["content"]]
    body = body | {"messages": [message | {"content": content}]}
    params = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    first = post(service, prefill, body | {"max_tokens": 1, "stream": False, "kv_transfer_params": params})
    assert first["choices"][0]["finish_reason"] == "length"
    return post(service, decode, body | {"kv_transfer_params": first["kv_transfer_params"]})


def post(service: Service, url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json=body, auth=service.signed, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("options", [{}, SAMPLED, {"max_tokens": 1}, {"n": 2, **SAMPLED}], ids=str)
def test_vllms_messages_are_understood(epd: Service, aggregated: Service, options: dict[str, Any]) -> None:
    body = chat("what is", A, "this?", **options)
    answer = by_hand(epd, body, A)
    expected = whole(aggregated, body)
    assert [choice["message"]["content"] for choice in answer["choices"]] == [one.text for one in expected.choices]
    assert answer["usage"]["completion_tokens"] == expected.completion_tokens


def test_decode_refuses_the_handle_of_another_prompt(epd: Service) -> None:
    prefill, decode = (epd.deployment.urls(role)[0] for role in (Role.PREFILL, Role.DECODE))
    params = {"do_remote_decode": True}
    first = post(epd, prefill, chat("one prompt", max_tokens=1) | {"kv_transfer_params": params})
    handle = first["kv_transfer_params"]
    reply = httpx.post(
        f"{decode}/v1/chat/completions",
        json=chat("two prompt") | {"kv_transfer_params": handle},
        auth=epd.signed,
        timeout=60,
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "kv_transfer_params"
    assert post(epd, decode, chat("one prompt") | {"kv_transfer_params": handle})["usage"]["completion_tokens"] == 8


# ---- what an instance holds ------------------------------------------------------------------------------------------------


def test_prefill_and_decode_need_no_vision_weights(checkpoint: Path, aggregated: Service, tmp_path: Path) -> None:
    """Any role that loads vision weights refuses a checkpoint that lacks them."""
    folder = tmp_path / MODEL
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            weights = {name: tensor for name, tensor in load_file(file).items() if "visual" not in name}
            save_file(weights, folder / file.name, {"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    for blind in run(folder, {Role.PREFILL: 1, Role.DECODE: 1}):
        assert whole(blind, REQUESTS["text"]) == whole(aggregated, REQUESTS["text"])
