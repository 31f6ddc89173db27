"""Grammars that answers must follow: compiled by llguidance, and applied as a mask of the tokens that may come next.

A grammar is text in llguidance's variant of Lark, in which a rule may also be a JSON schema (``%json``). It is compiled
once, in a thread of the caller, after a process with limits of CPU time and memory has tried it. Each sequence has a matcher
of its own, which is nothing but a function of the grammar and the output tokens so far: it can be made anew anywhere.
llguidance is imported when the first grammar is compiled.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from chiasm.bounded_process import BoundedProcess, ProcessEndedError
from chiasm.engine.grammar_process import Names, Order, compiled, tokenizer_of
from chiasm.errors import Code, InvalidRequestError
from chiasm.models.token_bytes import token_bytes_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from chiasm.models.base import Processor

MAX_GRAMMAR_BYTES = 512 << 10
"""Size of a grammar's text; a larger one is refused."""
MAX_COMPILE_SECONDS = 5.0
"""CPU time for compiling a grammar."""
MAX_MASK_SECONDS = 0.1
"""CPU time for finding which tokens may come next. All sequences of a step wait for it."""
_MAX_CACHED = 16
_MAX_CACHED_BYTES = 4 << 20
_SHOWN_CHARACTERS = 500
_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
_QUOTE = re.compile(r"\n\s*\d+ \| |<state>| <non-verbose/>")


class Allowed(NamedTuple):
    """Which tokens may come next: bool ``[at least vocab]``, on the CPU."""

    tokens: Tensor
    closing: Tensor | None
    """Those that close what is open in JSON; None if there are none. A model that wants to end, but may not, takes them."""
    ends: frozenset[int]
    """The tokens with which the model ends its answers, whether they are allowed or not."""


class Closers:
    """The tokens of a tokenizer that close what is open in JSON."""

    def __init__(self, processor: Processor) -> None:
        vocabulary = processor.tokenizer.get_vocab(with_added_tokens=False)
        size = max(processor.vocab_size, processor.tokenizer.get_vocab_size(with_added_tokens=True))
        self._brackets = torch.zeros(size, dtype=torch.bool)
        self._quotes = torch.zeros(size, dtype=torch.bool)
        for token, token_id in vocabulary.items():
            if token and not token.strip("}]"):
                self._brackets[token_id] = True
            elif token[:1] == '"' and not token[1:].strip("}]"):
                self._quotes[token_id] = True
        self.ends = processor.eos_token_ids
        self._letter = vocabulary.get("Q")
        """Only within a string may it come next."""

    def among(self, allowed: Tensor) -> Tensor | None:
        """Return those of the allowed tokens that close, or None."""
        if self._letter is None:
            return None
        closing = allowed & (self._quotes if allowed[self._letter] else self._brackets)
        return closing if closing.any() else None


class Grammar:
    """A compiled grammar."""

    def __init__(self, compiled: LLMatcher, closers: Closers) -> None:
        self._compiled = compiled
        self._closers = closers
        self.is_exhausted = False
        """Whether it has reached a limit, which all its matchers share: no answer can go on with it."""
        self.is_slow = False
        """Whether a step has taken it too long."""

    def matcher(self) -> Matcher:
        """Return a matcher for one sequence, which has no tokens yet."""
        return Matcher(self, self._compiled.deep_copy(), self._closers)


class GrammarError(Exception):
    """Why a sequence has no next token. ``str(error)`` is one or two sentences."""


class Matcher:
    """One sequence's place in its grammar. Not thread-safe."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher, closers: Closers) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._closers = closers
        self._num_tokens = 0

    def allowed(self, token_ids: Sequence[int], num_prompt: int = 0) -> Allowed:
        """Return which tokens may follow.

        The answer so far is what follows the first ``num_prompt`` of ``token_ids``; each call has at least what the call before
        had. Raises GrammarError.
        """
        began = time.thread_time()
        new = token_ids[num_prompt + self._num_tokens :]
        for token_id in new:
            self._num_tokens += 1
            if not self._matcher.consume_token(token_id):
                raise GrammarError(f"The answer so far doesn't follow the requested format: {self._reason()}")
        # A copy, because torch wants to be able to write.
        tokens = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._matcher.is_error():
            self._grammar.is_exhausted = True
            raise GrammarError(f"The requested format is too complex for the answer to go on: {self._reason()}")
        if time.thread_time() - began > MAX_MASK_SECONDS * max(1, len(new)):
            self._grammar.is_slow = True
            raise GrammarError(f"The requested format {_TOO_SLOW}")
        return Allowed(tokens, self._closers.among(tokens), self._closers.ends)

    def _reason(self) -> str:
        return sentence(self._matcher.get_error())


class _Refusal(NamedTuple):
    """Why a grammar is refused, in words that follow the name of its field."""

    reason: str
    code: Code


_TOO_SLOW = f"is too complex: it takes more than {MAX_MASK_SECONDS * 1000:g} ms to find which tokens may come next."
_SLOW = _Refusal(_TOO_SLOW, Code.GRAMMAR_TOO_EXPENSIVE)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last. Thread-safe."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._lock = threading.Lock()  # of the cache and the processes
        self._making_tokenizer = threading.Lock()
        self._tokenizer: tuple[LLTokenizer, Names] | None = None
        self._closers = Closers(processor)
        self._cache: OrderedDict[str, Grammar | _Refusal] = OrderedDict()
        self._cached_bytes = 0
        self._idle: BoundedProcess | None = None
        self._busy: set[BoundedProcess] = set()

    def close(self) -> None:
        """End the processes in which grammars are tried. Idempotent."""
        with self._lock:
            idle, self._idle = self._idle, None
            for process in self._busy:
                process.kill()
        if idle is not None:
            idle.end()

    def compile(self, source: str, *, param: str) -> Grammar:
        """Return the compiled grammar. Slow for a new one; don't call it on an event loop.

        Raises InvalidRequestError, which names ``param``, if it is malformed or too complex.
        """
        size = len(source.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                f"{param} makes a grammar of {size} bytes and {MAX_GRAMMAR_BYTES} is the limit; send smaller schemas.",
                param=param,
                code=Code.INVALID_GRAMMAR,
            )
        known = self._known(source)
        if known is None:
            known = self._tried(source)  # without the lock, since it may take long
            self._keep(source, known)
        if isinstance(known, _Refusal):
            raise InvalidRequestError(f"{param} {known.reason}", param=param, code=known.code)
        return known

    def _known(self, source: str) -> Grammar | _Refusal | None:
        with self._lock:
            known = self._cache.get(source)
            if isinstance(known, Grammar) and known.is_slow:
                return _SLOW
            if isinstance(known, Grammar) and known.is_exhausted:
                self._drop(source)
                return None
            if known is not None:
                self._cache.move_to_end(source)
            return known

    def _keep(self, source: str, known: Grammar | _Refusal) -> None:
        with self._lock:
            self._drop(source)  # another thread may have compiled it too
            self._cache[source] = known
            self._cached_bytes += len(source)
            while len(self._cache) > _MAX_CACHED or self._cached_bytes > _MAX_CACHED_BYTES:
                self._drop(next(iter(self._cache)))

    def _drop(self, source: str) -> None:
        if self._cache.pop(source, None) is not None:
            self._cached_bytes -= len(source)

    def _tried(self, source: str) -> Grammar | _Refusal:
        tokenizer, names = self._llguidance_tokenizer()
        try:
            with self._process() as process:
                process.ask(msgspec.msgpack.encode(Order(source, names)), cpu_seconds=MAX_COMPILE_SECONDS)
        except ProcessEndedError as error:
            what = f"takes more than {MAX_COMPILE_SECONDS:g} s to compile" if error.took_too_long else "is too complex"
            return _Refusal(f"{what}; send a simpler schema or pattern.", Code.GRAMMAR_TOO_EXPENSIVE)
        matcher = compiled(tokenizer, source)
        if matcher.is_error():
            return _Refusal(f"cannot be followed: {sentence(matcher.get_error())}", Code.INVALID_GRAMMAR)
        grammar = Grammar(matcher, self._closers)
        with contextlib.suppress(GrammarError):
            grammar.matcher().allowed(())  # not in a step
        return _SLOW if grammar.is_slow else grammar

    @contextlib.contextmanager
    def _process(self) -> Iterator[BoundedProcess]:
        """A process for one grammar. One of them is kept for the next."""
        with self._lock:
            process = self._idle or BoundedProcess("-m", "chiasm.engine.grammar_process")
            self._idle = None
            self._busy.add(process)
        try:
            yield process
        finally:
            with self._lock:
                self._busy.remove(process)
                surplus, self._idle = self._idle, process
            if surplus is not None:
                surplus.end()

    def _llguidance_tokenizer(self) -> tuple[LLTokenizer, Names]:
        with self._making_tokenizer:
            if self._tokenizer is None:
                vocabulary = _Vocabulary(self._processor)
                self._tokenizer = tokenizer_of(vocabulary, vocabulary.ends), vocabulary.names
            return self._tokenizer


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, processor: Processor) -> None:
        self._tokenizer = processor.tokenizer
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        token_bytes = token_bytes_of(self._tokenizer)
        self.tokens = [token_bytes.of(token_id) for token_id in range(max(processor.vocab_size, size))]
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = [token_id for token_id, token in added.items() if token.special]
        self.ends = sorted(token_id for token_id in processor.eos_token_ids if token_id < size)
        if not self.ends:
            raise InvalidRequestError(
                "Answers of this model can follow no grammar, because its tokenizer has no token that ends them.",
                code=Code.INVALID_GRAMMAR,
            )
        self.eos_token_id = self.ends[0]

    @property
    def names(self) -> Names:
        special = tuple((token_id, self.tokens[token_id]) for token_id in self.special_token_ids)
        return Names(len(self.tokens), special, tuple(self.ends))

    def __call__(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids


def sentence(reason: str) -> str:
    """Return what llguidance says as one line that ends like a sentence, without its quotes of the grammar."""
    before_quotes = _QUOTE.split(_PLACE.sub("", reason), maxsplit=1)[0]
    line = " ".join(before_quotes.split())[:_SHOWN_CHARACTERS]
    return line if line.endswith(".") else f"{line}."


# ---- in the engine -----------------------------------------------------------------------------------------------------


class ConstrainedSequence(Protocol):
    """What matchers need to know of a sequence."""

    request_id: str
    index: int
    token_ids: list[int]

    @property
    def grammar(self) -> Grammar | None: ...

    @property
    def num_prompt(self) -> int: ...


Masks = dict[int, Allowed | GrammarError]
"""By the index of a row: which tokens may come next, or why none may."""


class Matchers:
    """The matchers of the sequences that run. Masks are computed in a thread, beside the model."""

    def __init__(self) -> None:
        self._matchers: dict[str, dict[int, Matcher]] = {}
        """By request and choice."""
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, sequences: Sequence[ConstrainedSequence]) -> Future[Masks] | None:
        """Begin to compute the masks for the next token of each sequence; None if none of them has a grammar."""
        rows: list[_Row] = []
        for row, sequence in enumerate(sequences):
            if sequence.grammar is not None:
                of_request = self._matchers.setdefault(sequence.request_id, {})
                if sequence.index not in of_request:
                    of_request[sequence.index] = sequence.grammar.matcher()
                rows.append(_Row(row, of_request[sequence.index], sequence.token_ids, sequence.num_prompt))
        if not rows:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="chiasm-grammar")
        return self._pool.submit(_masks, rows)

    def forget(self, request_id: str) -> None:
        """Drop the matchers of a request that ended."""
        self._matchers.pop(request_id, None)


class _Row(NamedTuple):
    """A row whose mask is computed. Its tokens don't change until that is done."""

    row: int
    matcher: Matcher
    token_ids: Sequence[int]
    num_prompt: int


def _masks(rows: Sequence[_Row]) -> Masks:
    masks: Masks = {}
    for row, matcher, token_ids, num_prompt in rows:
        try:
            masks[row] = matcher.allowed(token_ids, num_prompt)
        except GrammarError as error:
            masks[row] = error
    return masks
