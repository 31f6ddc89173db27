"""Processes that die at the worst time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from chiasm.wire import Role
from tests.integration.conftest import Service, chat, kill_the_busy, sample_image, streamed, struck


@pytest.fixture(autouse=True)
def right_answer(fragile: Service, aggregated: Service) -> Iterator[None]:
    """After each fault, the next request is right."""
    yield
    fragile.wait_until_recovered()
    body = chat("after", sample_image(1000), "?")
    assert fragile.answer(body) == aggregated.answer(body)


def test_an_encoder_killed_mid_request_costs_a_retry_on_another(fragile: Service, aggregated: Service) -> None:
    body = chat("see", sample_image(1), "?")
    pids = {url: fragile.pid(url) for url in fragile.deployment.urls(Role.ENCODER)}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fragile.answer, body)
        (busy,) = fragile.wait_until(lambda: fragile.busy(Role.ENCODER))
        pids.pop(busy)
        fragile.kill(busy)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        assert answer.result(60) == aggregated.answer(body)


def test_an_encoder_that_is_stopped_mid_request_costs_a_retry_on_another(fragile: Service, aggregated: Service) -> None:
    body = chat("see", sample_image(3), "?")
    pids = {url: fragile.pid(url) for url in fragile.deployment.urls(Role.ENCODER)}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(fragile.answer, body)
            (busy,) = fragile.wait_until(lambda: fragile.busy(Role.ENCODER))
            (idle,) = pids.keys() - {busy}
            os.kill(pids[idle], signal.SIGCONT)
            assert answer.result(60) == aggregated.answer(body)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)


def test_with_no_encoder_left_images_wait_for_one_and_text_is_answered(fragile: Service, aggregated: Service) -> None:
    for url in fragile.deployment.urls(Role.ENCODER):
        fragile.kill(url)
    body = chat("see", sample_image(2), "?")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fragile.answer, body)
        assert fragile.answer(chat("only words"))
        assert answer.result(90) == aggregated.answer(body)


def test_a_pd_killed_mid_stream_ends_the_stream_with_an_error(fragile: Service, aggregated: Service) -> None:
    body = chat("tell me everything", stream=True, max_tokens=400)

    def with_pd_killed() -> list[str]:
        return streamed(fragile, body, at_event=1, act=lambda: kill_the_busy(fragile, Role.PD))

    events = struck(fragile, aggregated, body, with_pd_killed)
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in events
