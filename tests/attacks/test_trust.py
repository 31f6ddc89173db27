"""What somebody may do who has no right to it, or leaves when it costs most; a good client beside it is answered rightly."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from chiasm.wire import KV_RELEASE_PATH, Role
from tests.integration.conftest import Service, chat, checkpoint, run, sample_image

__all__ = ["checkpoint"]  # a fixture

LEAVING = 120
"""Clients; what they leave behind would fill P's cache many times."""
IMAGES = 8
"""Of which each of them asks about one."""
LEASE_SECONDS = 600.0
"""Longer than any test may take."""


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    """Encoder, prefill and decode; leases don't end by themselves while a test runs."""
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
    """They have names that nobody can guess; the ids of requests are no such names."""
    (prefill,) = service.deployment.urls(Role.PREFILL)
    answer = httpx.post(
        f"{prefill}/v1/chat/completions",
        json=chat("hello") | {"kv_transfer_params": {"do_remote_decode": True, "continues": True, "lease": "s3cret"}},
        headers={"X-Request-Id": "mine"},
        timeout=60,
    )
    handle = answer.json()["kv_transfer_params"]
    assert "lease" not in handle
    guesses = ["mine", handle["remote_request_id"], handle["remote_engine_id"], handle["digest"], ""]
    assert httpx.post(prefill + KV_RELEASE_PATH, json={"leases": guesses}, timeout=60).status_code == 204
    (decode,) = service.deployment.urls(Role.DECODE)
    whole = httpx.post(f"{decode}/v1/chat/completions", json=chat("hello") | {"kv_transfer_params": handle}, timeout=60)
    assert whole.json()["choices"][0]["message"]["content"] == service.answer(chat("hello"))


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
