"""One command starts vLLM as encoder, prefill and decode, and ends with all that it has started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.cli.running import Running, run
from tests.launch.waiting import alive, eventually

from .serving import SMALL, Question, Service, shared_memory, what_is_left
from .wire import chat


@pytest.fixture(scope="module")
def before() -> set[Path]:
    """The files in shared memory before the service starts."""
    return shared_memory()


@pytest.fixture(scope="module")
def service(before: set[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One encoder, one prefill and one decode instance; a test of this file ends it. test_faults.py has a PD."""
    roles = ("--encoders", "1", "--prefills", "1", "--decodes", "1")
    with Running(tmp_path_factory.mktemp("served"), "serve", "demo", "--engine", "vllm", *roles, *SMALL) as running:
        yield Service(running)


def test_instances_describe_themselves_like_chiasms_own(service: Service) -> None:
    assert sorted(one["role"] for one in service.instances()) == ["decode", "encoder", "prefill"]
    assert service.is_whole()
    for one in service.instances():
        health = httpx.get(f"{one['url']}/health", timeout=30).json()
        assert health["engine"].startswith("vllm ")
        assert health["max_model_len"] == 1024
        assert health["model"] == "demo"


@pytest.mark.parametrize("seed", range(3))
def test_a_question_about_an_image_gets_the_right_answer(service: Service, seed: int) -> None:
    question = Question(seed)
    assert service.answer(question.body).strip() == question.answer


def test_text_is_answered(service: Service) -> None:
    assert service.answer(chat("What can you do?"))


def test_what_the_proxy_does_not_understand_reaches_vllm(service: Service) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(service.url + path, json={"model": "demo"} | body, timeout=120).json()

    words = post("/tokenize", prompt="What can you do?", add_special_tokens=False)["tokens"]
    assert post("/detokenize", tokens=words)["prompt"] == "What can you do?"
    response = post("/v1/responses", input="What can you do?", temperature=0, max_output_tokens=8)
    assert (response["object"], response["usage"]["output_tokens"] > 0) == ("response", True)
    messages = [{"role": "user", "content": "What can you do?"}]
    message = post("/v1/messages", messages=messages, temperature=0, max_tokens=8)
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert post("/reset_prefix_cache")["error"]["type"] == "not_found_error"


def test_only_the_encoder_encodes(service: Service) -> None:
    before = service.metric("vllm:chiasm_ec_saves_total", "encoder")
    service.answer(Question(50).body)
    service.wait(lambda: service.metric("vllm:chiasm_ec_saves_total", "encoder") == before + 1)
    for role in ("prefill", "decode"):
        assert service.metric("vllm:chiasm_ec_saves_total", role) == 0
        assert service.metric("vllm:chiasm_ec_misses_total", role) == 0


def test_ctrl_c_ends_all_of_it_and_leaves_nothing(service: Service, before: set[Path]) -> None:
    family = service.running.children
    scratch = [
        Path(one.environ()["TMPDIR"]) for one in family if "TMPDIR" in one.environ() and "vllm" in one.name().lower()
    ]
    urls = [service.url, *(one["url"] for one in service.instances())]
    assert len(family) > 5
    assert all(folder.is_dir() for folder in scratch)

    assert service.running.end(signal.SIGINT) < 5
    assert service.running.process.returncode == 0
    assert not alive(family)
    assert not what_is_left(before)
    assert not any(folder.exists() for folder in scratch)
    for url in urls:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=5)
    assert service.running.stdout == f"ready {service.url}\n"


def test_an_unknown_vllm_flag_ends_the_command_with_vllms_own_message(before: set[Path]) -> None:
    done = run("serve", "demo", "--engine", "vllm", *SMALL, "--pd-args", "--frobnicate 'three times'")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "Error: unrecognized arguments: --frobnicate three times"
    assert eventually(lambda: not what_is_left(before), 10)
