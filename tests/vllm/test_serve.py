"""One command starts vLLM as encoder, prefill and decode, and ends with all that it has started."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.ec_transfer.stores import StoredEntry, open_store
from chiasm.media import identifier
from tests import store_server
from tests.cli.running import Running
from tests.launch.waiting import alive, eventually
from tests.store_server import StoreServer

from .processes import CALL_SECONDS
from .serving import SMALL, Question, Service, in_shared_memory
from .wire import chat, image_part, with_comment


@pytest.fixture(scope="module")
def shared_cache() -> Iterator[StoreServer]:
    """The fleet's shared cache."""
    with store_server.running() as server:
        yield server


@pytest.fixture(scope="module")
def service(shared_cache: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One encoder, one prefill and one decode instance; a test of this file ends it.

    Embeddings go from memory to memory, and into a shared cache. test_faults.py has a PD, and the default connector.
    """
    command = ("serve", "demo", "--engine", "vllm", "--encoders", "1", "--prefills", "1", "--decodes", "1", *SMALL)
    through = ("--connector", "SharedMemoryConnector", "--ec-store", shared_cache.url)
    patient = ("--proxy-args", "--ec-store-timeout-seconds 10")  # the machine may be busy
    with Running(tmp_path_factory.mktemp("served"), *command, *through, *patient) as running:
        yield Service(running)


def test_instances_describe_themselves_like_chiasms_own(service: Service) -> None:
    assert sorted(one["role"] for one in service.instances()) == ["decode", "encoder", "prefill"]
    service.wait(service.is_whole)
    for one in service.instances():
        health = httpx.get(f"{one['url']}/health", timeout=CALL_SECONDS).json()
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
        return httpx.post(service.url + path, json={"model": "demo"} | body, timeout=CALL_SECONDS).json()

    words = post("/tokenize", prompt="What can you do?", add_special_tokens=False)["tokens"]
    assert post("/detokenize", tokens=words)["prompt"] == "What can you do?"
    response = post("/v1/responses", input="What can you do?", temperature=0, max_output_tokens=8)
    assert (response["object"], response["usage"]["output_tokens"] > 0) == ("response", True)
    messages = [{"role": "user", "content": "What can you do?"}]
    message = post("/v1/messages", messages=messages, temperature=0, max_tokens=8)
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert post("/reset_prefix_cache")["error"]["type"] == "not_found_error"


def test_only_the_encoder_encodes(service: Service) -> None:
    service.wait_until_encoders_rest()
    before = service.metric("vllm:chiasm_ec_saves_total", "encoder")
    service.answer(Question(50).body)
    service.wait(lambda: service.metric("vllm:chiasm_ec_saves_total", "encoder") == before + 1)
    for role in ("prefill", "decode"):
        assert service.metric("vllm:chiasm_ec_saves_total", role) == 0
        assert service.metric("vllm:chiasm_ec_misses_total", role) == 0


def test_an_image_that_the_shared_cache_has_is_not_encoded(service: Service, shared_cache: StoreServer) -> None:
    """The bytes of the file name an image; the same pixels in another file have the same embedding."""
    question = Question(60)
    assert service.answer(question.body).strip() == question.answer
    url = service.instances("encoder")[0]["url"]
    fingerprint = httpx.get(f"{url}/health", timeout=CALL_SECONDS).json()["fingerprint"]
    known, same = (
        identifier(data, fingerprint=fingerprint) for data in (question.image_bytes, with_comment(question.image_bytes))
    )
    service.wait(lambda: shared_cache.has_entry(known))  # encoders write behind
    copy_entry(shared_cache, known, same, fingerprint)

    service.wait_until_encoders_rest()
    saves = service.metric("vllm:chiasm_ec_saves_total", "encoder")
    reads = service.metric("vllm:chiasm_ec_store_reads_total", "prefill")
    text = question.body["messages"][0]["content"][-1]["text"]
    body = chat(image_part(with_comment(question.image_bytes)), text, max_tokens=16)
    assert service.answer(body).strip() == question.answer
    service.wait(lambda: service.metric("vllm:chiasm_ec_store_reads_total", "prefill") == reads + 1)
    assert service.metric("vllm:chiasm_ec_saves_total", "encoder") == saves
    assert service.metric("vllm:chiasm_ec_store_writes_total", "encoder") > 0


def copy_entry(server: StoreServer, known: str, name: str, fingerprint: str) -> None:
    """Have the shared cache hold an embedding by another name, too."""
    store = open_store(server.url)
    (entry,) = store.exists_many([known], fingerprint)
    assert entry is not None
    data = memoryview(bytearray(entry.size_bytes))
    store.get_into(entry, data)
    store.put(StoredEntry.of(name, fingerprint, entry.dtype, entry.shape, data), data)
    store.close()


def test_ctrl_c_ends_all_of_it_and_leaves_nothing(service: Service) -> None:
    family, held = service.running.children, service.note_shared_memory()
    scratch = [
        Path(one.environ()["TMPDIR"]) for one in family if "TMPDIR" in one.environ() and "vllm" in one.name().lower()
    ]
    urls = [service.url, *(one["url"] for one in service.instances())]
    assert len(family) > 5
    assert all(folder.is_dir() for folder in scratch)

    service.running.end(signal.SIGINT)
    assert service.running.process.returncode == 0
    assert eventually(lambda: not alive(family))
    assert eventually(lambda: not any(path.exists() for path in held))
    assert not any(folder.exists() for folder in scratch)
    for url in urls:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=5)
    assert service.running.stdout == f"ready {service.url}\n"


def test_an_unknown_vllm_flag_ends_the_command_with_vllms_own_message(tmp_path: Path) -> None:
    command, held = (
        ("serve", "demo", "--engine", "vllm", *SMALL, "--pd-args", "--frobnicate 'three times'"),
        set[Path](),
    )
    with Running(tmp_path, *command) as running:
        while running.process.poll() is None:
            held |= in_shared_memory([running.process, *running.children])
            time.sleep(0.1)  # there is no event to wait for
        assert running.process.returncode == 2
        assert running.stdout == ""
        assert running.stderr.splitlines()[-1] == "Error: unrecognized arguments: --frobnicate three times"
    assert eventually(lambda: not any(path.exists() for path in held))
