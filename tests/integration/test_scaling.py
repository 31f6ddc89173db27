"""An encoder that comes when more images do and is drained when they are over, as processes, while clients ask."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from chiasm.launch import RoleConfig, scaling
from chiasm.wire import Role

from .conftest import Service, chat, run, sample_image

CLIENTS, IMAGES = 2, 3
PAUSE_SECONDS = 0.1
"""Between two requests of a client: so images wait now and then, and are no load that the proxy remembers for a minute."""
COMPARED = 12
CALM_SECONDS = 0.5
REMEMBERED_SECONDS = 120.0
"""More than the minute for which the proxy remembers the load of encoders, which is high on a slow machine."""


@pytest.fixture
def scaled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """One encoder or two, and a PD. Any second image that waits is worth a second encoder, however fast the first one is."""
    monkeypatch.setattr(
        scaling, "LOOK_SECONDS", CALM_SECONDS / 10
    )  # so that an image that waits is seen within a calm while
    roles: dict[Role, int | RoleConfig] = {Role.ENCODER: RoleConfig(2, threads=1, least=1), Role.PD: 1}
    yield from run(
        checkpoint, roles, encode_wait_seconds=0.001, encoder_start_seconds=0.0, scale_down_seconds=CALM_SECONDS
    )


def answer(service: Service, number: int, salt: str = "") -> str:
    """Ask about several images that no other number has."""
    images = [sample_image(IMAGES * number + one) for one in range(IMAGES)]
    return service.answer(chat("Describe them.", *images, **({"cache_salt": salt} if salt else {})))


def test_a_burst_brings_an_encoder_which_is_drained_when_it_is_over_and_no_answer_differs(scaled: Service) -> None:
    (first,) = scaled.deployment.urls(Role.ENCODER)
    answers: dict[int, str] = {}
    numbers, is_over = itertools.count(), threading.Event()
    known = chat("Describe it.", sample_image(0))
    expected = scaled.answer(known)

    def ask_for_new_images() -> None:
        while not is_over.wait(PAUSE_SECONDS):
            number = next(numbers)
            answers[number] = answer(scaled, number)

    def ask_for_a_known_image() -> None:
        while not is_over.is_set():  # a single image needs no second encoder
            assert scaled.answer(known) == expected

    def the_second_has_encoded() -> bool:
        healthy = {one["url"] for one in scaled.health() if one["state"] == "healthy"}
        urls = [url for url in scaled.deployment.urls(Role.ENCODER) if url != first and url in healthy]
        with contextlib.suppress(httpx.TransportError):  # it is ending
            return any(scaled.metric_at(url, "chiasm_images_encoded_total") for url in urls)
        return False

    with ThreadPoolExecutor(CLIENTS) as clients:
        asking = [clients.submit(ask_for_new_images) for _ in range(CLIENTS)]
        try:
            scaled.wait_until(the_second_has_encoded)
        finally:
            is_over.set()
        for one in asking:
            one.result()

        is_over.clear()
        still_asking = clients.submit(ask_for_a_known_image)
        try:
            scaled.wait_until(lambda: scaled.deployment.urls(Role.ENCODER) == [first], REMEMBERED_SECONDS)
        finally:
            is_over.set()
        still_asking.result()

    assert [one["url"] for one in scaled.health() if one["role"] == "encoder"] == [first]
    latest = sorted(answers)[-COMPARED:]
    assert {one: answer(scaled, one, "anew") for one in latest} == {one: answers[one] for one in latest}
