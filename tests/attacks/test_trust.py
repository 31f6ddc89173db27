"""What somebody may do who has no right to it, or leaves when it costs most; a good client beside it is answered rightly."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
import msgspec
import pytest

from chiasm.errors import Code
from chiasm.fleet_key import FleetKey, Handshake, Side, make_fleet_key, make_nonce
from chiasm.kv_transfer.messages import PROTOCOL_VERSION
from chiasm.media import identifier
from chiasm.transfer.greeting import Challenge, Hello, Unwelcome
from chiasm.wire import AWAITED_PATH, KV_RELEASE_PATH, LOST_PATH, PLACES_PATH, Role
from tests.fleet import Signed
from tests.integration.conftest import Service, chat, checkpoint, run, sample_image
from tests.launch.waiting import eventually

__all__ = ["checkpoint"]  # a fixture

T = TypeVar("T", Challenge, Unwelcome)
LEAVING = 120
"""Clients; what they leave behind would fill P's cache many times."""
IMAGES = 8
"""Of which each of them asks about one."""
LEASE_SECONDS = 600.0
"""Longer than any test may take."""


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    """One encoder, one prefill and one decode instance, whose leases don't end by themselves while a test runs."""
    roles = {Role.ENCODER: 1, Role.PREFILL: 1, Role.DECODE: 1}
    yield from run(checkpoint, roles, fields={"kv_lease_seconds": LEASE_SECONDS})


def leave_at_the_first_token(url: str, number: int) -> None:
    about = sample_image(number % IMAGES)
    body = json.dumps(chat(about, f"{number} " + "word " * 20, stream=True, max_tokens=64)).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
        fields = f"Host: {address.netloc}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}"
        connection.sendall(head.encode() + body)
        received = b""
        while b"data: " not in received:
            piece = connection.recv(4096)
            assert piece, received
            received += piece


def test_clients_that_leave_at_the_first_token_leave_no_kv_behind(service: Service) -> None:
    good = chat(sample_image(0), "hello")
    expected = service.answer(good)
    with ThreadPoolExecutor(LEAVING) as pool:
        leaving = [pool.submit(leave_at_the_first_token, service.url, number) for number in range(LEAVING)]
        assert service.answer(good) == expected
        for each in leaving:
            each.result()
    assert service.answer(good) == expected
    service.wait_until_blocks_are_free()
    assert service.metric(Role.PREFILL, "chiasm_kv_leases_expired_total") == 0


def test_a_stranger_cannot_end_the_leases_of_others(service: Service) -> None:
    """Only the fleet can end one, by a name that nobody can guess; the ids of requests are no such names."""
    (prefill,) = service.deployment.urls(Role.PREFILL)
    answer = httpx.post(
        f"{prefill}/v1/chat/completions",
        json=chat("hello") | {"kv_transfer_params": {"do_remote_decode": True, "continues": True, "lease": "s3cret"}},
        headers={"X-Request-Id": "mine"},
        auth=service.signed,
        timeout=60,
    )
    handle = answer.json()["kv_transfer_params"]
    assert "lease" not in handle
    guesses = ["mine", handle["remote_request_id"], handle["remote_engine_id"], handle["digest"], ""]
    url, body = prefill + KV_RELEASE_PATH, {"leases": guesses}
    assert httpx.post(url, json=body, timeout=60).json()["error"]["code"] == Code.FLEET_KEY_NEEDED
    assert httpx.post(url, json=body, auth=service.signed, timeout=60).status_code == 204
    (decode,) = service.deployment.urls(Role.DECODE)
    url, body = f"{decode}/v1/chat/completions", chat("hello") | {"kv_transfer_params": handle}
    assert httpx.post(url, json=body, timeout=60).json()["error"]["code"] == Code.FLEET_KEY_NEEDED
    whole = httpx.post(url, json=body, auth=service.signed, timeout=60)
    assert whole.json()["choices"][0]["message"]["content"] == service.answer(chat("hello"))


def test_a_stranger_cannot_have_one_image_answer_as_another(service: Service) -> None:
    image, other = sample_image(40), sample_image(41)
    question = chat(other, "What is this?")
    (encoder,) = service.deployment.urls(Role.ENCODER)
    fingerprint = httpx.get(f"{encoder}/health", timeout=60).json()["fingerprint"]
    data = base64.b64decode(other["image_url"]["url"].partition(",")[2])
    name = identifier(data, fingerprint=fingerprint)  # what the proxy will call the other image
    url, body = f"{encoder}/v1/chat/completions", chat(image | {"uuid": name}) | {"stream": False}
    for auth in (None, Signed(FleetKey([make_fleet_key()]))):
        before = service.metric(Role.ENCODER, "chiasm_images_encoded_total")
        refused = httpx.post(url, json=body, auth=auth, timeout=60)
        assert refused.status_code == 403, refused.text
        assert service.metric(Role.ENCODER, "chiasm_images_encoded_total") == before
    encoded = httpx.post(url, json=chat(image) | {"stream": False}, timeout=60).json()["ec_transfer_params"]
    assert name not in encoded  # anybody may have an image encoded, under the name that its content gives it
    before = service.metric(Role.ENCODER, "chiasm_images_encoded_total")
    service.answer(question)
    # The image was not there yet; it is counted when it is published, which may be after the answer.
    assert eventually(lambda: service.metric(Role.ENCODER, "chiasm_images_encoded_total") == before + 1)
    assert httpx.post(url, json=body, auth=service.signed, timeout=60).status_code == 200


@pytest.mark.parametrize("path", [AWAITED_PATH, LOST_PATH, PLACES_PATH])
def test_a_stranger_learns_and_says_nothing_about_embeddings(service: Service, path: str) -> None:
    (prefill,) = service.deployment.urls(Role.PREFILL)
    method = "GET" if path == AWAITED_PATH else "POST"
    refused = httpx.request(method, prefill + path, json={}, timeout=60)
    assert refused.json()["error"]["code"] == Code.FLEET_KEY_NEEDED
    answered = httpx.request(method, prefill + path, json={}, auth=service.signed, timeout=60)
    assert answered.status_code in (200, 204), answered.text


def test_a_stranger_learns_nothing_at_the_port_for_kv(service: Service) -> None:
    """Neither what a greeting must contain, nor whether what it said was right."""
    handle = {"do_remote_decode": True, "continues": True}
    (prefill,) = service.deployment.urls(Role.PREFILL)
    body = chat("hello", max_tokens=2) | {"kv_transfer_params": handle}
    answer = httpx.post(f"{prefill}/v1/chat/completions", json=body, auth=service.signed, timeout=60)
    given = answer.json()["kv_transfer_params"]
    heard = {
        greet(given["remote_host"], given["remote_port"], engine_id, key)
        for engine_id in (given["remote_engine_id"], "another")
        for key in (None, FleetKey([make_fleet_key()]))
    }
    (reason,) = heard
    assert given["remote_engine_id"] not in reason
    assert "fleet key" in reason


def greet(host: str, port: int, engine_id: str, key: FleetKey | None) -> str:
    """Return why a prefill instance doesn't welcome who greets it with this key."""
    with socket.create_connection((host, port), timeout=20) as connection, connection.makefile("rb") as received:

        def hear(kind: type[T]) -> T:
            return msgspec.msgpack.decode(received.read(int.from_bytes(received.read(4))), type=kind)

        handshake = Handshake(
            protocol="kv",
            version=PROTOCOL_VERSION,
            engine_id=engine_id,
            caller_nonce=make_nonce(),
            listener_nonce=hear(Challenge).nonce,
        )
        proof = key.prove(Side.CALLER, handshake) if key else b""
        hello = msgspec.msgpack.encode(Hello("kv", PROTOCOL_VERSION, engine_id, handshake.caller_nonce, proof))
        connection.sendall(len(hello).to_bytes(4) + hello)
        return hear(Unwelcome).reason


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain", "Host": "evil.example"}, 415),
        ({"Content-Type": "text/plain", "Origin": "https://evil.example", "Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("role", [None, Role.PREFILL])
def test_a_web_page_cannot_use_what_listens_on_this_machine(
    service: Service, role: Role | None, headers: dict[str, str], status: int
) -> None:
    url = service.url if role is None else service.deployment.urls(role)[0]
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(chat("hello")), headers=headers, timeout=60)
    assert answer.status_code == status
