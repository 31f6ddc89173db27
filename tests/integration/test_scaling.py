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

CLIENTS = 6
COMPARED = 12
CALM_SECONDS = 0.5


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


def answer(service: Service, seed: int, salt: str = "") -> str:
    salted = {"cache_salt": salt} if salt else {}
    return service.answer(chat("Describe it.", sample_image(seed, 320, 320), **salted))


def test_a_burst_brings_an_encoder_which_is_drained_when_it_is_over_and_no_answer_differs(scaled: Service) -> None:
    (first,) = scaled.deployment.urls(Role.ENCODER)
    answers: dict[int, str] = {}
    seeds, is_over = itertools.count(), threading.Event()

    def ask_for_new_images() -> None:
        while not is_over.is_set():
            seed = next(seeds)
            answers[seed] = answer(scaled, seed)

    def ask_for_known_images() -> None:
        while not is_over.is_set():  # one at a time, which needs no second encoder
            assert answer(scaled, 0) == answers[0]

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
        still_asking = clients.submit(ask_for_known_images)
        try:
            scaled.wait_until(lambda: scaled.deployment.urls(Role.ENCODER) == [first])
        finally:
            is_over.set()
        still_asking.result()

    assert [one["url"] for one in scaled.health() if one["role"] == "encoder"] == [first]
    latest = sorted(answers)[-COMPARED:]
    assert {seed: answer(scaled, seed, "anew") for seed in latest} == {seed: answers[seed] for seed in latest}
