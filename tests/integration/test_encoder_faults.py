"""Encoders that are killed and stopped at random while a PD wants embeddings of them.

``CHIASM_PROCESS_FAULTS=20 .venv/bin/pytest tests/integration/test_encoder_faults.py -s`` reports, and takes some minutes, since
an encoder that dies again and again starts later each time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from chiasm.wire import DRAIN_PATH, Role
from tests.ec_connector.peers import CONNECTORS

from .conftest import Service, chat, run, sample_image

NUM_FAULTS = int(os.environ.get("CHIASM_PROCESS_FAULTS", "6"))
"""For each connector."""
KINDS = ("killed", "stopped", "stopped, then killed")
AT_ONCE = 3


class Turmoil:
    """Requests with new images, during which something happens to one of the encoders."""

    def __init__(self, service: Service, aggregated: Service, seed: int) -> None:
        self._service = service
        self._aggregated = aggregated
        self._chance = random.Random(seed)
        self._seed = 9000
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._killed = {0}
        """Process ids; 0 is that of an encoder that doesn't run."""
        self.faults: Counter[str] = Counter()

    def round(self) -> None:
        bodies = [self._question() for _ in range(AT_ONCE)]
        answers = [self._pool.submit(self._service.answer, body) for body in bodies]
        number = self._chance.choice((0, 1))  # before anything is answered, or in the middle
        self._service.wait_until(lambda: sum(answer.done() for answer in answers) >= number)
        if not number:
            self._service.wait_until(lambda: self._service.busy(Role.ENCODER) or all(one.done() for one in answers))
        with self._fault():
            said = [answer.result(120) for answer in answers]
        assert said == [self._aggregated.answer(body) for body in bodies]

    def _question(self) -> dict[str, object]:
        images = []
        for _ in range(self._chance.randint(1, 3)):
            self._seed += 1
            images.append(sample_image(self._seed, self._chance.choice((32, 96, 160))))
        return chat(f"number {self._seed}:", *images, "?")

    @contextlib.contextmanager
    def _fault(self) -> Iterator[None]:
        """Have a fault happen to an encoder that runs; one that is only stopped goes on afterwards."""
        pids = self._service.wait_until(self._running)  # both may have been killed just now
        url = self._chance.choice(list(pids))
        pid = pids[url]
        kind = KINDS[self.faults.total() % len(KINDS)]
        self.faults[kind] += 1
        if kind != "killed":
            os.kill(pid, signal.SIGSTOP)
        if kind != "stopped":
            self._killed.add(pid)
            self._service.kill(url)
        try:
            yield
        finally:
            if kind == "stopped":
                os.kill(pid, signal.SIGCONT)

    def _running(self) -> dict[str, int]:
        """Process ids of the encoders that run, by URL."""
        pids = {one.url: one.pid or 0 for one in self._service.deployment.processes}
        encoders = self._service.deployment.urls(Role.ENCODER)
        return {url: pids[url] for url in encoders if pids.get(url, 0) not in self._killed}

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(params=CONNECTORS)
def service(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Two encoders and one PD."""
    roles = {Role.ENCODER: 2, Role.PD: 1}
    fields = {"connector": request.param}
    yield from run(checkpoint, roles, fields=fields, deadline_seconds=90, wait_for_instance_seconds=60)


@pytest.mark.timeout(300 + 60 * NUM_FAULTS)
def test_encoders_that_are_killed_and_stopped_harm_no_answer_and_no_pd(service: Service, aggregated: Service) -> None:
    (pd,) = service.deployment.urls(Role.PD)
    process = psutil.Process(service.pid(pd))
    turmoil = Turmoil(service, aggregated, seed=7)
    try:
        turmoil.round()
        before_bytes = process.memory_info().rss
        while turmoil.faults.total() < NUM_FAULTS:
            turmoil.round()
    finally:
        turmoil.end()
    after_bytes = process.memory_info().rss
    service.wait_until_recovered()
    body = chat("after", sample_image(1000), "?")
    assert service.answer(body) == aggregated.answer(body)
    assert service.pid(pd) == process.pid
    print(f"\n{dict(turmoil.faults)}; the PD had {before_bytes >> 10} KiB, then {after_bytes >> 10} KiB")
    for url in service.deployment.urls(Role.ENCODER):
        assert drained(service, url).status_code == 202
        service.wait_until(partial(has_nothing_pinned, service, url))


def drained(service: Service, url: str) -> httpx.Response:
    return httpx.post(url + DRAIN_PATH, auth=service.signed, timeout=30)


def has_nothing_pinned(service: Service, url: str) -> bool:
    """Whether an encoder that drains holds no embedding for anybody any more. It ends when that is so."""
    try:
        return bool(drained(service, url).json()["embeddings"] == 0)
    except httpx.TransportError:
        return True
