"""Fleets of vLLM's and chiasm's instances behind chiasm's proxy, and the requests by which they are compared."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx

from chiasm.wire import CHAT_PATH
from tests.free_ports import free_port
from tests.hosts import Host

from .processes import CALL_SECONDS, CHECKPOINT, CLIENT, Server, chiasm, transfer_config, vllm
from .wire import Body, chat, image_bytes, image_part

WAIT_SECONDS = 120.0
"""After which an instance fails a request whose embedding doesn't come."""
_AT_ONCE = 4
_PATIENT = tuple(
    word
    for wait in ("connect-timeout", "probe-timeout", "busy-probe-timeout")
    for word in (f"--{wait}-seconds", str(CALL_SECONDS))
)
"""An instance is not lost because the machine is busy: what one has answered, no other is asked."""


class Answer(NamedTuple):
    """What a client gets in all."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def front(logs: Path, name: str, shared_cache: str = "", /, **instances: list[Server]) -> Server:
    """Start chiasm's proxy for these instances, by role. ``shared_cache`` is the URL of the one that it asks, if any."""
    flags = [flag for role, some in instances.items() for one in some for flag in (f"--{role}", one.url)]
    if shared_cache:
        flags += ["--ec-store", shared_cache, "--ec-store-timeout-seconds", "10"]  # the machine may be busy
    return chiasm(logs, name, "proxy", *flags, "--probe-interval-seconds", "0.25", *_PATIENT)


def busy_encoders(proxy_url: str) -> list[str]:
    """Return the URLs of the encoders that have calls of this proxy now."""
    instances = CLIENT.get(f"{proxy_url}/health", timeout=CALL_SECONDS).json()["instances"]
    return [one["url"] for one in instances if one["role"] == "encoder" and one["in_flight"]]


def wait_until_encoders_rest(*proxies: Server) -> None:
    """Until they have answered all calls, and counted what they did: a language instance may have answered before."""
    for proxy in proxies:
        proxy.until(lambda: not busy_encoders(proxy.url))  # noqa: B023


def prefill_and_decode(
    logs: Path,
    name: str,
    through: Path | str,
    checkpoint: Path = CHECKPOINT,
    *,
    decode_flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    hosts: tuple[Host, Host] | None = None,
) -> tuple[Server, Server]:
    """Start two vLLM instances that exchange KV through vLLM's own NixlConnector, without waiting until they are ready.

    With ``hosts``, prefill is on the first and decode on the second.
    """
    made = []
    for index, (role, kv_role, flags) in enumerate(
        (("prefill", "kv_producer", ()), ("decode", "kv_consumer", decode_flags))
    ):
        kv = json.dumps({"kv_connector": "NixlConnector", "kv_role": kv_role})
        address = hosts[index].address if hosts else "127.0.0.1"
        side_channel = {"VLLM_NIXL_SIDE_CHANNEL_HOST": address, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        transfer = transfer_config("ec_consumer", through, wait_seconds=WAIT_SECONDS)
        with hosts[index].inside() if hosts else nullcontext():
            made.append(
                vllm(
                    logs,
                    f"{name}-{role}",
                    transfer,
                    "--kv-transfer-config",
                    kv,
                    *flags,
                    environment=side_channel | dict(environment or {}),
                    checkpoint=checkpoint,
                    address=address,
                )
            )
    return made[0], made[1]


def images(first_seed: int) -> list[bytes]:
    """Return nine different images of several sizes."""
    sizes = ((96, 96), (130, 70), (64, 200), (224, 160))
    return [image_bytes(first_seed + index, sizes[index % len(sizes)]) for index in range(9)]


def bodies(first_seed: int) -> list[Body]:
    """Return a dozen requests: text only, and with one to three of ``images``, some of them repeated."""
    one, two, three, four, five, six, seven, eight, nine = map(image_part, images(first_seed))
    return [
        chat("who are you?"),
        chat("what is in a picture, and what is not?"),
        chat(one, "what shape is it?"),
        chat(two, "what colour is it?"),
        chat("here is a picture:", three, "where is it?"),
        chat(four, "describe it"),
        chat(five, six, "what shape is the second?"),
        chat(six, "and", one, "what colour is the first?"),
        chat(seven, seven, "are they the same?"),
        chat(seven, eight, nine, "what shape is the last?"),
        chat(two, four, two, "what colour is the second?"),
        chat(eight, "how many are there?", max_tokens=1),
    ]


def ask(server: Server, body: Body) -> Answer:
    response = server.post(body)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice, usage = answer["choices"][0], answer["usage"]
    return _answer(choice["message"]["content"], choice["finish_reason"], usage)


def ask_for_stream(server: Server, body: Body) -> Answer:
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    text, finish_reason = "", ""
    usage: dict[str, Any] = {}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=CALL_SECONDS) as response:
        assert response.status_code == 200, response.read()
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    for event in map(json.loads, events[:-1]):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            finish_reason = choice["finish_reason"] or finish_reason
    return _answer(text, finish_reason, usage)


def ask_all(server: Server, some: list[Body], *, stream: bool = False, at_once: int = _AT_ONCE) -> list[Answer]:
    """Send several requests at a time, as clients do; return the answers in order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda body: (ask_for_stream if stream else ask)(server, body), some))


def record_of(proxy: Server, body: Body, path: str = CHAT_PATH) -> Any:
    """Send a request, and return the record that the proxy keeps of it."""
    request_id = uuid.uuid4().hex
    response = CLIENT.post(proxy.url + path, json=body, headers={"X-Request-Id": request_id}, timeout=CALL_SECONDS)
    assert response.status_code == 200, response.text
    found = httpx.Response(404)

    def has_record() -> bool:
        nonlocal found
        found = CLIENT.get(f"{proxy.url}/requests/{request_id}", timeout=CALL_SECONDS)
        return found.status_code == 200

    proxy.until(has_record)
    return found.json()


def spans_of(record: Any) -> dict[str, set[str]]:
    """Return the names of the spans that a record has, by the URL of the instance."""
    spans: dict[str, set[str]] = {}
    for span in record["spans"]:
        spans.setdefault(f"http://{span['where']}", set()).add(span["name"])
    return spans


def _answer(text: str, finish_reason: str, usage: dict[str, Any]) -> Answer:
    return Answer(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
