"""The process in which a GrammarCompiler tries each grammar first, since some small ones take minutes to compile.

An order is a grammar with what it can name of a vocabulary. The answer is empty: all that counts is that there is one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from chiasm.bounded_process import carry_out_orders

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STACK_BYTES = 64 << 20
"""The compiler takes up to 6 KiB for each of the levels that a grammar may have. Only what is used takes memory."""
MAX_COMPILE_BYTES = 1 << 30
"""Memory for compiling a grammar."""
_MAX_LEXER_STATES = 20_000
"""One to two kilobytes each."""
_MAX_GRAMMAR_SYMBOLS = 100_000
"""What a grammar may grow to when it is compiled."""


class Names(msgspec.Struct, frozen=True):
    """What a grammar can name of a vocabulary: its special tokens, and any token by its id."""

    size: int
    special: tuple[tuple[int, bytes], ...]
    ends: tuple[int, ...]
    """The ids of the tokens that end an answer."""


class Order(msgspec.Struct):
    """A grammar to try."""

    grammar: str
    names: Names


def tokenizer_of(vocabulary: object, ends: Sequence[int]) -> LLTokenizer:
    """Return llguidance's tokenizer of a vocabulary in the form that it reads, whose tokens ``ends`` end an answer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    # In two steps, and not from the tokenizer's JSON: llguidance holds the interpreter's lock meanwhile, for which all streams
    # of an instance would wait.
    bare = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(ends), slices=[])
    return bare.with_slices(LLTokenizer.general_slices())


def compiled(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """Return the compiled grammar, or what says why it can't be followed (``is_error``)."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES, max_grammar_size=_MAX_GRAMMAR_SYMBOLS, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_logit_bias()  # some schemas turn out to be impossible, and some to be too complex, only here
    return matcher


class _Vocabulary:
    """Of the tokens that a grammar can't name, 256 have a byte each and the others nothing. llguidance reads it."""

    bos_token_id = None

    def __init__(self, names: Names) -> None:
        special = dict(names.special)
        unnamed = (token_id for token_id in range(names.size) if token_id not in special)
        self._of_byte = dict(zip(range(256), unnamed, strict=False))
        self.tokens = [b""] * names.size
        for value, token_id in self._of_byte.items():
            self.tokens[token_id] = bytes([value])
        for token_id, token in special.items():
            self.tokens[token_id] = token
        self.special_token_ids = list(special)
        self.eos_token_id = names.ends[0]

    def __call__(self, text: str) -> list[int]:
        return [self._of_byte[value] for value in text.encode() if value in self._of_byte]


@functools.lru_cache(maxsize=1)
def _tokenizer(names: Names) -> LLTokenizer:
    return tokenizer_of(_Vocabulary(names), names.ends)


def _try(order: memoryview) -> tuple[()]:
    wanted = msgspec.msgpack.decode(order, type=Order)
    compiled(_tokenizer(wanted.names), wanted.grammar)
    return ()


def main() -> None:
    """Try grammar after grammar, in a thread with a larger stack."""
    threading.stack_size(STACK_BYTES)
    with ThreadPoolExecutor(1) as pool:
        carry_out_orders(lambda order: pool.submit(_try, order).result(), lambda _: MAX_COMPILE_BYTES)


if __name__ == "__main__":
    main()
