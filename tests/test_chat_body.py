from __future__ import annotations

import msgspec
import pytest
from msgspec import Raw

from chiasm.chat_body import with_content_parts


def upper(part: Raw) -> bytes:
    return bytes(part).upper()


def test_each_part_is_replaced_and_all_else_keeps_its_bytes() -> None:
    body = b'{"a": 1.50e0, "messages": [{"role":"user","content": [ {"x":1}, "y"]}, {"content":"text", "z":[ 1]}]}'
    expected = b'{"a":1.50e0,"messages":[{"role":"user","content":[{"X":1},"Y"]},{"content":"text","z":[ 1]}]}'
    assert with_content_parts(body, upper) == expected


def test_the_last_value_of_a_repeated_key_counts() -> None:
    body = b'{"messages":[{"content":["a"]}],"messages":[{"content":["b"],"content":["c"]}]}'
    assert with_content_parts(body, upper) == b'{"messages":[{"content":["C"]}]}'


@pytest.mark.parametrize("content", [b"null", b'"[text]"', b"{}", b"7"])
def test_content_that_is_not_an_array_has_no_parts(content: bytes) -> None:
    body = b'{"messages":[{"content":%b}]}' % content
    assert with_content_parts(body, upper) == body


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"messages":{}}', b'{"messages":[1]}', b'{"messages":[{"content":[1}]}']
)
def test_what_is_not_a_chat_completion_raises(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        with_content_parts(body, upper)
