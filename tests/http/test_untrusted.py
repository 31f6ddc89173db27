"""What a client reads when its body is not what was expected."""

from __future__ import annotations

import msgspec
import pytest

from chiasm.errors import Code, InvalidRequestError
from chiasm.http.untrusted import read_json


class Part(msgspec.Struct):
    kind: str


class Body(msgspec.Struct):
    parts: list[Part]
    size: int = 1


DECODER = msgspec.json.Decoder(Body)


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_empty_body_is_called_empty(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"The body is empty; send a JSON object\.") as raised:
        read_json(DECODER, body)
    assert raised.value.code == Code.INVALID_JSON


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"{}", "The field parts is missing; send it.", "parts"),
        (b'{"parts": [{}]}', "The field kind is missing in parts[0]; send it.", "parts"),
        (b'{"parts": [1]}', "Expected `object`, got `int` at parts[0].", "parts"),
        (b'{"parts": [], "size": "1"}', "Expected `int`, got `str` at size.", "size"),
        (b"[]", "Expected `object`, got `array` as the body.", None),
        (b"null", "Expected `object`, got `null` as the body.", None),
    ],
)
def test_a_wrong_body_says_where_it_is_wrong(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        read_json(DECODER, body)
    assert (raised.value.message, raised.value.param) == (message, param)


def test_a_body_in_another_encoding_is_called_that() -> None:
    with pytest.raises(InvalidRequestError, match="it is not in UTF-8, near") as raised:
        read_json(DECODER, '{"parts": [{"kind": "é"}]}'.encode("latin-1"))
    assert raised.value.code == Code.INVALID_JSON
