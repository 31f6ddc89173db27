"""Long data: URLs and members named data are lifted out of a body, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import PayloadTooLargeError
from chiasm.http import lifted as lifted_module
from chiasm.http.json_size import INLINE_BYTES
from chiasm.http.lifted import Lifted, lift, read_lifted

BASE64 = "A" * 5000
ESCAPED: list[dict[str, str]] = [
    {},
    {"/": "\\/"},  # PHP
    {"+": "\\u002B"},  # .NET
    {"=": "\\u003d"},  # Gson
    {"/": "\\u002F", "+": "\\u002b", "=": "\\u003D"},
]
"""How libraries for JSON write characters of base64."""
URL = "data:image/png;base64," + BASE64
TEXTS = st.one_of(
    st.sampled_from(
        [
            "data",
            BASE64,
            '\\"data',
            URL,
            URL + "\n",
            "data:" + "A" * 76 + "\r\n" + BASE64 + "\r",
            '"' + URL,
            '\\"' + URL,
            URL + '"',
            "é" + URL,
            "data:" + "é" * 5000,
            "data:x",
            "data:a/b+c=" + BASE64,
        ]
    ),
    st.text(max_size=5),
)
VALUES = st.recursive(
    TEXTS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


def escaped(text: str, escapes: dict[str, str]) -> bytes:
    for character, escape in escapes.items():
        text = text.replace(character, escape)
    return text.encode()


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from(ESCAPED))
def test_a_body_with_stand_ins_says_the_same_and_can_be_restored(
    value: Any, ascii_only: bool, escapes: dict[str, str]
) -> None:
    body = escaped(json.dumps(value, ensure_ascii=ascii_only), escapes)
    lifted = lift(body)
    assert lifted.restored(lifted.body) == body

    def back(value: Any) -> Any:
        if isinstance(value, str):
            for stand_in, url in lifted.urls.items():
                value = value.replace(stand_in.decode(), url.decode())
            return value
        if isinstance(value, list):
            return [back(one) for one in value]
        return {back(name): back(one) for name, one in value.items()}

    assert back(json.loads(lifted.body)) == value


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(['"', "\\", "[", ",", " ", "x", URL, '"' + URL, '"data"', ":", "{", '"' + BASE64 + '"']),
        max_size=8,
    )
)
def test_what_is_no_json_stays_none(pieces: list[str]) -> None:
    body = "".join(pieces).encode()

    def is_json(text: bytes) -> bool:
        try:
            json.loads(text)
        except ValueError:
            return False
        return True

    assert is_json(lift(body).body) == is_json(body)


def urls_of(found: Any) -> list[bytes]:
    return [url.encode() for url in found["urls"]]


def read(body: bytes, max_text_bytes: int = 10_000) -> tuple[Any, Lifted]:
    return read_lifted(body, max_text_bytes, json.loads, urls_of)


def test_only_the_urls_of_images_are_lifted() -> None:
    found, lifted = read(json.dumps({"urls": [URL], "text": URL}).encode())
    assert found["text"] == URL
    assert [lifted.urls[url] for url in urls_of(found)] == [URL.encode()]


@pytest.mark.parametrize("between", [":", " : ", "\n:\t"])
def test_base64_in_a_member_named_data_is_lifted(between: str) -> None:
    body = f'{{"urls":[], "text": "\\"data\\":", "data"{between}"{BASE64}", "more": "{BASE64}"}}'.encode()
    lifted = lift(body)
    assert list(lifted.urls.values()) == [BASE64.encode()]
    assert json.loads(lifted.body)["data"].encode() in lifted.urls
    assert lifted.restored(lifted.body) == body


@pytest.mark.parametrize("escapes", ESCAPED)
@pytest.mark.parametrize("member", ["urls", "data"])
def test_so_is_what_has_characters_of_base64_escaped(
    monkeypatch: pytest.MonkeyPatch, member: str, escapes: dict[str, str]
) -> None:
    """An escape may be where a step of reading ends."""
    monkeypatch.setattr(lifted_module, "_ESCAPES_STEP_BYTES", 7)
    text = "data:image/png;base64," + "AB/+//+C" * 1000 + "A=="
    body = escaped(json.dumps({"urls": [], "text": text, member: [text] if member == "urls" else text}), escapes)
    found, lifted = read(body, 60_000) if member == "urls" else (None, lift(body))
    assert text.encode() in lifted.urls.values()
    assert lifted.restored(lifted.body) == body
    assert found is None or [lifted.urls[url] for url in urls_of(found)] == [text.encode()]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ends_of_lines_in_base64_do_not_make_it_text(end: str) -> None:
    image = "data:image/png;base64," + (f"{'A' * 76}{end}" * (INLINE_BYTES // 76))
    body = json.dumps({"urls": [image, image], "text": URL}).encode()
    found, lifted = read(body)
    assert [lifted.urls[url] for url in urls_of(found)] == [image.encode()] * 2
    assert lifted.restored(lifted.body) == body


@pytest.mark.parametrize(
    "written", ["/\\/", "\\\\/", "\\u002f/", "\\/\\t", "\\\\u002b", "+\\u002b", "\\u002B\\u002b", "\\u0041"]
)
def test_what_has_other_escapes_stays(written: str) -> None:
    body = f'["data:{written};base64,{BASE64}"]'.encode()
    assert lift(body) == Lifted(body)


def test_images_do_not_count_as_text_and_texts_that_look_like_them_do() -> None:
    image = "data:" + "A" * INLINE_BYTES
    read(json.dumps({"urls": [image, image]}).encode())
    for body in ({"urls": [], "text": image}, {"urls": [], image: 1}, {"urls": [], "text": "x" * 10_000}):
        with pytest.raises(PayloadTooLargeError) as caught:
            read(json.dumps(body).encode())
        assert caught.value.limit == "text_bytes"


def test_what_only_looks_like_a_stand_in_stays() -> None:
    forged = "data:lifted-0123456789abcdef-0."
    body = json.dumps({"urls": [URL], "text": forged}).encode()
    found, lifted = read(body)
    assert found["text"] == forged
    assert lifted.restored(lifted.body) == body


def test_the_last_of_equal_keys_counts_and_the_first_is_text() -> None:
    twice = b'{"urls":["%b"],"urls":["http://a"]}' % (b"data:" + b"A" * 20_000)
    with pytest.raises(PayloadTooLargeError):
        read(twice)


def test_countless_small_strings_are_not_looked_at_one_by_one() -> None:
    body = b"[" + b",".join([b'"data:"'] * 100_000) + b',"' + URL.encode() + b'"]'
    assert lift(body) == Lifted(body)
