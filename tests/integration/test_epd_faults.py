"""Prefill and decode instances that die, or are lost to an answer, at the worst time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.wire import Role
from tests.fleet import no_forks
from tests.integration.conftest import (
    MODEL,
    Service,
    chat,
    kill_the_busy,
    sample_image,
    stopped,
    streamed,
    struck,
    texts_of,
)

LONG = 400


@pytest.fixture(autouse=True)
def well_again(epd_pairs: Service, aggregated: Service) -> Iterator[None]:
    """After each fault, every instance is back, the next answer is right, and no block is held for a request that ended."""
    yield
    epd_pairs.wait_until_recovered()
    body = chat("after", sample_image(1000), "?")
    assert epd_pairs.answer(body) == aggregated.answer(body)
    epd_pairs.wait_until_blocks_are_free()


def the_busy(service: Service, role: Role) -> str:
    """URL of the instance that the one call goes to. The instances stand still, so that the call can't end meanwhile."""
    (url,) = service.wait_until(lambda: service.busy(role))
    return url


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
    events = struck(epd_pairs, aggregated, body, lambda: with_decode_killed(epd_pairs, body))
    assert texts_of(events) == texts_of(streamed(aggregated, body))


def with_decode_killed(service: Service, body: dict[str, Any]) -> list[str]:
    return streamed(service, body, at_event=20, act=lambda: kill_the_busy(service, Role.DECODE))


def test_a_decode_instance_stopped_mid_stream_costs_a_pause(epd_pairs: Service, aggregated: Service) -> None:
    body = chat("tell me everything about", sample_image(8), max_tokens=LONG, stream=True)

    def with_decode_stopped() -> list[str]:
        with ExitStack() as stack:

            def stop_the_busy() -> None:
                pids = stack.enter_context(stopped(epd_pairs, Role.DECODE))
                for other in pids.keys() - set(epd_pairs.busy(Role.DECODE)):
                    os.kill(pids[other], signal.SIGCONT)

            return streamed(epd_pairs, body, at_event=20, act=stop_the_busy)

    events = struck(epd_pairs, aggregated, body, with_decode_stopped)
    assert texts_of(events) == texts_of(streamed(aggregated, body))


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
    prefills = {
        url: epd_pairs.metric_at(url, "chiasm_generation_tokens_total")
        for url in epd_pairs.deployment.urls(Role.PREFILL)
    }

    def used() -> list[str]:
        return [
            url
            for url, tokens in prefills.items()
            if epd_pairs.metric_at(url, "chiasm_generation_tokens_total") > tokens
        ]

    with ThreadPoolExecutor(1) as pool, stopped(epd_pairs, Role.DECODE) as decodes:
        events = pool.submit(streamed, epd_pairs, body)
        epd_pairs.wait_until(lambda: epd_pairs.busy(Role.DECODE))
        (url,) = epd_pairs.wait_until(used)
        epd_pairs.kill(url)
        for pid in decodes.values():
            os.kill(pid, signal.SIGCONT)
        assert texts_of(events.result(60)) == texts_of(streamed(aggregated, body))


def test_several_choices_that_have_begun_end_with_an_error(epd_pairs: Service, aggregated: Service) -> None:
    """Whose tokens the client has nobody knows, so they cannot go on elsewhere."""
    body = chat("tell me everything", n=2, max_tokens=LONG, stream=True)
    events = struck(epd_pairs, aggregated, body, lambda: with_decode_killed(epd_pairs, body))
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
            epd_pairs.wait_until(lambda: epd_pairs.busy(Role.DECODE))
        epd_pairs.wait_until(lambda: not epd_pairs.busy(Role.DECODE))
    epd_pairs.wait_until_blocks_are_free()


def test_with_no_decode_instance_left_there_is_a_clear_error(epd_pairs: Service) -> None:
    def are_lost() -> bool:
        return not any(one["state"] == "healthy" for one in epd_pairs.health() if one["role"] == Role.DECODE)

    with no_forks():
        for url in epd_pairs.deployment.urls(Role.DECODE):
            epd_pairs.kill(url)
        epd_pairs.wait_until(are_lost)
        response = epd_pairs.post(chat("see", sample_image(7), "?"))
    assert response.status_code == 503, response.text
    assert "decode" in response.json()["error"]["message"]


def test_a_handle_of_kv_that_is_gone_is_told_as_such(epd_pairs: Service) -> None:
    """Whoever drives P and D by hand gets 503 with a type of its own, and both stay well."""
    prefill, decode = epd_pairs.deployment.urls(Role.PREFILL)[0], epd_pairs.deployment.urls(Role.DECODE)[0]
    body = {"model": MODEL, "prompt": "once upon", "max_tokens": 4}

    def post(url: str, params: dict[str, Any]) -> httpx.Response:
        called = body | {"kv_transfer_params": params}
        return httpx.post(f"{url}/v1/completions", json=called, auth=epd_pairs.signed, timeout=60)

    for wrong in ({"remote_request_id": "no-such"}, {"remote_engine_id": "other"}, {"remote_port": 1}):
        handle = post(prefill, {"do_remote_decode": True}).json()["kv_transfer_params"]
        reply = post(decode, handle | wrong)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "kv_unavailable_error"), wrong
        reply = post(decode, handle)
        assert reply.status_code == 200, reply.text
