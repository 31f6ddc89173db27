"""Fleets that mix instances of both engines, and vLLM's example proxy in front of chiasm's instances.

test_identity.py has the other combinations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.free_ports import free_port

from .conftest import Launch
from .fleet import ask, ask_all, ask_for_stream, bodies, front, wait_until_encoders_rest
from .processes import CALL_SECONDS, CLIENT, Server, chiasm_instance
from .wire import chat, image_bytes, image_part

EXAMPLE_PROXY = Path(sys.prefix) / "share" / "vllm" / "disagg_epd_proxy.py"
ENCODED = "chiasm_images_encoded_total"
QUESTION = "what shape is it?"

Before = Callable[..., Server]
Instances = dict[str, Server]


@pytest.fixture(scope="module")
def chiasms(launch: Launch, logs: Path, store: Path) -> Instances:
    """chiasm's own instances by role, on the same store as vLLM's."""
    instances = {role: launch(chiasm_instance(logs, role, store)) for role in ("encoder", "pd", "prefill", "decode")}
    for server in instances.values():
        server.wait_ready()
    return instances


@pytest.fixture
def before(logs: Path, request: pytest.FixtureRequest) -> Iterator[Before]:
    """``before(encoder=[…], pd=[…])`` starts chiasm's proxy for these instances; it ends with the test."""
    with ExitStack() as stack:

        def start(**instances: list[Server]) -> Server:
            server = front(logs, f"{request.node.name}-{free_port()}", **instances)
            stack.callback(server.stop)
            server.wait_ready()
            stack.callback(wait_until_encoders_rest, server)  # what they do isn't counted in the next test
            return server

        yield start


# Mixed


def test_vllms_encoder_and_chiasms_prefill_and_decode(
    before: Before, encoder: Server, chiasms: Instances, aggregated: Server
) -> None:
    some = bodies(4000)
    server = before(encoder=[encoder], prefill=[chiasms["prefill"]], decode=[chiasms["decode"]])
    assert ask_all(server, some, stream=True) == ask_all(aggregated, some)


def test_a_cached_image_is_not_encoded_for_another_pd(
    before: Before, encoder: Server, pd: Server, other_pd: Server, chiasms: Instances
) -> None:
    """Not even if the encoder, too, is another one, which has not seen it."""
    body = chat(image_part(image_bytes(5000)), QUESTION)
    saved, encoded, hits = encoder.count("saves"), chiasms["encoder"].metric(ENCODED), other_pd.count("hits")
    first = ask(before(encoder=[encoder], pd=[pd]), body)
    encoder.until(lambda: encoder.count("saves") == saved + 1)
    assert ask(before(encoder=[encoder], pd=[other_pd]), body) == first
    other_pd.until(lambda: other_pd.count("hits") == hits + 1)
    assert ask(before(encoder=[chiasms["encoder"]], pd=[chiasms["pd"]]), body) == first
    assert encoder.count("saves") == saved + 1
    assert chiasms["encoder"].metric(ENCODED) == encoded


def test_an_encoder_with_another_dtype_is_not_used(
    before: Before, launch: Launch, logs: Path, store: Path, encoder: Server, pd: Server
) -> None:
    wrong = launch(chiasm_instance(logs, "encoder", store, "bfloat16"))
    wrong.wait_ready()
    server = before(encoder=[wrong, encoder], pd=[pd])

    def shown() -> dict[str, Any]:
        instances = CLIENT.get(f"{server.url}/health", timeout=CALL_SECONDS).json()["instances"]
        (found,) = [one for one in instances if one["url"] == wrong.url]
        return dict(found)

    server.until(lambda: shown()["state"] == "mismatched")
    assert shown()["reason"] == "its dtype is bfloat16, but the fleet's is float32"
    for seed in range(5100, 5104):
        ask(server, chat(image_part(image_bytes(seed)), QUESTION))
    assert wrong.metric(ENCODED) == 0


# vLLM's own example proxy before chiasm's instances


@pytest.fixture(scope="module", params=[False, True], ids=["pd", "prefill and decode"])
def example(request: pytest.FixtureRequest, logs: Path, chiasms: Instances) -> Iterator[Server]:
    if not EXAMPLE_PROXY.exists():
        pytest.skip("vLLM's example proxy is not here; scripts/vllm/example_proxy.sh fetches it")
    port, apart = free_port(), request.param
    command = [sys.executable, str(EXAMPLE_PROXY), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--encode-servers-urls", chiasms["encoder"].url]
    command += ["--prefill-servers-urls", chiasms["prefill"].url if apart else "disable"]
    command += ["--decode-servers-urls", chiasms["decode" if apart else "pd"].url]
    server = Server(command, port, logs / f"example-proxy-{port}.log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_example_proxy_before_chiasms_instances(example: Server, aggregated: Server, stream: bool) -> None:
    some = bodies(6000)
    assert ask_all(example, some, stream=stream) == ask_all(aggregated, some)


def test_vllms_example_proxy_passes_on_a_refusal(example: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert example.post(chat(part, QUESTION)).status_code == 400
    assert ask_for_stream(example, chat("who are you?")).text
