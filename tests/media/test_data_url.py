"""``data:`` URLs are read in every form that clients send, within the limit, and passed on in one."""

from __future__ import annotations

import base64
import os
import textwrap
from collections.abc import Callable

import pytest

from chiasm.errors import MediaError
from chiasm.media import Fetcher, MediaConfig
from chiasm.media.data_url import decode_data_url, encode_data_url
from chiasm.media.url import is_data_url

DATA = bytes(range(256)) * 5 + b"\xfb\xff\xbe"
"""Its base64 has each character of both alphabets."""
FORMS: dict[str, Callable[[str], str]] = {
    "lines of MIME": lambda text: "\r\n".join(textwrap.wrap(text, 76)),
    "lines with a last end": lambda text: "\n".join(textwrap.wrap(text, 76)) + "\n",
    "white space around": lambda text: f" \t\r\n{text}\f ",
    "no padding": lambda text: text.rstrip("="),
    "one = of two": lambda text: text.rstrip("=") + "=",
    "the URL-safe alphabet": lambda text: text.replace("+", "-").replace("/", "_"),
    "all of it": lambda text: "\n ".join(textwrap.wrap(text.rstrip("=").replace("+", "-"), 7)),
    "percent-encoded": lambda text: text.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D") + "%0A",
}


def refusal(url: bytes, max_bytes: int = 1 << 20) -> str:
    with pytest.raises(MediaError) as caught:
        decode_data_url(url, max_bytes)
    assert caught.value.status == 400
    return str(caught.value.code)


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:;base64,",
        "data:image/png;charset=x;BASE64,",
        "data:;charset=utf-8;name=a.png;base64,",
        "data:image/png; base64,",
        "\n data:IMAGE/PNG;base64,",
    ],
)
def test_parameters_and_letter_case_do_not_matter(head: str) -> None:
    url = head.encode() + base64.b64encode(DATA)
    assert is_data_url(url)
    assert is_data_url(url.decode())
    assert decode_data_url(url, 1 << 20).data == DATA


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_base64_is_read_in_every_form_that_clients_send(form: str, cut: int) -> None:
    data = DATA[cut:]
    plain = base64.b64encode(data)
    found = decode_data_url(b"data:;base64," + FORMS[form](plain.decode()).encode(), len(data))
    assert found.data == data
    assert bytes(found.base64) == plain


@pytest.mark.parametrize("size", [0, 1, 2, 3, (3 << 18) - 1, 3 << 18, (3 << 18) + 1, 2_000_000])
def test_all_sizes_are_encoded_and_decoded(size: int) -> None:
    data = os.urandom(size)
    url = encode_data_url("image/png", data)
    assert url == b"data:image/png;base64," + base64.b64encode(data)
    assert decode_data_url(url, size).data == data
    assert decode_data_url(b"data:;base64," + base64.encodebytes(data), size).data == data


@pytest.mark.parametrize("shift", range(3))
def test_a_percent_code_may_lie_anywhere(shift: int) -> None:
    data = b"\xff" * (1 << 20)  # whose base64 has nothing but slashes
    url = b"data:;base64," + b"\n" * shift + b"%2F" * (len(data) // 3 * 4)
    assert decode_data_url(url, len(data)).data == data[: len(data) // 3 * 3]


def test_plain_base64_is_not_copied() -> None:
    url = encode_data_url("image/png", DATA)
    found = decode_data_url(url, 1 << 20)
    assert found.base64.obj is url
    assert found.is_plain


@pytest.mark.parametrize(
    "url",
    [
        b"DATA:image/png;base64,QUJD",
        b" data:;base64,QUJD",
        b"data:;BASE64,QUJD",
        b"data:; base64,QUJD",
        b"data:;base64,QUJD\n",
    ],
)
def test_what_other_servers_do_not_read_is_not_plain(url: bytes) -> None:
    assert not decode_data_url(url, 3).is_plain


def test_padding_is_allowed_only_at_the_end() -> None:
    inside = b"data:;base64," + b"QUJD" * ((1 << 18) - 1) + b"QQ==" + b"QUJD"
    assert refusal(inside, 10 << 20) == "invalid_base64"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (b"data:image/png,abc", "invalid_url"),
        (b"data:image/png;base64", "invalid_url"),
        (b"data:base64,QUJD", "invalid_url"),
        (b"data:image/png;base64;x=y,QUJD", "invalid_url"),
        (b"data:," + b"x" * 10, "invalid_url"),
        (b"data:" + b"x" * 2000 + b";base64,QUJD", "invalid_url"),
        (b"data:image/png;base64,QUJDR", "invalid_base64"),
        (b"data:image/png;base64,QQ===", "invalid_base64"),
        (b"data:image/png;base64,====", "invalid_base64"),
        (b"data:image/png;base64,QU=D", "invalid_base64"),
        (b"data:image/png;base64,QU,D", "invalid_base64"),
        (b'data:image/png;base64,QUJD"', "invalid_base64"),
        (b"data:image/png;base64,QUJ\\u0044", "invalid_base64"),
        (b"data:image/png;base64,QUJ\\/", "invalid_base64"),
        (b"data:image/png;base64,%%%%", "invalid_base64"),
        (b"data:image/png;base64,QUJD\0", "invalid_base64"),
        ("data:image/png;base64,é===".encode(), "invalid_base64"),
    ],
)
def test_what_is_broken_is_refused(url: bytes, code: str) -> None:
    assert refusal(url) == code


@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_the_size_limit_is_exact_in_every_form(form: str) -> None:
    write = FORMS.get(form, str)
    for size in (98, 99, 100):
        url = b"data:;base64," + write(base64.b64encode(bytes(size)).decode()).encode()
        assert len(decode_data_url(url, size).data) == size
        assert refusal(url, size - 1) == "media_too_large"


async def test_a_fetcher_reads_them_too() -> None:
    fetcher = Fetcher(MediaConfig(max_media_bytes=3))
    assert await fetcher.fetch(" data:image/png;base64,QUJ\nD") == b"ABC"
    with pytest.raises(MediaError):
        await fetcher.fetch("data:image/png;base64,é===")
    await fetcher.close()
