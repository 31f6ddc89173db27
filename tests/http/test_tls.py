"""A server with a certificate: HTTPS, a renewed certificate, and clients that don't speak TLS."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.http.tls import Certificate
from tests.http.serving import site
from tests.http.test_endpoint import echo

FOLDER = Path(__file__).parents[1] / "media/certificates"
GOOD, OTHER, KEY = (FOLDER / name for name in ("good.pem", "self_signed.pem", "key.pem"))


def der_of(path: Path) -> bytes:
    text = path.read_text()
    return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERT") :])


def test_requests_are_answered_over_https_and_over_nothing_else() -> None:
    config = HttpConfig(ssl_certfile=GOOD, ssl_keyfile=KEY)
    with site(echo, config=config) as server:
        assert server.url.startswith("https://")
        assert httpx.post(server.url, content=b"x" * 900, verify=False, timeout=30).content == b"x" * 900
        too_large = httpx.post(server.url, content=b"x" * 2000, verify=False, timeout=30)
        with pytest.raises(httpx.HTTPError):
            httpx.post(server.url.replace("https", "http"), content=b"x", timeout=30)
        assert httpx.post(server.url, content=b"y", verify=False, timeout=30).content == b"y"
    assert too_large.status_code == 413


async def test_a_renewed_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    shown, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(GOOD, shown)
    shutil.copy(KEY, key)
    certificate = Certificate(shown, key)
    assert shown_by(certificate) == der_of(GOOD)
    shutil.copy(OTHER, shown)
    await certificate.read_again()
    assert shown_by(certificate) == der_of(OTHER)
    shown.write_text("half of")
    await certificate.read_again()
    assert shown_by(certificate) == der_of(OTHER)


def shown_by(certificate: Certificate) -> bytes:
    """Return what a new connection is shown, by a handshake in memory."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(to_client, to_server)
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    left = [client, server]
    while left:
        one = left.pop(0)
        try:
            one.do_handshake()
        except ssl.SSLWantReadError:
            left.append(one)
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return shown


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (FOLDER / "none.pem", None, "cannot be read: No such file"),
        (GOOD, FOLDER / "authority.pem", "no certificate in PEM with its key"),
        (KEY, KEY, "no certificate in PEM with its key"),
    ],
)
def test_files_that_cannot_be_used_are_refused(certificate: Path, key: Path | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Certificate(certificate, key)


def test_a_key_alone_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs --ssl-certfile"):
        HttpConfig(ssl_keyfile=KEY)


def connect(url: str) -> socket.socket:
    """Return a connection on which nothing has been said."""
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), parts.port or 0), timeout=60)


@pytest.mark.parametrize("limits", [{"max_connections": 8}, {"max_connections_per_peer": 8}], ids=["all", "peer"])
@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"], ids=["silent", "half a handshake"])
def test_handshakes_under_way_count_and_the_oldest_make_way(limits: dict[str, int], first: bytes) -> None:
    config = HttpConfig(ssl_certfile=GOOD, ssl_keyfile=KEY, header_timeout_seconds=1000.0, **limits)  # type: ignore[arg-type]
    with site(echo, config=config) as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(server.url)) for _ in range(50)]
        for peer in peers:
            with contextlib.suppress(OSError):  # it may have made way already
                peer.sendall(first)
        assert httpx.post(server.url, content=b"x", verify=False, timeout=60).content == b"x"
        assert all(is_ended(peer) for peer in peers[:42])


def test_a_handshake_that_does_not_come_ends_in_time() -> None:
    config = HttpConfig(ssl_certfile=GOOD, ssl_keyfile=KEY, header_timeout_seconds=0.1)
    with site(echo, config=config) as server, connect(server.url) as peer:
        assert is_ended(peer)


def is_ended(peer: socket.socket) -> bool:
    """Wait until the server ends a connection; return whether it has."""
    try:
        return peer.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False
