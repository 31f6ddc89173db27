"""What clients get with the encoder apart equals what one process answers, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.wire import Role
from tests.integration.conftest import (
    Service,
    calls_a_tool,
    chat,
    encoded,
    follows_a_schema,
    part,
    pixels,
    sample_image,
    second_round,
    various_chats,
)

A, B = sample_image(1), sample_image(2, height=64, width=160)
REQUESTS = {
    "text": chat("hello there"),
    "one image": chat("what is", A, "this?"),
    "image first": chat(A),
    "two images": chat(A, "and", B, "?"),
    "two images swapped": chat(B, "and", A, "?"),
    "the same image twice": chat(A, "and", A, "?"),
    "four images": chat(A, B, sample_image(3), sample_image(4), "which is it?"),
    "seeded sampling": chat("tell me", A, temperature=1.0, seed=11, top_p=0.9),
    "penalties": chat("tell me", B, presence_penalty=1.0, repetition_penalty=1.2),
    "a schema": follows_a_schema("tell me", A, "and", B),
    "a call": calls_a_tool(A, "what is it?"),
}


@pytest.mark.parametrize("body", REQUESTS.values(), ids=REQUESTS.keys())
def test_answers_equal_those_of_one_process(disaggregated: Service, aggregated: Service, body: dict[str, Any]) -> None:
    assert disaggregated.answer(body) == aggregated.answer(body)


def test_swapped_images_give_another_answer(disaggregated: Service) -> None:
    assert disaggregated.answer(REQUESTS["two images"]) != disaggregated.answer(REQUESTS["two images swapped"])


def test_many_at_once_are_answered_as_one_by_one(disaggregated: Service, aggregated: Service) -> None:
    bodies = various_chats()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(disaggregated.answer, bodies))
    assert together == [aggregated.answer(body) for body in bodies]


def test_a_second_round_about_the_same_image(disaggregated: Service, aggregated: Service) -> None:
    first = chat("look:", A)
    answer = aggregated.answer(first)
    second = second_round(first, answer)
    assert disaggregated.answer(first) == answer
    assert disaggregated.answer(second) == aggregated.answer(second)


def test_streams_say_what_whole_answers_say(disaggregated: Service) -> None:
    body = REQUESTS["two images"]
    chunks = disaggregated.client.chat.completions.create(
        **{name: value for name, value in body.items() if name != "ignore_eos"},
        extra_body={"ignore_eos": True},
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == disaggregated.answer(body)


def test_an_image_is_encoded_once_whoever_asks(disaggregated: Service) -> None:
    body = chat("see", sample_image(77))
    before = disaggregated.encoded()
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(disaggregated.answer, [body] * 10))
    assert len(answers) == 1
    assert disaggregated.encoded_after(before) == before + 1


def test_text_touches_no_encoder(disaggregated: Service) -> None:
    disaggregated.wait_until_encoders_rest()
    before = disaggregated.metric(Role.ENCODER, "chiasm_http_requests_total")
    disaggregated.answer(chat("only words"))
    assert disaggregated.metric(Role.ENCODER, "chiasm_http_requests_total") == before


def test_one_image_in_two_files_is_two_items_with_one_answer(disaggregated: Service) -> None:
    image = pixels(5)
    answers = {disaggregated.answer(chat("see", part(encoded(image, compress_level=level)))) for level in (1, 9)}
    assert len(answers) == 1


def test_items_are_accounted_for_in_the_answer(disaggregated: Service) -> None:
    fresh = disaggregated.post(chat("see", sample_image(91), "?"))
    again = disaggregated.post(chat("see", sample_image(91), "?"))
    assert 'item0;desc="' in fresh.headers["server-timing"]
    assert 'item0;desc="hit"' in again.headers["server-timing"]


def record_of(service: Service, name: str) -> dict[str, Any]:
    """The record of a request, which may be kept a moment after its answer has ended; empty until then."""
    response = httpx.get(f"{service.url}/requests/{name}", timeout=60)
    return dict(response.json()) if response.status_code == 200 else {}


@pytest.mark.parametrize("stream", [True, False])
def test_the_record_of_a_request_covers_its_time_to_the_first_token(disaggregated: Service, stream: bool) -> None:
    of_images = {(name, item) for name in ("await encoder", "preprocess", "encode", "publish") for item in (0, 1)}
    for attempt in range(20):
        images = [sample_image(7100 + 4 * attempt + 2 * number + stream) for number in (0, 1)]
        body = chat("first", images[0], "second", images[1], stream=stream)
        name = f"record-{stream}-{attempt}"
        assert disaggregated.post(body, headers={"X-Request-Id": name}).status_code == 200
        record = disaggregated.wait_until(partial(record_of, disaggregated, name))
        stages = {(span["name"], span.get("item")) for span in record["spans"]}
        # On a busy machine, an encoder may say what it did when the answer has ended already, and the proxy may stand still
        # between two stages.
        if of_images <= stages and record["covered"] >= 0.98:
            break
    assert of_images <= stages
    assert record["covered"] >= 0.98
    assert {("prepare", None), ("prefill", None), ("decode", None)} <= stages
    usage = disaggregated.post(body | {"stream": False}).json()["usage"]
    assert record["tokens"] == {"prompt": usage["prompt_tokens"], "completion": usage["completion_tokens"]}
    assert {"queue", "prefill", "decode"} <= record["stages"].keys()
    path = record["critical_path"]
    assert path[0]["start"] == 0
    assert sum(span["end"] - span["start"] for span in path) == pytest.approx(record["first_token_seconds"], rel=0.05)
