"""Prefill and decode instances that die, or are lost to an answer, at the worst time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.wire import Role
from tests.integration.conftest import MODEL, Service, chat, said, sample_image, stopped

LONG = 400


@pytest.fixture(autouse=True)
def well_again(epd_pairs: Service, aggregated: Service) -> Iterator[None]:
    """After each fault, every instance is back, the next answer is right, and no block is held for a request that ended."""
    yield
    epd_pairs.wait_until_recovered()
    body = chat("after", sample_image(1000), "?")
    assert epd_pairs.answer(body) == aggregated.answer(body)
    epd_pairs.wait_until_blocks_are_free()


def busy(service: Service, role: Role) -> list[str]:
    """URLs of the instances of a role that a call is under way to."""
    return [instance["url"] for instance in service.health() if instance["role"] == role and instance["in_flight"]]


def resumed(service: Service) -> float:
    return service.proxy_metric("chiasm_proxy_resumed_streams_total")


def text_of(events: list[str]) -> str:
    """Of a stream that ended well."""
    *data, done = events
    assert done == "[DONE]", events[-1]
    choices = [choice for event in data for choice in json.loads(event)["choices"]]
    return "".join(said(choice["delta"]) for choice in choices)


def streamed(
    service: Service, body: dict[str, Any], *, at_event: int = 0, act: Callable[[], None] = lambda: None
) -> list[str]:
    """The data of a stream's events; ``act`` is called when that many have come."""
    events: list[str] = []
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == at_event:
                    act()
    return events


def the_busy(service: Service, role: Role) -> str:
    """URL of the instance that the one call goes to. The instances stand still, so that the call can't end meanwhile."""
    service.wait_until(lambda: bool(busy(service, role)))
    (url,) = busy(service, role)
    return url


def kill_the_busy(service: Service, role: Role) -> None:
    with stopped(service, role):
        service.kill(the_busy(service, role))


CALL = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {"properties": {"x": {"type": "string", "minLength": 280}}, "required": ["x"]},
            },
        }
    ],
    "tool_choice": "required",
}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, CALL], ids=["greedy", "sampled", "a call"])
def test_a_decode_instance_killed_mid_stream_costs_a_pause(
    epd_pairs: Service, aggregated: Service, options: dict[str, Any]
) -> None:
    body = chat("tell me everything about", sample_image(1), max_tokens=LONG, stream=True) | options
    before = resumed(epd_pairs)
    events = streamed(epd_pairs, body, at_event=20, act=lambda: kill_the_busy(epd_pairs, Role.DECODE))
    assert text_of(events) == text_of(streamed(aggregated, body))
    assert resumed(epd_pairs) == before + 1


def test_a_decode_instance_stopped_mid_stream_costs_a_pause(epd_pairs: Service, aggregated: Service) -> None:
    body = chat("tell me everything about", sample_image(8), max_tokens=LONG, stream=True)
    with ExitStack() as stack:

        def stop_the_busy() -> None:
            pids = stack.enter_context(stopped(epd_pairs, Role.DECODE))
            url = the_busy(epd_pairs, Role.DECODE)
            for other in pids.keys() - {url}:
                os.kill(pids[other], signal.SIGCONT)

        events = streamed(epd_pairs, body, at_event=20, act=stop_the_busy)
        assert text_of(events) == text_of(streamed(aggregated, body))


def test_the_same_of_an_answer_that_is_no_stream(epd_pairs: Service, aggregated: Service) -> None:
    body = chat("tell me everything about", sample_image(2), max_tokens=LONG)
    with ThreadPoolExecutor(1) as pool:
        with stopped(epd_pairs, Role.DECODE):
            answer = pool.submit(epd_pairs.answer, body)
            epd_pairs.kill(the_busy(epd_pairs, Role.DECODE))
        assert answer.result(60) == aggregated.answer(body)


def test_a_prefill_instance_killed_over_a_prompt_costs_a_retry_on_another(
    epd_pairs: Service, aggregated: Service
) -> None:
    body = chat("see", sample_image(3), "?")
    with ThreadPoolExecutor(1) as pool:
        with stopped(epd_pairs, Role.PREFILL):
            answer = pool.submit(epd_pairs.answer, body)
            epd_pairs.kill(the_busy(epd_pairs, Role.PREFILL))
        assert answer.result(60) == aggregated.answer(body)


def test_a_prefill_instance_killed_before_decode_has_fetched_costs_another_prefill(
    epd_pairs: Service, aggregated: Service
) -> None:
    body = chat("see", sample_image(4), "?", stream=True, max_tokens=16)
    prefills = {url: epd_pairs.metric_at(url, "chiasm_generation_tokens_total") for url in urls(epd_pairs)}
    with ThreadPoolExecutor(1) as pool, stopped(epd_pairs, Role.DECODE):
        events = pool.submit(streamed, epd_pairs, body)
        epd_pairs.wait_until(lambda: bool(busy(epd_pairs, Role.DECODE)))
        (used,) = [
            url
            for url, tokens in prefills.items()
            if epd_pairs.metric_at(url, "chiasm_generation_tokens_total") > tokens
        ]
        epd_pairs.kill(used)
        for url in epd_pairs.deployment.urls(Role.DECODE):
            os.kill(epd_pairs.pid(url), signal.SIGCONT)
        assert text_of(events.result(60)) == text_of(streamed(aggregated, body))


def urls(service: Service) -> list[str]:
    return list(service.deployment.urls(Role.PREFILL))


def test_several_choices_that_have_begun_end_with_an_error(epd_pairs: Service) -> None:
    """Whose tokens the client has nobody knows, so they cannot go on elsewhere."""
    body = chat("tell me everything", n=2, max_tokens=LONG, stream=True)
    events = streamed(epd_pairs, body, at_event=20, act=lambda: kill_the_busy(epd_pairs, Role.DECODE))
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in events


def test_a_client_that_leaves_frees_both_sides(epd_pairs: Service) -> None:
    body = chat("tell me everything about", sample_image(5), max_tokens=LONG, stream=True)
    with httpx.stream("POST", f"{epd_pairs.url}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    epd_pairs.wait_until(lambda: not any(instance["in_flight"] for instance in epd_pairs.health()))
    epd_pairs.wait_until_blocks_are_free()


def test_a_client_that_leaves_while_decode_stands_still_frees_both_sides(epd_pairs: Service) -> None:
    body = chat("tell me everything about", sample_image(6), max_tokens=LONG, stream=True)
    with stopped(epd_pairs, Role.DECODE):
        with httpx.stream("POST", f"{epd_pairs.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # which, dropped, would close the response
            next(lines)
            epd_pairs.wait_until(lambda: bool(busy(epd_pairs, Role.DECODE)))
        epd_pairs.wait_until(lambda: not busy(epd_pairs, Role.DECODE))
    epd_pairs.wait_until_blocks_are_free()


def test_with_no_decode_instance_left_there_is_a_clear_error(epd_pairs: Service) -> None:
    for url in epd_pairs.deployment.urls(Role.DECODE):
        epd_pairs.kill(url)
    epd_pairs.wait_until(
        lambda: (
            not any(
                instance["state"] == "healthy" for instance in epd_pairs.health() if instance["role"] == Role.DECODE
            )
        )
    )
    response = epd_pairs.post(chat("see", sample_image(7), "?"))
    assert response.status_code == 503, response.text
    assert "decode" in response.json()["error"]["message"]


def test_a_handle_of_kv_that_is_gone_is_told_as_such(epd_pairs: Service) -> None:
    """Whoever drives P and D by hand gets 503 with a type of its own, and both stay well."""
    prefill, decode = epd_pairs.deployment.urls(Role.PREFILL)[0], epd_pairs.deployment.urls(Role.DECODE)[0]
    body = {"model": MODEL, "prompt": "once upon", "max_tokens": 4}
    first = httpx.post(
        f"{prefill}/v1/completions",
        json=body | {"kv_transfer_params": {"do_remote_decode": True}},
        auth=epd_pairs.signed,
    )
    handle = first.json()["kv_transfer_params"]
    for wrong in ({"remote_request_id": "no-such"}, {"remote_engine_id": "other"}, {"remote_port": 1}):
        reply = httpx.post(
            f"{decode}/v1/completions",
            json=body | {"kv_transfer_params": handle | wrong},
            auth=epd_pairs.signed,
            timeout=60,
        )
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "kv_unavailable_error"), wrong
    reply = httpx.post(
        f"{decode}/v1/completions", json=body | {"kv_transfer_params": handle}, auth=epd_pairs.signed, timeout=60
    )
    assert reply.status_code == 200, reply.text
