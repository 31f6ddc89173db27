"""A server with a certificate: HTTPS, a renewed certificate, and clients that don't speak TLS."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

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
