"""The bytes of tokens join to the text of their sequence."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from chiasm import checkpoints
from chiasm.models.token_bytes import TextOffsets, TokenBytes
from tests.models.tokenizers import sentencepiece


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte level":
        return Tokenizer.from_file(str(Path(checkpoints.folder("demo")) / "tokenizer.json"))
    made = sentencepiece(metaspace=kind == "metaspace")
    made.add_tokens(["<tool call>", "naïve"])
    return made


KINDS = ["byte level", "sentencepiece", "metaspace"]


def joined(kind: str, token_ids: list[int], *, skip: bool = False) -> bytes:
    token_bytes = TokenBytes(tokenizer(kind))
    return b"".join(token_bytes.of(token_id, skip_special_tokens=skip) for token_id in token_ids)


def text_of(kind: str, token_ids: list[int], *, skip: bool = False) -> str:
    """The decoded text, as it stands behind other text: some tokenizers strip a space before the first word."""
    first = tokenizer(kind).encode("a", add_special_tokens=False).ids
    text: str = tokenizer(kind).decode([*first, *token_ids], skip_special_tokens=skip)
    return text[1:]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_bytes_of_any_tokens_join_to_their_text(kind: str, data: st.DataObject, skip: bool) -> None:
    size = tokenizer(kind).get_vocab_size()
    token_ids = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    own = joined(kind, token_ids, skip=skip)
    if kind == "byte level":
        assert own.decode(errors="replace") == text_of(kind, token_ids, skip=skip)
        return
    try:
        assert own.decode() == text_of(kind, token_ids, skip=skip)
    except UnicodeDecodeError:  # these tokenizers write one U+FFFD for each byte of what is no character
        assert "\ufffd" in text_of(kind, token_ids, skip=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_text_are_its_utf8_and_offsets_point_into_it(kind: str, text: str) -> None:
    token_ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
    decoded = text_of(kind, token_ids)
    assert joined(kind, token_ids) == decoded.encode()
    token_bytes, offsets = (
        TokenBytes(tokenizer(kind)),
        TextOffsets(TokenBytes(tokenizer(kind)), skip_special_tokens=False),
    )
    before = b""
    for token_id in token_ids:
        assert offsets.add(token_id) == len(before.decode(errors="ignore"))
        before += token_bytes.of(token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_character_has_its_own_bytes(kind: str) -> None:
    token_ids = tokenizer(kind).encode("🙂", add_special_tokens=False).ids
    token_bytes = TokenBytes(tokenizer(kind))
    parts = [token_bytes.of(token_id) for token_id in token_ids]
    assert b"".join(parts).strip() == "🙂".encode()
    assert len(parts) >= 4
    assert token_bytes.text(token_ids[-1]) == "\ufffd"


def test_an_unknown_token_has_no_bytes() -> None:
    assert TokenBytes(tokenizer("byte level")).of(10**6) == b""
