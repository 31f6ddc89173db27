"""An encoder that shares its cores with busy language models."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chiasm.cores import ENCODER_NICE
from chiasm.launch.layout import Layout
from chiasm.wire import Role
from tests.integration.conftest import Service, chat, run, sample_image

STREAMS_PER_PD = 3
IMAGES = 6


@pytest.fixture(scope="module")
def colocated(checkpoint: Path) -> Iterator[Service]:
    """One encoder and two PDs on the same cores."""
    yield from run(checkpoint, {Role.ENCODER: 1, Role.PD: 2}, layout=Layout.COLOCATED)


def niceness(pid: int) -> list[int]:
    """Return the niceness of each thread of a process."""
    stats = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            stats.append(path.read_text())
    return [int(stat.rpartition(")")[2].split()[16]) for stat in stats]


def test_images_are_answered_while_streams_keep_every_pd_busy(colocated: Service, aggregated: Service) -> None:
    pds = colocated.deployment.urls(Role.PD)
    count = STREAMS_PER_PD * len(pds)
    ended = threading.Event()

    def stream(number: int) -> int:
        """Ask for one long stream after the other; return how many were whole."""
        whole = 0
        while True:
            whole += "[DONE]" in colocated.post(chat(f"Story {number}", stream=True, max_tokens=400)).text
            if ended.is_set():
                return whole

    def are_busy() -> bool:
        return all(one["in_flight"] for one in colocated.health() if one["role"] == Role.PD)

    bodies = [chat("see", sample_image(seed), "?") for seed in range(100, 100 + IMAGES)]
    answers: list[str] = []
    before = colocated.encoded()
    with ThreadPoolExecutor(count) as pool:
        streams = [pool.submit(stream, number) for number in range(count)]
        try:
            for body in bodies:
                colocated.wait_until(are_busy)
                answers.append(colocated.answer(body))
        finally:
            ended.set()
    assert all(one.result() for one in streams)
    assert colocated.encoded_after(before + IMAGES - 1) == before + IMAGES
    assert answers == [aggregated.answer(body) for body in bodies]


def test_only_the_encoders_computing_has_a_lower_priority(colocated: Service) -> None:
    assert colocated.answer(chat("see", sample_image(200), "?"))
    encoder = niceness(colocated.pid(colocated.deployment.urls(Role.ENCODER)[0]))
    of_process = os.nice(0)
    assert set(encoder) == {of_process, of_process + ENCODER_NICE}
    assert encoder.count(of_process + ENCODER_NICE) >= 2  # preprocessing and encoding
    for url in colocated.deployment.urls(Role.PD):
        assert set(niceness(colocated.pid(url))) == {of_process}


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no automatic groups")
def test_where_sessions_are_weighed_the_encoders_is_the_lower_one(colocated: Service) -> None:
    of_roles = {
        role: {
            Path(f"/proc/{colocated.pid(url)}/autogroup").read_text().split()[-1]
            for url in colocated.deployment.urls(role)
        }
        for role in (Role.ENCODER, Role.PD)
    }
    assert of_roles == {Role.ENCODER: {str(ENCODER_NICE)}, Role.PD: {"0"}}
