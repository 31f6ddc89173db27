"""Looking names up: what is an answer, and what is none."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from chiasm.http.lookup import addresses_of, resolve


def fail(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the system's resolver fail."""

    def getaddrinfo(*arguments: object, **options: object) -> list[object]:
        raise socket.gaierror(number, "failed")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_a_name_without_addresses_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, socket.EAI_NONAME)
    assert await addresses_of("encoders", 8001) == []


async def test_a_resolver_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, socket.EAI_AGAIN)
    with pytest.raises(OSError, match="failed"):
        await addresses_of("encoders", 8001)


@pytest.mark.parametrize("name", ["a..b", "a" * 64])
async def test_what_can_be_no_name_is_one_clear_error(name: str) -> None:
    with pytest.raises(OSError, match="is not the name of a host"):
        await addresses_of(name, 8001)


async def test_a_name_that_is_not_answered_is_looked_up_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    asked: list[str] = []
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 8001))

    def getaddrinfo(name: str, *_: object, **__: object) -> list[object]:
        asked.append(name)
        answers.wait()
        return [found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await resolve("dead", 8001)
    last = asyncio.create_task(resolve("dead", 8001))
    await asyncio.sleep(0)
    answers.set()
    assert (await last, asked) == ([found], ["dead"])
    assert (await resolve("dead", 8001), asked) == ([found], ["dead", "dead"])
