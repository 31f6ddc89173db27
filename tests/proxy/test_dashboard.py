"""The dashboard, in a real browser."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from .conftest import Front, Start, ask, image, image_bytes, listen
from .instances import FakeInstance, Received
from .test_records import record_of_one_image

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")

KEY = "s3cret" * 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="There is no Chromium here: apt-get install chromium.")
HOSTILE = "<img src=x onerror=document.title='owned'>"


class Tab:
    """A page of a browser, with what it complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: self.faults.append("dialog"))


@pytest.fixture
async def tab() -> AsyncIterator[Tab]:
    """The width is that of a phone."""
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield Tab(await browser.new_page(viewport={"width": 390, "height": 844}))
        await browser.close()


async def hostile(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as a PD whose values look like HTML."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Server-Timing": "queue;dur=1"})
    await response.prepare(request)
    await response.write(
        b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\ndata: [DONE]\n\n' % HOSTILE.encode()
    )
    return response


async def look(front: Front, tab: Tab) -> None:
    await tab.page.goto(f"{front.url}/dashboard")
    await tab.page.wait_for_selector(".instance")


@needs_browser
async def test_it_shows_the_fleet_and_requests_on_a_phone(start: Start, tab: Tab, tmp_path: Path) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.answer = hostile
    front = await start([encoder, pd])
    await listen(front, ask(HOSTILE, image(image_bytes()), stream=True))
    await look(front, tab)
    page = tab.page
    assert await page.locator(".instance").count() == 2
    await page.locator(".request summary").first.click()
    assert await page.locator(".waterfall .bar").count() >= 3
    assert await page.locator(".waterfall .name.critical").count() >= 1
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, f"The page is {width} pixels wide."

    (tmp_path / "image.png").write_bytes(image_bytes("blue"))
    await page.set_input_files("#file", str(tmp_path / "image.png"))
    await page.fill("#question", "what?")
    await page.click("#send")
    await page.wait_for_selector("#send:not([disabled])")
    assert await page.text_content("#answer") == HOSTILE
    assert (await page.title()) == "chiasm"
    assert b"what?" in pd.received[-1].body
    assert encoder.received[-1].identifiers
    await page.locator(".request").nth(1).wait_for()
    assert tab.faults == []


@needs_browser
async def test_with_an_admin_key_it_asks_for_the_key(start: Start, tab: Tab) -> None:
    front = await start([FakeInstance("pd")], admin_key=KEY)
    await tab.page.goto(f"{front.url}/dashboard")
    await tab.page.wait_for_selector("#login:not([hidden])")
    await tab.page.fill("#key", KEY)
    await tab.page.click("#login button")
    await tab.page.wait_for_selector(".instance")
    assert await tab.page.locator("#login").is_hidden()


async def test_nothing_but_its_own_script_may_run_on_it(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    page = await front.get("/dashboard")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert all(
        name not in page.body
        for name in (b"innerHTML", b"outerHTML", b"insertAdjacentHTML", b"document.write", b"//cdn")
    )
    through_proxy = await front.get("/dashboard", **{"X-Forwarded-For": "192.0.2.1"})
    assert through_proxy.status == 401


@needs_browser
async def test_what_begins_after_the_first_token_is_listed_without_a_bar(start: Start, tab: Tab) -> None:
    front = await start([FakeInstance("pd")])
    front.service.records.keep(record_of_one_image())
    await look(front, tab)
    await tab.page.locator(".request summary").click()
    names = await tab.page.locator(".waterfall .name").all_text_contents()
    assert names[-1] == "decode 1.11\u00a0s"
    bars = [await lane.locator(".bar").count() for lane in await tab.page.locator(".waterfall .lane").all()]
    assert bars == [1] * (len(names) - 1) + [0]


@needs_browser
async def test_of_requests_with_one_id_only_the_one_that_was_opened_stays_open(start: Start, tab: Tab) -> None:
    front = await start([FakeInstance("pd")])
    for arrived in (1.0, 2.0):
        front.service.records.keep(dataclasses.replace(record_of_one_image(), arrived=arrived))
    await look(front, tab)
    await tab.page.uncheck("#live")  # which shows them once more
    await tab.page.locator(".request summary").first.click()
    await tab.page.evaluate("refresh()")
    assert [await one.get_attribute("open") for one in await tab.page.locator(".request").all()] == ["", None]


@needs_browser
async def test_long_names_fit_on_a_phone_and_hide_no_time(start: Start, tab: Tab) -> None:
    front = await start([FakeInstance("pd", model="/checkpoints/" + "Name" * 50)])
    front.service.records.keep(record_of_one_image(request_id="x" * 128))
    await look(front, tab)
    await tab.page.locator(".request summary").click()
    assert await tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    names = await tab.page.locator(".waterfall .name").all()
    assert [await one.evaluate("name => name.scrollWidth <= name.clientWidth") for one in names] == [True] * len(names)
