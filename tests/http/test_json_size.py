"""What a body would become is bounded before it is decoded."""

from __future__ import annotations

import pytest

from chiasm.errors import InvalidRequestError
from chiasm.http.json_size import INLINE_BYTES, MAX_JSON_MEMBERS, MAX_JSON_VALUES, check_json_size

BACKSLASH = b"\\"


@pytest.mark.parametrize("value", [b"{}", b"[]", b'{"type":"text","text":""}', b"1234567", b'""', b'"\\""'])
def test_many_small_values_are_refused(value: bytes) -> None:
    count = max(MAX_JSON_VALUES + 2, INLINE_BYTES // len(value))
    with pytest.raises(InvalidRequestError, match=f"{MAX_JSON_MEMBERS}|{MAX_JSON_VALUES}"):
        check_json_size(b'{"prompt":[' + b",".join([value] * count) + b"]}")


@pytest.mark.parametrize("text", [b"[1,{},", b'\\"[,', BACKSLASH * 2 + b"{:", BACKSLASH * 4 + b'\\",,'])
@pytest.mark.parametrize("shift", range(7))
def test_what_stands_in_texts_does_not_count(text: bytes, shift: int) -> None:
    body = b'{"messages":[{"role":"user","content":"' + b"x" * shift + text * (4 * INLINE_BYTES // len(text)) + b'"}]}'
    check_json_size(body)


def test_as_many_token_ids_as_a_long_context_has_are_taken() -> None:
    check_json_size(b'{"prompt":[' + b",".join([b"151643"] * 500_000) + b"]}")
