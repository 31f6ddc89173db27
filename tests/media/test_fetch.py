"""URLs are fetched within the limits and only from allowed places; tested with real servers on real sockets."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from chiasm.errors import ConfigurationError, MediaError
from chiasm.media import Fetcher, MediaConfig
from chiasm.media.addresses import AddressGuard
from chiasm.media.url import MAX_URL_CHARACTERS, InvalidURLError, follow, parse_http_url
from chiasm.tasks import end_tasks

LOOPBACK = ("127.0.0.0/8",)
TOLERANT: dict[str, Any] = {
    "allowed_media_networks": LOOPBACK,
    **dict.fromkeys(("connect_timeout_seconds", "read_timeout_seconds", "fetch_timeout_seconds"), 60.0),
}
"""Sites of this machine may be fetched from, however slow it is."""
IMAGE = b"\x89PNG bytes of an image"
CERTIFICATES = Path(__file__).parent / "certificates"
"""Made for these tests only; ``authority`` has signed all but ``self_signed``, and ``key`` is the key of all but itself."""


class Names(AbstractResolver):
    """Resolves names to the given lists of addresses, one after the other; the last one is repeated."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if not answer:
            raise OSError("no such name")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in answer
        ]

    async def close(self) -> None:
        pass


class Site:
    """A web server with one route for each kind of response."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.port = 0
        self.ended = asyncio.Event()
        self.body = b""
        self.encoding = ""
        self.location = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def image(self, request: web.Request) -> web.Response:
        return web.Response(body=IMAGE)

    async def missing(self, request: web.Request) -> web.Response:
        return web.Response(status=404, text="a secret of the server")

    async def broken(self, request: web.Request) -> web.Response:
        return web.Response(status=500)

    async def slow(self, request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(4096))
        finally:
            self.ended.set()

    async def trickle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x")
        await asyncio.Event().wait()
        return response

    async def large(self, request: web.Request) -> web.Response:
        return web.Response(body=bytes(5000))

    async def packed(self, request: web.Request) -> web.Response:
        return web.Response(body=self.body, headers={"Content-Encoding": self.encoding})

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text=" <!DOCTYPE html><html>Log in!</html>", content_type="image/png")

    async def status(self, request: web.Request) -> web.Response:
        return web.Response(status=int(request.query["is"]), text="a secret of the server")

    async def moved(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": self.location})

    async def any(self, request: web.Request) -> web.Response:
        return web.Response(body=IMAGE)

    async def redirect(self, request: web.Request) -> web.Response:
        return web.Response(status=int(request.query.get("status", 302)), headers={"Location": request.query["to"]})

    async def nowhere(self, request: web.Request) -> web.Response:
        return web.Response(status=302)

    async def cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x")
        assert request.transport is not None
        request.transport.abort()
        return response


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()

    @web.middleware
    async def note(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        site.requests.append(request)
        return await handler(request)

    application = web.Application(middlewares=[note])
    for name in (
        "image",
        "missing",
        "broken",
        "slow",
        "endless",
        "trickle",
        "large",
        "packed",
        "page",
        "status",
        "moved",
        "redirect",
        "nowhere",
        "cut",
    ):
        application.router.add_get(f"/{name}", getattr(site, name))
    application.router.add_get("/any/{path:.*}", site.any)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
    await runner.setup()
    tcp = web.TCPSite(runner, "127.0.0.1", 0)
    await tcp.start()
    site.port = runner.addresses[0][1]
    yield site
    await runner.cleanup()


Make = Callable[..., Fetcher]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    fetchers: list[Fetcher] = []

    def make_one(
        resolver: AbstractResolver | None = None, ssl_context: ssl.SSLContext | None = None, **config: Any
    ) -> Fetcher:
        media = MediaConfig(**(TOLERANT | config))
        fetchers.append(Fetcher(media, resolver=resolver, ssl_context=ssl_context))
        return fetchers[-1]

    yield make_one
    for fetcher in fetchers:
        await fetcher.close()


async def refused(fetcher: Fetcher, url: str, code: str) -> str:
    with pytest.raises(MediaError) as caught:
        await fetcher.fetch(url)
    assert caught.value.status == 400
    assert caught.value.code == code, caught.value
    return str(caught.value)


# ---- http(s): URLs ---------------------------------------------------------------------------------------------------


async def test_an_image_is_fetched(make: Make, site: Site) -> None:
    assert await make().fetch(f"{site.url}/image") == IMAGE
    headers = site.requests[0].headers
    assert headers["Accept-Encoding"] == "identity"
    assert "Cookie" not in headers


async def test_a_name_is_resolved_once_and_its_address_is_used(make: Make, site: Site) -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    assert await make(names).fetch(f"http://images.example:{site.port}/image") == IMAGE
    assert names.asked == ["images.example"]
    assert site.requests[0].host == f"images.example:{site.port}"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fec0::1]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:db8::1]",
        "user:password@127.0.0.1",
        "example.com@127.0.0.1",
    ],
)
async def test_addresses_that_are_not_public_are_refused(make: Make, host: str) -> None:
    message = await refused(make(allowed_media_networks=()), f"http://{host}:9/x", "media_address_not_allowed")
    assert "password" not in message


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "017700000001", "127.1", "0", "0x7f.1", "127.0.0.1.", "①②⑦.⓪.⓪.①"]
)
async def test_unusual_notations_of_an_address_are_refused(make: Make, site: Site, host: str) -> None:
    with pytest.raises(MediaError):
        await make(allowed_media_networks=()).fetch(f"http://{host}:{site.port}/image")
    assert not site.requests


async def test_a_name_with_a_private_address_is_refused(make: Make, site: Site) -> None:
    url = f"http://images.example:{site.port}/image"
    message = await refused(make(Names(["127.0.0.1"]), allowed_media_networks=()), url, "media_address_not_allowed")
    assert "127.0.0.1" not in message
    await refused(make(Names(["::ffff:127.0.0.1"]), allowed_media_networks=()), url, "media_address_not_allowed")
    assert not site.requests


async def test_a_name_whose_address_changes_between_hops_is_refused(make: Make, site: Site) -> None:
    """The name has an allowed address at first and a private one when it is resolved again."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    to = f"http://other.example:{site.port}/image"
    url = f"http://images.example:{site.port}/redirect?to={to}"
    await refused(make(names, allowed_media_networks=("127.0.0.1/32",)), url, "media_address_not_allowed")
    assert [request.path for request in site.requests] == ["/redirect"]


async def test_only_allowed_addresses_of_a_name_are_tried(make: Make, site: Site) -> None:
    names = Names(["10.0.0.1", "127.0.0.1"])
    fetcher = make(names, allowed_media_networks=("127.0.0.1/32",))
    assert await fetcher.fetch(f"http://images.example:{site.port}/image") == IMAGE


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(make: Make, site: Site, status: int) -> None:
    assert await make().fetch(f"{site.url}/redirect?status={status}&to=/image") == IMAGE


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("http://169.254.169.254/latest/meta-data", "media_address_not_allowed"),
        ("http://[::1]/", "media_address_not_allowed"),
        ("file:///etc/passwd", "invalid_url"),
        ("data:image/png;base64,QUJD", "invalid_url"),
        ("ftp://127.0.0.1/", "invalid_url"),
        ("http://[bad", "invalid_url"),
    ],
)
async def test_a_redirect_is_checked_like_a_url(make: Make, site: Site, to: str, code: str) -> None:
    message = await refused(make(), f"{site.url}/redirect?to={to}", code)
    assert to not in message


async def test_the_number_of_redirects_is_limited(make: Make, site: Site) -> None:
    url = f"{site.url}/redirect?to=/redirect?to=/image"
    assert await make(max_redirects=2).fetch(url.replace("/image", "%2Fimage")) == IMAGE
    loop = f"{site.url}/redirect?to={site.url}/nowhere"
    await refused(make(max_redirects=0), loop, "media_unreachable")
    await refused(make(), f"{site.url}/nowhere", "media_unreachable")


async def test_credentials_are_not_sent_to_the_next_host(make: Make, site: Site) -> None:
    await make().fetch(f"http://user:password@127.0.0.1:{site.port}/redirect?to=/image")
    assert "Authorization" in site.requests[0].headers
    assert "Authorization" not in site.requests[1].headers


async def test_the_error_for_another_status_reveals_nothing_of_the_body_or_query(make: Make, site: Site) -> None:
    message = await refused(make(), f"{site.url}/missing?token=abc", "media_unreachable")
    assert "404" in message
    assert "secret" not in message
    assert "token" not in message
    assert "500" in await refused(make(), f"{site.url}/broken", "media_unreachable")


async def test_an_unreachable_host_is_an_error(make: Make, site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        assert "refused the connection" in await refused(make(), url, "media_unreachable")
    assert "name service" in await refused(make(Names([])), "http://images.example/", "media_unreachable")


@pytest.mark.parametrize("path", ["slow", "trickle"])
async def test_a_slow_response_ends_with_the_timeout(make: Make, site: Site, path: str) -> None:
    await refused(make(fetch_timeout_seconds=0.2), f"{site.url}/{path}", "media_timeout")


async def test_waiting_for_other_fetches_ends_with_the_timeout(make: Make, site: Site) -> None:
    fetcher = make(fetch_timeout_seconds=0.5, max_concurrent_fetches=1)
    await asyncio.gather(*(refused(fetcher, f"{site.url}/slow", "media_timeout") for _ in range(3)))
    fetcher.config = replace(fetcher.config, fetch_timeout_seconds=60.0)
    assert await fetcher.fetch(f"{site.url}/image") == IMAGE


@pytest.mark.parametrize("path", ["slow", "trickle"])
async def test_a_site_that_falls_silent_ends_the_fetch(make: Make, site: Site, path: str) -> None:
    await refused(make(read_timeout_seconds=0.2), f"{site.url}/{path}", "media_timeout")


async def test_a_silent_host_leaves_places_to_others(make: Make, site: Site) -> None:
    names = Names(["127.0.0.1"])
    fetcher = make(names, max_concurrent_fetches=2, max_fetches_per_host=1)
    waiting = [asyncio.ensure_future(fetcher.fetch(f"http://silent.example:{site.port}/slow")) for _ in range(8)]
    while not site.requests:  # noqa: ASYNC110 - the site has no event
        await asyncio.sleep(0.002)
    assert await fetcher.fetch(f"http://good.example:{site.port}/image") == IMAGE
    assert not any(one.done() for one in waiting)
    await end_tasks(*waiting)


async def test_redirects_to_a_silent_host_leave_places_to_others(make: Make, site: Site) -> None:
    fetcher = make(Names(["127.0.0.1"]), max_concurrent_fetches=2, max_fetches_per_host=1)
    target = f"http://silent.example:{site.port}/slow"
    waiting = [
        asyncio.ensure_future(fetcher.fetch(f"http://name{number}.example:{site.port}/redirect?to={target}"))
        for number in range(8)
    ]
    while len(site.requests) < 9:  # noqa: ASYNC110 - the site has no event
        await asyncio.sleep(0.002)
    assert await fetcher.fetch(f"http://good.example:{site.port}/image") == IMAGE
    assert not any(one.done() for one in waiting)
    await end_tasks(*waiting)


async def test_an_endless_response_ends_at_the_size_limit(make: Make, site: Site) -> None:
    await refused(make(max_media_bytes=100_000), f"{site.url}/endless", "media_too_large")
    await asyncio.wait_for(site.ended.wait(), 60)


async def test_a_content_length_above_the_limit_ends_the_fetch_before_the_body(make: Make, site: Site) -> None:
    assert len(await make(max_media_bytes=5000).fetch(f"{site.url}/large")) == 5000
    await refused(make(max_media_bytes=4999), f"{site.url}/large", "media_too_large")


# ---- what is sent ----------------------------------------------------------------------------------------------------


def deflated(data: bytes, *, with_header: bool) -> bytes:
    packer = zlib.compressobj(wbits=15 if with_header else -15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(IMAGE)),
        ("X-GZIP", gzip.compress(IMAGE)),
        ("gzip", gzip.compress(IMAGE[:5]) + gzip.compress(IMAGE[5:])),
        ("gzip", gzip.compress(IMAGE) + b"\0\0"),
        ("deflate", deflated(IMAGE, with_header=True)),
        ("deflate", deflated(IMAGE, with_header=False)),
        ("identity", IMAGE),
    ],
)
async def test_content_that_is_compressed_unasked_is_read(make: Make, site: Site, encoding: str, body: bytes) -> None:
    site.encoding, site.body = encoding, body
    assert await make().fetch(f"{site.url}/packed") == IMAGE


async def test_the_size_limit_counts_decompressed_bytes(make: Make, site: Site) -> None:
    site.encoding = "gzip"
    site.body = gzip.compress(bytes(100_000))
    assert len(await make(max_media_bytes=100_000).fetch(f"{site.url}/packed")) == 100_000
    for limit in (99_999, len(site.body)):
        await refused(make(max_media_bytes=limit), f"{site.url}/packed", "media_too_large")


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(IMAGE)[:-9]),
        ("gzip", IMAGE),
        ("gzip", b""),
        ("gzip", gzip.compress(b"") * 1000),
        ("deflate", b"\xff" * 100),
        ("br", b"x"),
        ("gzip, gzip", gzip.compress(gzip.compress(IMAGE))),
    ],
)
async def test_content_that_cannot_be_decompressed_is_refused(
    make: Make, site: Site, encoding: str, body: bytes
) -> None:
    site.encoding, site.body = encoding, body
    assert encoding in await refused(make(), f"{site.url}/packed", "media_unreachable")


async def test_a_web_page_in_place_of_an_image_is_called_so(make: Make, site: Site) -> None:
    assert "is a web page, not an image" in await refused(make(), f"{site.url}/page", "invalid_image")


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "login"),
        (403, "expired"),
        (404, "nothing"),
        (410, "removed"),
        (429, "later"),
        (503, "fault"),
        (204, "no image"),
    ],
)
async def test_each_status_says_what_happened(make: Make, site: Site, status: int, says: str) -> None:
    message = await refused(make(), f"{site.url}/status?is={status}", "media_unreachable")
    assert str(status) in message
    assert says in message
    assert "secret" not in message


async def test_a_truncated_response_is_an_error(make: Make, site: Site) -> None:
    await refused(make(), f"{site.url}/cut", "media_unreachable")


# ---- URLs, byte for byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("a%40b%27c%3Ad%2Ce.png?K=a%2Fb%2Bc%3D&x=%7E~", None),
        ("a.png?X-Amz-Credential=AK%2F20260101%2Fus&X-Amz-Signature=ab12", None),
        ("a.png?Policy=eyJ_&Signature=a~b-c__&Key-Pair-Id=K1", None),
        ("a'b(c)*!$&+,;=:@.png?a'b(c)*!$&+,;=:@/?", None),
        ("%e4%E4%zz%.png?%", None),
        ("a//b/./c/../d.png?a=1&a=2&b", None),
        ("x%20y+z?x%20y+z", None),
        ("a b.png?c d", "a%20b.png?c%20d"),
        ("bücher.png?q=ü", "b%C3%BCcher.png?q=%C3%BC"),
        ('a"<>`{}^\\b', "a%22%3C%3E%60%7B%7D%5E%5Cb"),
        ("a\x01b?\x7f", "a%01b?%7F"),
        ("a\tb\r\nc", "abc"),
        ("a.png?x=1#part", "a.png?x=1"),
    ],
)
async def test_urls_go_out_byte_for_byte(make: Make, site: Site, sent: str, arrives: str | None) -> None:
    expected = f"/any/{sent if arrives is None else arrives}"
    assert await make().fetch(f"{site.url}/any/{sent}") == IMAGE
    assert await make().fetch(f"http://u%40:p@127.0.0.1:{site.port}/any/{sent}") == IMAGE
    assert site.requests[-1].headers["Authorization"] == "Basic dUA6cA=="  # u@:p
    site.location = f"/any/{sent}"
    if not set(sent) & set("\r\n\x01\x7f"):  # headers can't hold these
        assert await make().fetch(f"{site.url}/moved") == IMAGE
        site.location = f"{site.url}/any/{sent}"
        assert await make().fetch(f"http://u:p@127.0.0.1:{site.port}/moved") == IMAGE
    paths = [request.raw_path for request in site.requests if request.path != "/moved"]
    assert set(paths) == {expected}


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("http://b.example/%40?%27", "http://b.example/%40?%27"),
        ("//b.example:81/x", "https://b.example:81/x"),
        ("/x/../%2F?a=%40#f", "https://a.example:8443/x/../%2F?a=%40"),
        ("x%40y?b", "https://a.example:8443/p/x%40y?b"),
        ("../x", "https://a.example:8443/x"),
        ("../../../x", "https://a.example:8443/x"),
        ("x:y", None),
        ("./x:y", "https://a.example:8443/p/x:y"),
        ("?c=%2F", "https://a.example:8443/p/q%40?c=%2F"),
        ("#f", "https://a.example:8443/p/q%40"),
        (" /x ", "https://a.example:8443/x"),
        ("\\\\b.example/x", "https://a.example:8443/p/%5C%5Cb.example/x"),
        ("/\\b.example/x", "https://a.example:8443/%5Cb.example/x"),
        ("https:/x", None),
        ("https:x", None),
        ("//", None),
        ("///x", None),
        ("file:///etc/passwd", None),
    ],
)
def test_a_location_is_resolved_byte_for_byte(location: str, url: str | None) -> None:
    current = parse_http_url("https://user:secret@a.example:8443/p/q%40?a=1")
    if url is None:
        with pytest.raises(InvalidURLError):
            follow(current, location)
    else:
        assert str(follow(current, location)) == url


LOOPBACK_AS_IPV6 = str(IPv6Address("::ffff:127.0.0.1"))
"""Python 3.13 writes its last four bytes as IPv4 does, earlier versions in hexadecimal."""


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("HTTP://Images.Example", "images.example", 80),
        ("https://bücher.example/", "xn--bcher-kva.example", 443),
        ("http://images.example.:81/", "images.example.", 81),
        ("http://a@b.example/", "b.example", 80),
        ("http://a.example:80@b.example:81/", "b.example", 81),
        ("http://a.example@x@b.example/", "b.example", 80),
        ("http://a.example?@b.example/", "a.example", 80),
        ("http://a.example#@b.example/", "a.example", 80),
        ("http://a.example/@b.example", "a.example", 80),
        ("http://a.exam\tple\n/", "a.example", 80),
        ("http://b.example:/", "b.example", 80),
        ("http://0177.0.0.1/", "0177.0.0.1", 80),
        ("http://[::FFFF:7f00:1]:8/", LOOPBACK_AS_IPV6, 8),
        ("http://１２７.0.0.1/", "127.0.0.1", 80),
    ],
)
def test_the_host_of_a_url_is_unmistakable(url: str, host: str, port: int) -> None:
    parsed = parse_http_url(url)
    assert (parsed.raw_host, parsed.port) == (host, port)


@pytest.mark.parametrize(
    "authority",
    [
        "a.example\\@b.example",
        "a.example\\b",
        "a b",
        "a%2eexample",
        "%31%32%37.0.0.1",
        "a..example",
        ".example",
        "a\0b",
        "a.example:0",
        "a.example:65536",
        "a.example:-1",
        "a.example:8o",
        "a.example:１",
        "a:b:c",
        "::1",
        "[::1",
        "[::1]x",
        "[fe80::1%25eth0]",
        "[127.0.0.1]",
        "[a.example]",
        "a<b",
        "a|b",
        "a^b",
        "a" * 254,
        "",
        "user@",
    ],
)
def test_what_is_no_host_is_refused(authority: str) -> None:
    with pytest.raises(InvalidURLError):
        parse_http_url(f"http://{authority}/x")


async def test_the_length_of_a_url_is_bounded(make: Make, site: Site) -> None:
    message = await refused(make(), f"{site.url}/any/{'x' * MAX_URL_CHARACTERS}", "invalid_url")
    assert "data:" in message
    with pytest.raises(InvalidURLError):
        follow(parse_http_url(site.url), "/" + "x" * MAX_URL_CHARACTERS)


async def test_white_space_around_a_url_is_ignored(make: Make, site: Site) -> None:
    assert await make().fetch(f" \n{site.url}/image\r\n") == IMAGE


async def test_allowed_domains_may_be_international(make: Make, site: Site) -> None:
    for domain in ("bücher.example", "BÜCHER.example.", "xn--bcher-kva.example"):
        fetcher = make(Names(["127.0.0.1"]), allowed_media_domains=(domain,))
        assert await fetcher.fetch(f"http://bücher.example:{site.port}/image") == IMAGE
        assert await fetcher.fetch(f"http://xn--bcher-kva.example.:{site.port}/image") == IMAGE
        await refused(fetcher, f"http://bücher.example@127.0.0.1:{site.port}/image", "media_domain_not_allowed")


# ---- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def secure(site: Site) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Serves the image over TLS with a certificate of this name, and returns the URL."""
    runners: list[web.AppRunner] = []

    async def serve(name: str) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATES / f"{name}.pem", CERTIFICATES / "key.pem")
        application = web.Application()
        application.router.add_get("/image", site.image)
        runners.append(web.AppRunner(application, shutdown_timeout=0, access_log=None))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0, ssl_context=context).start()
        return f"https://images.example:{runners[-1].addresses[0][1]}/image"

    yield serve
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("certificate", "says"),
    [("self_signed", "signed by itself"), ("expired", "has expired"), ("other_host", "is for another host")],
)
async def test_a_bad_certificate_is_told_apart_from_a_bad_url(
    make: Make, site: Site, secure: Callable[[str], Awaitable[str]], certificate: str, says: str
) -> None:
    trusting = ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
    fetcher = make(Names(["127.0.0.1"]), trusting)
    assert await fetcher.fetch(await secure("good")) == IMAGE
    url = await secure(certificate)
    assert says in await refused(fetcher, url, "media_certificate_invalid")
    site.location = url
    assert says in await refused(fetcher, f"{site.url}/moved", "media_certificate_invalid")


async def test_an_unknown_authority_is_not_trusted(make: Make, secure: Callable[[str], Awaitable[str]]) -> None:
    await refused(make(Names(["127.0.0.1"])), await secure("good"), "media_certificate_invalid")


async def test_a_site_without_tls_is_called_so(make: Make, site: Site) -> None:
    url = f"https://127.0.0.1:{site.port}/image"
    assert "TLS" in await refused(make(), url, "media_unreachable")


# ---- the environment -------------------------------------------------------------------------------------------------


async def test_proxies_from_the_environment_are_not_used(
    make: Make, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert await make().fetch(f"{site.url}/image") == IMAGE


async def test_only_allowed_domains_are_contacted(make: Make, site: Site) -> None:
    fetcher = make(Names(["127.0.0.1"]), allowed_media_domains=("Images.example",))
    assert await fetcher.fetch(f"http://images.EXAMPLE:{site.port}/image") == IMAGE
    for url in (
        f"http://other.example:{site.port}/image",
        f"http://sub.images.example:{site.port}/image",
        f"http://images.example:{site.port}/redirect?to=http://other.example:{site.port}/image",
        f"http://images.example@other.example:{site.port}/image",
    ):
        await refused(fetcher, url, "media_domain_not_allowed")
    assert [request.path for request in site.requests] == ["/image", "/redirect"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://example.com/",
        "javascript:1",
        "http://",
        "http:///x",
        "http://[::1",
        "//127.0.0.1/",
        "http://a:b:c/",
    ],
)
async def test_malformed_urls_and_other_schemes_are_refused(make: Make, url: str) -> None:
    await refused(make(), url, "invalid_url")


# ---- file: URLs ------------------------------------------------------------------------------------------------------


async def test_file_urls_are_refused_unless_a_folder_is_allowed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    await refused(make(), f"file://{tmp_path}/a.png", "media_path_not_allowed")
    assert await make(allowed_local_media_path=tmp_path).fetch(f"file://{tmp_path}/a.png") == IMAGE
    assert await make(allowed_local_media_path=tmp_path).fetch(f"file://localhost{tmp_path}/%61.png") == IMAGE


async def test_files_outside_the_folder_are_refused(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "allowed"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(IMAGE)
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "a.png").write_bytes(IMAGE)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop").symlink_to(folder / "loop")
    fetcher = make(allowed_local_media_path=folder)
    for path in (
        f"{tmp_path}/secret.png",
        f"{folder}/../secret.png",
        f"{folder}/deep/%2e%2e/%2e%2e/secret.png",
        f"{folder}/link.png",
        f"{folder}-too/a.png",
        f"{folder}",
        f"{tmp_path}/there-is-no-such-file.png",
        "/etc/passwd",
    ):
        await refused(fetcher, f"file://{path}", "media_path_not_allowed")
    await refused(fetcher, f"file://{folder}/none.png", "media_unreachable")
    await refused(fetcher, f"file://{folder}/deep", "media_unreachable")
    await refused(fetcher, f"file://otherhost{folder}/none.png", "invalid_url")
    await refused(fetcher, f"file://{folder}/a%00.png", "invalid_url")
    await refused(fetcher, "file:a.png", "invalid_url")


async def test_a_link_within_the_folder_is_followed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert await make(allowed_local_media_path=tmp_path).fetch(f"file://{tmp_path}/b.png") == IMAGE


async def test_a_pipe_is_refused_without_waiting(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    await refused(make(allowed_local_media_path=tmp_path), f"file://{tmp_path}/pipe", "media_unreachable")


async def test_large_files_are_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(101))
    fetcher = make(allowed_local_media_path=tmp_path, max_media_bytes=100)
    await refused(fetcher, f"file://{tmp_path}/a.png", "media_too_large")


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_an_invalid_configuration_is_refused(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"allowed_local_media_path": tmp_path / "none"},
        {"allowed_media_networks": ("localhost",)},
        {"max_media_bytes": 0},
        {"fetch_timeout_seconds": 0},
        {"max_redirects": -1},
        {"allowed_media_domains": ("https://images.example",)},
        {"allowed_media_domains": ("images.example:80",)},
    ]
    for config in bad:
        with pytest.raises(ConfigurationError):
            MediaConfig(**config)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_permitted(address: str) -> None:
    assert AddressGuard().permits(address)


def test_only_addresses_in_the_allowed_networks_are_permitted() -> None:
    guard = AddressGuard(("10.0.0.0/8", "fd00::/8"))
    assert [guard.permits(one) for one in ("10.9.9.9", "fd00::1", "11.0.0.1", "192.168.0.1", "fc00::1", "x")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
