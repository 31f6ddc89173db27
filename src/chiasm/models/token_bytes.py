"""The bytes that a token adds to a text; a character may be spread over several tokens."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of a tokenizer's tokens. They join to the text of a sequence of tokens, if that is valid UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        steps = _steps(tokenizer)
        kinds = {step["type"] for step in steps}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        self._replacements += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        self._is_known = self._is_byte_level or bool(self._replacements)
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes of a token; none for one that isn't in the vocabulary, and for a special token that is skipped."""
        if skip_special_tokens and token_id in self._special:
            return b""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def text(self, token_id: int) -> str:
        """Return the text of a token alone, in which an incomplete character is U+FFFD."""
        return self.of(token_id).decode(errors="replace")

    def _read(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_known:
            alone: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
            return alone.encode()
        if self._is_byte_level:
            table = _byte_level_alphabet()
            is_written_in_it = all(character in table for character in token)
            return bytes(table[character] for character in token) if is_written_in_it else token.encode()
        if self._has_byte_tokens and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()


class TextOffsets:
    """Counts the characters of a text that grows token by token."""

    def __init__(self, token_bytes: TokenBytes, *, skip_special_tokens: bool) -> None:
        self._bytes = token_bytes
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def add(self, token_id: int) -> int:
        """Return how many characters were complete before this token."""
        before = self._characters
        self._characters += len(
            self._decoder.decode(self._bytes.of(token_id, skip_special_tokens=self._skip_special_tokens))
        )
        return before


@lru_cache(maxsize=4)
def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """Return the bytes of a tokenizer's tokens; the same object each time."""
    return TokenBytes(tokenizer)


def _steps(tokenizer: Tokenizer) -> Sequence[Mapping[str, Any]]:
    """Return the steps of the tokenizer's decoder, in order."""
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: Sequence[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte for which each character stands in a byte-level vocabulary.

    Printable characters stand for themselves, the other bytes are written from U+0100 on (Radford et al. 2019, GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


@lru_cache(maxsize=2)
def longest_token(tokenizer: Tokenizer) -> int:
    """Return the length of the longest token in characters: a text has at least its length divided by this in tokens."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
