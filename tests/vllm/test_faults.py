"""Processes that die and a store that fails, with vLLM as encoder and PD. After each fault the next response is right."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from tests.cli.running import Running
from tests.launch.waiting import alive, eventually

from .processes import CALL_SECONDS
from .serving import SMALL, Question, Service, error_of, events, stopped
from .wire import chat, image_part

MOST_AT_ONCE = 16
DEADLINE_SECONDS = 60
LONG_TOKENS = 8000
"""They take tens of seconds."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of embeddings."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def service(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two encoders and a PD behind a proxy that takes few requests at once; the last test of this file kills it."""
    arguments = ["--encoders", "2", "--pds", "1", "--deadline-seconds", str(DEADLINE_SECONDS), *SMALL]
    arguments += ["--max-model-len", str(LONG_TOKENS + 192)]
    # Encoders that stand still until two hundred requests have come, which may take a while, are not given up.
    of_proxy = f"--max-concurrent-requests {MOST_AT_ONCE} --probe-timeout-seconds {DEADLINE_SECONDS}"
    arguments += ["--shared-storage-path", str(store), "--proxy-args", of_proxy]
    with Running(tmp_path_factory.mktemp("faults"), "serve", "demo", "--engine", "vllm", *arguments) as running:
        yield Service(running)


@pytest.fixture
def afterwards(service: Service, request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test all instances come back, and the next question about an image gets the right answer."""
    yield
    service.wait(service.is_whole)
    service.note_shared_memory()
    question = Question(len(request.node.name) + 10_000)
    assert service.answer(question.body).strip() == question.answer


pytestmark = pytest.mark.usefixtures("afterwards")


def _workers(service: Service, role: str) -> list[psutil.Process]:
    """Return all processes of the instances of a role."""
    servers = service.servers(role)
    return [process for server in servers for process in (server, *server.children(recursive=True))]


def _entries(store: Path) -> set[Path]:
    return set(store.rglob("*.safetensors"))


def test_ten_identical_images_at_once_are_encoded_once(service: Service) -> None:
    before = service.metric("vllm:chiasm_ec_saves_total", "encoder")
    question = Question(100)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(service.answer, [question.body] * 10))
    assert {answer.strip() for answer in answers} == {question.answer}
    service.wait(lambda: service.metric("vllm:chiasm_ec_saves_total", "encoder") == before + 1)


def test_a_uuid_that_is_a_path_writes_nothing_elsewhere(service: Service, store: Path) -> None:
    question = Question(110)
    body = chat(image_part(question.image_bytes, "../../escaped"), "What is it?")
    outside = set(store.parent.iterdir())
    assert service.post(body).status_code in {200, 400}
    for one in service.instances("encoder"):
        direct = httpx.post(f"{one['url']}/v1/chat/completions", json=body | {"max_tokens": 1}, timeout=CALL_SECONDS)
        assert direct.status_code >= 400, direct.text
    assert set(store.parent.iterdir()) == outside
    assert not list(store.parent.rglob("*escaped*"))


def test_two_hundred_requests_at_once_are_all_answered(service: Service) -> None:
    questions = [Question(200 + number) for number in range(20)]
    encoders = service.servers("encoder")
    path = f"{service.url}/v1/chat/completions"
    with (
        httpx.Client(timeout=2 * DEADLINE_SECONDS, limits=httpx.Limits(max_connections=200)) as client,
        ThreadPoolExecutor(200) as pool,
    ):
        with stopped(*encoders):  # no request ends before all have arrived
            calls = [pool.submit(client.post, path, json=questions[number % 20].body) for number in range(200)]
            service.wait(lambda: sum(call.done() for call in calls) >= 200 - MOST_AT_ONCE)
        responses = [call.result() for call in calls]
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 503}
    assert statuses[503] >= 200 - MOST_AT_ONCE
    assert all("retry-after" in response.headers for response in responses if response.status_code == 503)
    for number, response in enumerate(responses):
        if response.status_code == 200:
            said = response.json()["choices"][0]["message"]["content"]
            assert said.strip() == questions[number % 20].answer


def test_a_store_without_room_fails_the_request_and_says_why(service: Service) -> None:
    limits = {}
    for process in _workers(service, "encoder"):
        limits[process.pid] = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
    try:
        response = service.post(Question(300).body)
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    assert response.status_code == 503, response.text
    assert error_of(response)


def test_a_store_that_cannot_be_written_fails_the_request_and_says_why(service: Service, store: Path) -> None:
    with _read_only(store):
        response = service.post(Question(310).body)
    assert response.status_code == 503, response.text
    assert error_of(response)


def test_a_store_that_is_deleted_is_created_again(service: Service, store: Path) -> None:
    service.answer(Question(320).body)
    shutil.rmtree(store)
    question = Question(321)
    assert service.answer(question.body).strip() == question.answer
    assert _entries(store)


def test_an_entry_that_is_torn_is_encoded_again(service: Service, store: Path) -> None:
    known = _entries(store)
    question = Question(330)
    assert service.answer(question.body).strip() == question.answer
    (entry,) = _entries(store) - known
    os.truncate(entry, entry.stat().st_size // 2)
    for number in range(8):  # so that the PD evicts the embedding from its memory
        service.answer(Question(340 + number, (512, 512)).body)
    service.wait_until_encoders_rest()
    saved = service.metric("vllm:chiasm_ec_saves_total", "encoder")
    again = chat(*reversed(question.body["messages"][0]["content"]), max_tokens=16)
    assert service.answer(again)
    assert service.answer(question.body).strip() == question.answer
    service.wait(lambda: service.metric("vllm:chiasm_ec_saves_total", "encoder") > saved)


class TestEncodersDie:
    """The encoders start again together with the PD, which the next test kills; that test waits for all of them."""

    @pytest.fixture
    def afterwards(self) -> None:
        """Nothing to wait for yet."""

    def test_an_encoder_killed_mid_request_costs_a_retry_on_another(self, service: Service) -> None:
        question = Question(400)
        servers = {one["url"]: service.server(one["url"]) for one in service.instances("encoder")}
        with stopped(*servers.values()), ThreadPoolExecutor(1) as pool:
            answer = pool.submit(service.answer, question.body)
            busy, *_ = service.wait(service.busy_encoders)  # they are stopped, so what has begun goes on
            servers.pop(busy).kill()
            for server in servers.values():
                server.resume()
            assert answer.result(DEADLINE_SECONDS).strip() == question.answer

    def test_without_encoders_images_get_503_and_text_is_answered(self, service: Service) -> None:
        service.wait(lambda: any(one["state"] == "healthy" for one in service.instances("encoder")))
        service.wait(lambda: len(service.servers("encoder")) == 2)  # the other one has begun to start again
        servers = service.servers("encoder")
        supervisors = service.supervisors("encoder")
        assert len(supervisors) == 2
        with stopped(*servers, *supervisors), ThreadPoolExecutor(1) as pool:  # none is there again before the answer
            response = pool.submit(service.post, Question(410).body)
            service.wait(lambda: response.done() or service.busy_encoders())
            for server in servers:
                server.kill()
            assert response.result(DEADLINE_SECONDS).status_code == 503
        assert "encoder" in error_of(response.result())
        assert service.answer(chat("What can you do?"))


def test_a_pd_killed_mid_stream_ends_the_stream_with_an_error(service: Service) -> None:
    (pd,) = service.instances("pd")
    server = service.server(pd["url"])
    body = chat("What can you do?", stream=True, max_tokens=LONG_TOKENS, ignore_eos=True)
    said: list[str] = []
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=DEADLINE_SECONDS) as response:
        assert response.status_code == 200
        for event in events(response):
            if not said:
                server.kill()
            said.append(event)
    assert "error" in json.loads(said[-1])
    assert "[DONE]" not in said
    service.wait(lambda: not service.is_whole())


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """A block in which nobody can write into ``folder``; the superuser is kept out by a read-only mount."""
    if os.geteuid() != 0:
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        modes = [path.stat().st_mode for path in folders]
        for path in folders:
            path.chmod(0o500)
        try:
            yield
        finally:
            for path, mode in zip(folders, modes, strict=True):
                path.chmod(mode)
        return
    mounted = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"the superuser can write everywhere, and may not mount here: {mounted.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


class TestTheEnd:
    """Runs last, since nothing starts again."""

    @pytest.fixture
    def afterwards(self) -> None:
        """Nothing comes back."""

    def test_when_the_command_is_killed_its_instances_end_too(self, service: Service) -> None:
        family, held = service.running.children, service.note_shared_memory()
        assert len(family) > 8
        assert held
        service.running.process.kill()
        assert eventually(lambda: not alive(family))
        assert eventually(lambda: not any(path.exists() for path in held))
