"""Processes that die at the worst time."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from chiasm.wire import Role
from tests.integration.conftest import chat, sample_image


@pytest.fixture(autouse=True)
def right_answer(request, fragile, aggregated):
    """After each fault, the next request is right."""
    yield
    body = chat("after", sample_image(1000), "?")
    # Each test has seen to it that the proxy knows of the death; what is healthy now was started again.
    fragile.wait_until(lambda: all(instance["state"] == "healthy" for instance in fragile.health()), 90)
    assert fragile.answer(body) == aggregated.answer(body)


def encoders(service):
    return [instance for instance in service.health() if instance["role"] == "encoder"]


def test_an_encoder_killed_mid_request_costs_a_retry_on_another(fragile, aggregated):
    body = chat("see", sample_image(1), "?")
    pids = {url: fragile.pid(url) for url in fragile.deployment.urls(Role.ENCODER)}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fragile.answer, body)
        fragile.wait_until(lambda: any(encoder["in_flight"] for encoder in encoders(fragile)))
        (busy,) = [encoder["url"] for encoder in encoders(fragile) if encoder["in_flight"]]
        os.kill(pids.pop(busy), signal.SIGKILL)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        assert answer.result(60) == aggregated.answer(body)


def test_with_no_encoder_left_images_get_503_and_text_is_answered(fragile):
    for url in fragile.deployment.urls(Role.ENCODER):
        os.kill(fragile.pid(url), signal.SIGKILL)
    response = fragile.post(chat("see", sample_image(2), "?"))
    assert response.status_code == 503, response.text
    assert "encoder" in response.json()["error"]["message"]
    assert fragile.answer(chat("only words"))


def test_a_pd_killed_mid_stream_ends_the_stream_with_an_error(fragile):
    (url,) = fragile.deployment.urls(Role.PD)
    body = chat("tell me everything", stream=True, max_tokens=400)
    events: list[str] = []
    with httpx.stream("POST", f"{fragile.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not events:
                os.kill(fragile.pid(url), signal.SIGKILL)
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in events
    fragile.wait_until(lambda: any(instance["state"] != "healthy" for instance in fragile.health()))
