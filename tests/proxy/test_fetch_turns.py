"""The images of one request are fetched a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp import web

from chiasm.media import Fetcher, MediaConfig
from chiasm.proxy.media import read_items
from chiasm.proxy.request import MediaPart
from tests.media import hostile


class Site:
    """Answers when two fetches wait for it."""

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0
        self.both = asyncio.Event()
        self.url = ""

    async def image(self, request: web.Request) -> web.Response:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        if self.waiting == 2:
            self.both.set()
        await self.both.wait()
        self.waiting -= 1
        return web.Response(body=hostile.encode("PNG"))


class Unbounded:
    """Lets a request hold any number of bytes."""

    def hold(self, size_bytes: int) -> None:
        pass

    def give_back(self, size_bytes: int) -> None:
        pass


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    application = web.Application()
    application.router.add_get("/{name}", site.image)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield site
    await runner.cleanup()


async def test_a_request_fetches_no_more_at_a_time_than_its_share(site: Site) -> None:
    fetcher = Fetcher(MediaConfig(allowed_media_networks=("127.0.0.0/8",), max_fetches_per_request=2))
    parts = [MediaPart(f"{site.url}/{n}".encode(), has_uuid=False, written=None) for n in range(8)]
    with ThreadPoolExecutor(1) as threads:
        found = await read_items(
            parts, fetcher=fetcher, executor=threads, fingerprint="f" * 64, salt="", holder=Unbounded()
        )
    await fetcher.close()
    assert len(found.items) == 8
    assert site.most == 2
