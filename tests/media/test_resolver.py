"""The resolver of media: what dead names cost."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from chiasm.media.resolver import MediaResolver

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))]


class NameService:
    """Answers names at once, except for those that begin with "dead": these fail when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gives_up = threading.Event()

    def __call__(self, host: str, *rest: Any, **more: Any) -> Any:
        self.asked.append(host)
        if host.startswith("dead"):
            self.gives_up.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "Nobody answers.")
        return FOUND


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> NameService:
    made = NameService()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


@pytest.fixture
async def resolve(service: NameService) -> AsyncIterator[Callable[[str], Any]]:
    resolver = MediaResolver(4)
    yield resolver.resolve
    service.gives_up.set()
    await resolver.close()


async def test_a_name_leads_to_its_addresses(resolve: Callable[[str], Any]) -> None:
    (found,) = await resolve("good.example")
    assert (found["host"], found["family"]) == ("192.0.2.1", socket.AF_INET)


async def test_dead_names_take_no_thread_of_the_event_loop(resolve: Callable[[str], Any], service: NameService) -> None:
    waiting = [asyncio.ensure_future(resolve(f"dead{n}.example")) for n in range(50)]
    assert await asyncio.get_running_loop().getaddrinfo("instance.example", 80) == FOUND
    service.gives_up.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, socket.gaierror) for one in results)


async def test_one_dead_name_takes_one_thread(resolve: Callable[[str], Any], service: NameService) -> None:
    waiting = [asyncio.ensure_future(resolve("dead.example")) for _ in range(50)]
    assert await resolve("good.example")
    service.gives_up.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert service.asked.count("dead.example") == 1


async def test_a_name_that_failed_is_not_looked_up_again_at_once(
    resolve: Callable[[str], Any], service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiasm.media.resolver._FAILURE_SECONDS", 3600.0)
    service.gives_up.set()
    for _ in range(3):
        with pytest.raises(socket.gaierror):
            await resolve("dead.example")
    assert service.asked.count("dead.example") == 1


async def test_a_fetch_that_is_given_up_ends_no_lookup_of_others(
    resolve: Callable[[str], Any], service: NameService
) -> None:
    given_up, kept = (asyncio.ensure_future(resolve("dead.example")) for _ in range(2))
    await asyncio.sleep(0)
    given_up.cancel()
    service.gives_up.set()
    with pytest.raises(socket.gaierror):
        await kept
