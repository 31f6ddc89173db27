"""In a fleet whose embeddings go from memory to memory, an encoder dies, and then the engine of the language model."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from chiasm.wire import PLACES_PATH

from .conftest import Launch
from .fleet import WAIT_SECONDS, busy_encoders, front, wait_until_encoders_rest
from .processes import CALL_SECONDS, CHECKPOINT, CLIENT, Server, chiasm_instance, transfer_config, vllm
from .serving import Question

CONNECTOR = "TcpConnector"
SEEDS = itertools.count(20_000)


@dataclass
class Fleet:
    mortal: Server
    """vLLM's encoder."""
    other: Server
    """chiasm's."""
    pd: Server
    """vLLM's."""
    proxy: Server

    def check(self, question: Question, **options: str) -> None:
        assert self.proxy.answer(question.body | options).strip() == question.answer


@pytest.fixture(scope="module")
def fleet(launch: Launch, logs: Path) -> Fleet:
    mortal = launch(vllm(logs, "mortal-encoder", transfer_config("ec_producer", CONNECTOR)))
    pd = launch(vllm(logs, "mortal-pd", transfer_config("ec_consumer", CONNECTOR, wait_seconds=WAIT_SECONDS)))
    other = launch(chiasm_instance(logs, "encoder", CONNECTOR, checkpoint=CHECKPOINT))
    for server in (mortal, pd, other):
        server.wait_ready()
    proxy = launch(front(logs, "mortal", encoder=[mortal, other], pd=[pd]))
    proxy.wait_ready()
    return Fleet(mortal, other, pd, proxy)


@contextlib.contextmanager
def stopped(*servers: Server) -> Iterator[None]:
    """Meanwhile none of their processes runs; afterwards those that still exist go on."""
    for server in servers:
        os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGCONT)


def test_an_encoder_that_is_killed_loses_what_is_wanted_of_it_and_nothing_that_has_come(fleet: Fleet) -> None:
    came = _until_one_comes_from_the_mortal(fleet)
    with ThreadPoolExecutor(1) as pool:
        while fleet.mortal.process.poll() is None:
            question = Question(next(SEEDS))
            with stopped(fleet.mortal, fleet.other):
                answer = pool.submit(fleet.proxy.answer, question.body)
                fleet.proxy.until(lambda: bool(busy_encoders(fleet.proxy.url)))
                if fleet.mortal.url in busy_encoders(fleet.proxy.url):
                    fleet.mortal.kill()
            assert answer.result(CALL_SECONDS).strip() == question.answer
    fleet.check(came, cache_salt="anew")  # so no KV is used again
    for _ in range(4):
        fleet.check(Question(next(SEEDS)))
    assert fleet.pd.process.poll() is None
    assert fleet.pd.count("failed_requests") == 0


def _until_one_comes_from_the_mortal(fleet: Fleet) -> Question:
    """Ask until an answer rests on an embedding of this encoder, to which the PD is connected then; return the question."""
    while True:
        saves = fleet.mortal.count("saves")
        question = Question(next(SEEDS))
        fleet.check(question)
        wait_until_encoders_rest(fleet.proxy)
        if fleet.mortal.count("saves") > saves:
            return question


def test_a_language_instance_whose_engine_dies_while_it_is_asked_ends(fleet: Fleet) -> None:
    """Then it can be started again."""
    children = psutil.Process(fleet.pd.process.pid).children(recursive=True)
    engine = next(one for one in children if "EngineCore" in " ".join(one.cmdline()))
    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(CLIENT.post, f"{fleet.pd.url}{PLACES_PATH}", json={}, timeout=CALL_SECONDS)
        assert (
            CLIENT.get(f"{fleet.pd.url}/livez", timeout=CALL_SECONDS).status_code == 200
        )  # it has heard the other one
        engine.kill()
        fleet.pd.process.wait(CALL_SECONDS)
        assert asking.result().status_code == 500
