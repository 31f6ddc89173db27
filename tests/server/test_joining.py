"""How an instance finds its proxies: the resolver fails, answers nothing or something else, and no lease is lost by that."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from chiasm.http import lookup, trust
from chiasm.http.listen import bind
from chiasm.server import joining
from chiasm.server.joining import Joiner
from chiasm.wire import LEASE_PATH, Lease, LeaseAnswer

CERTIFICATES = Path(__file__).parents[1] / "media/certificates"
ONE, TWO, NOBODY = "127.0.0.1", "127.0.0.2", "127.0.0.3"
NEVER: list[str] = []


class Proxies:
    """Two proxies with one name. They grant leases, and leave calls that wait unanswered."""

    def __init__(self) -> None:
        self.port = 0
        self.held = {ONE: asyncio.Event(), TWO: asyncio.Event()}
        """Set when a call waits at the proxy with this address."""
        self.calls: list[str] = []
        """The addresses that were called."""
        self.granted = asyncio.Semaphore(0)
        """Released with each lease that is granted, before the answer is sent."""
        self.answers = asyncio.Event()
        """While it is clear, no answer is sent."""
        self.answers.set()
        self.left: list[str] = []
        """The addresses at which a lease was given back."""

    @property
    def url(self) -> str:
        return f"http://proxies:{self.port}"

    async def answer(self, request: web.Request) -> web.Response:
        assert request.headers["Host"] == f"proxies:{self.port}"
        assert request.transport is not None
        address = request.transport.get_extra_info("sockname")[0]
        self.calls.append(address)
        lease = msgspec.json.decode(await request.read(), type=Lease)
        if lease.leaves:
            self.left.append(address)
        elif lease.waits:
            self.held[address].set()
            await asyncio.Event().wait()
        else:
            self.granted.release()
            await self.answers.wait()
        return web.Response(body=msgspec.json.encode(LeaseAnswer(state="healthy")))


@pytest.fixture
async def proxies(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxies]:
    monkeypatch.setattr(joining, "_LOOKUP_SECONDS", 0.0)
    monkeypatch.setattr(joining, "_REFUSED_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(lookup, "LOOKUP_SECONDS", 0.01)
    proxies = Proxies()
    application = web.Application()
    application.router.add_post(LEASE_PATH, proxies.answer)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    with bind(ONE, 0) as one:
        proxies.port = one.getsockname()[1]
        with bind(TWO, proxies.port) as two:
            for listener in (one, two):
                await web.SockSite(runner, listener).start()
            yield proxies
            await runner.cleanup()


class Names:
    """A resolver that gives one answer after the other, the last one again and again; NEVER stands for none in time."""

    def __init__(self, *answers: Sequence[str] | OSError) -> None:
        self._answers = list(answers)
        self.is_asked_for_the_last = asyncio.Event()

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        if name == "nowhere":
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        answer = self._answers[0]
        if len(self._answers) > 1:
            del self._answers[0]
        else:
            self.is_asked_for_the_last.set()
        if answer is NEVER:
            await asyncio.Event().wait()
        if isinstance(answer, OSError):
            raise answer
        return answer


def lease() -> Lease:
    return Lease(url="http://127.0.0.1:1", role="pd", incarnation="1", status="ok")


async def test_a_lease_is_kept_while_dns_flaps_answers_nothing_or_fails(proxies: Proxies) -> None:
    failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    answered = asyncio.Event()

    async def names(name: str, port: int) -> Sequence[str]:
        if not answered.is_set():
            return [ONE]
        return await flapping(name, port)

    flapping = Names([], failure, NEVER, [TWO], [], [ONE], [TWO], [ONE, TWO])
    joiner = Joiner([proxies.url], None, lease, lookup=names)
    joiner.start()
    async with asyncio.timeout(60):
        await proxies.held[ONE].wait()
        answered.set()
        await flapping.is_asked_for_the_last.wait()
        await proxies.held[TWO].wait()
    assert sorted(proxies.calls) == [ONE, ONE, TWO, TWO]  # no call has been broken off and repeated
    await joiner.close()


async def test_a_lease_is_given_back_that_was_granted_without_an_answer_yet(proxies: Proxies) -> None:
    proxies.answers.clear()
    joiner = Joiner([proxies.url], None, lease, lookup=Names([ONE]))
    joiner.start()
    await asyncio.wait_for(proxies.granted.acquire(), 60)
    await joiner.close()
    assert proxies.left == [ONE]


async def test_a_name_that_nobody_answers_keeps_an_instance_from_no_other_proxy(proxies: Proxies) -> None:
    joiner = Joiner(["http://nowhere:1", proxies.url], None, lease, lookup=Names([ONE]))
    joiner.start()
    await asyncio.wait_for(proxies.held[ONE].wait(), 60)
    await joiner.close()


async def test_an_instance_joins_when_the_proxys_new_authority_is_trusted_at_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called = asyncio.Semaphore(0)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATES / "good.pem", CERTIFICATES / "key.pem")
    context.sni_callback = lambda *_: called.release()
    trusted = tmp_path / "authorities.pem"
    trusted.write_bytes((CERTIFICATES / "self_signed.pem").read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setattr(trust, "_KEPT_SECONDS", 0.0)
    joined = asyncio.Event()

    async def grant(request: web.Request) -> web.Response:
        joined.set()
        return web.Response(body=msgspec.json.encode(LeaseAnswer(state="healthy")))

    application = web.Application()
    application.router.add_post(LEASE_PATH, grant)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0)
    await runner.setup()
    with bind(ONE, 0) as listener:
        await web.SockSite(runner, listener, ssl_context=context).start()
        url = f"https://images.example:{listener.getsockname()[1]}"
        joiner = Joiner([url], None, lease, lookup=Names([ONE]))
        joiner.start()
        async with asyncio.timeout(60):
            for _ in range(2):  # it calls again because the first call has failed
                await called.acquire()
            trusted.write_bytes((CERTIFICATES / "authority.pem").read_bytes())
            await joined.wait()
        await joiner.close()
        await runner.cleanup()


async def test_an_instance_joins_when_dns_knows_the_proxy_at_last(
    proxies: Proxies, caplog: pytest.LogCaptureFixture
) -> None:
    joiner = Joiner([proxies.url], None, lease, lookup=Names([], [], [], [ONE]))
    joiner.start()
    await asyncio.wait_for(proxies.held[ONE].wait(), 60)
    await joiner.close()
    assert caplog.text.count("is not found: Its name has no address.") == 1


async def test_an_address_without_a_proxy_is_forgotten_when_dns_names_it_no_more(proxies: Proxies) -> None:
    names = Names([NOBODY], [], [ONE])
    joiner = Joiner([proxies.url], None, lease, lookup=names)
    joiner.start()
    await asyncio.wait_for(proxies.held[ONE].wait(), 60)
    assert [address for _, address in joiner._lines] == [ONE]
    await joiner.close()
