"""Grammars: what they allow after any tokens, and answers that follow them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from chiasm import checkpoints
from chiasm.bounded_process import BoundedProcess
from chiasm.engine import grammar, grammar_process
from chiasm.engine.grammar import Grammar, GrammarCompiler, GrammarError
from chiasm.errors import InvalidRequestError
from chiasm.models import load_processor
from chiasm.models.base import Processor
from chiasm.wire import KVTransferParams, Role
from tests.engine.conftest import A, Instance, Start

TAKES_MINUTES = "start: %json " + json.dumps(
    {"allOf": [{"type": "string", "pattern": f"^.*a{{{number}}}b.*$"} for number in range(1, 50)]}
)
LETTERS = "start: /[a-z]{30}/"
OBJECT = "start: %json " + json.dumps(
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(checkpoints.folder("demo"))


@pytest.fixture
def compiler(processor: Processor) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(processor)
    yield made
    made.close()


def _grammar(instance: Instance, source: str = LETTERS) -> Grammar:
    with contextlib.closing(GrammarCompiler(instance.engine.processor)) as compiler:
        return compiler.compile(source, param="x")


def _ids(processor: Processor, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


# ---- what is allowed -----------------------------------------------------------------------------------------------------


def test_a_matcher_that_is_made_anew_allows_the_same(compiler: GrammarCompiler, processor: Processor) -> None:
    compiled = compiler.compile(OBJECT, param="x")
    token_ids = [*_ids(processor, '{"a":"blue"}'), *processor.eos_token_ids]
    running = compiled.matcher()
    for length in range(len(token_ids) + 1):
        step = running.allowed(token_ids[:length]).tokens
        assert step.equal(compiled.matcher().allowed(token_ids[:length]).tokens)


def test_a_complete_answer_can_only_end(compiler: GrammarCompiler, processor: Processor) -> None:
    matcher = compiler.compile(OBJECT, param="x").matcher()
    token_ids = _ids(processor, '{"a":""}')
    for _ in range(3):
        assert set(matcher.allowed(token_ids).tokens.nonzero().flatten().tolist()) == processor.eos_token_ids
        token_ids.append(min(processor.eos_token_ids))


def test_what_closes_json_depends_on_what_is_open(compiler: GrammarCompiler, processor: Processor) -> None:
    matcher = compiler.compile(OBJECT, param="x").matcher()

    def closing(text: str) -> set[str]:
        tokens = matcher.allowed(_ids(processor, text)).closing
        return (
            set() if tokens is None else {processor.tokenizer.decode([i]) for i in tokens.nonzero().flatten().tolist()}
        )

    assert closing("") == set()
    assert closing('{"a":') == set()
    assert closing('{"a":"b}]') == {'"'}
    assert closing('{"a":"b}]"') == {"}"}


def test_tokens_that_contradict_the_grammar_are_an_error(compiler: GrammarCompiler, processor: Processor) -> None:
    with pytest.raises(GrammarError, match="doesn't follow"):
        compiler.compile(OBJECT, param="x").matcher().allowed(_ids(processor, "red"))


# ---- compiling -----------------------------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once_and_few_are_kept(compiler: GrammarCompiler) -> None:
    first = compiler.compile(OBJECT, param="x")
    assert compiler.compile(OBJECT, param="x") is first
    for number in range(40):
        compiler.compile(f'start: "{number}"', param="x")
    assert compiler.compile(OBJECT, param="x") is not first


def test_a_grammar_that_takes_long_keeps_no_other_waiting(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    compiled = grammar_process.compiled

    def slow(tokenizer: LLTokenizer, source: str) -> LLMatcher:
        if "slow" in source:
            begun.set()
            assert may_end.wait(60)
        return compiled(tokenizer, source)

    monkeypatch.setattr(grammar, "compiled", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compiler.compile, 'start: "slow"', param="x")
        assert begun.wait(60)
        compiler.compile('start: "other"', param="x")
        assert not first.done()
        may_end.set()
        assert first.result(60) is compiler.compile('start: "slow"', param="x")


def test_large_grammars_are_kept_up_to_a_sum(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_MAX_CACHED_BYTES", 2 * len(OBJECT))
    first = compiler.compile(OBJECT, param="x")
    compiler.compile(OBJECT + " ", param="x")
    assert compiler.compile(OBJECT, param="x") is not first


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("start: (", "Expected token"),
        ("start: /(a/", "unclosed group"),
        ('start: %json {"type": "strin"}', "Invalid type: strin."),
        ('start: %json {"type": "integer", "minimum": 3, "maximum": 2}', "Unsatisfiable"),
        ("start: " + " ".join(f'"{number:06d}"' for number in range(60_000)), "limit"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(compiler: GrammarCompiler, source: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match="response_format") as caught:
        compiler.compile(source, param="response_format")
    assert says in caught.value.message
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("beside", ["", "%s |", "<[%d]> |"], ids=["alone", "a name", "a number"])
def test_a_format_that_takes_minutes_is_refused_and_the_next_is_compiled(
    compiler: GrammarCompiler, processor: Processor, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """The process that tries it knows what it names, so nothing there ends before the expensive part is reached."""
    monkeypatch.setattr(grammar, "MAX_COMPILE_SECONDS", 0.5)
    end = min(processor.eos_token_ids)
    named = beside % (processor.tokenizer.id_to_token(end) if "s" in beside else end) if beside else ""
    source = TAKES_MINUTES.replace("start:", f"start: {named}")
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"takes more than 0\.5 s to compile") as caught:
            compiler.compile(source, param="response_format")
        assert caught.value.code == "grammar_too_expensive"
    compiler.compile(OBJECT, param="x")


def test_a_format_each_of_whose_tokens_takes_long_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_MASK_SECONDS", 0.0)
    with pytest.raises(InvalidRequestError, match="x is too complex: it takes more than") as caught:
        compiler.compile(OBJECT, param="x")
    assert caught.value.code == "grammar_too_expensive"


def test_a_format_that_takes_long_within_an_answer_ends_it_and_is_refused_from_then_on(
    compiler: GrammarCompiler, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiler.compile(OBJECT, param="x").matcher()
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "MAX_MASK_SECONDS", 0.0)
        with pytest.raises(GrammarError, match="too complex: it takes more than"):
            matcher.allowed(_ids(processor, "{"))
    with pytest.raises(InvalidRequestError, match="too complex: it takes more than"):
        compiler.compile(OBJECT, param="x")


def test_a_refused_grammar_is_not_tried_again(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'start: %json {"type": "strin"}'
    with pytest.raises(InvalidRequestError) as first:
        compiler.compile(source, param="response_format")
    monkeypatch.setattr(grammar, "BoundedProcess", None)
    compiler.close()
    with pytest.raises(InvalidRequestError) as second:
        compiler.compile(source, param="tools")
    assert second.value.message == first.value.message.replace("response_format", "tools")


def test_a_compiler_that_crashes_costs_its_grammar_only(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "BoundedProcess", lambda *_: BoundedProcess("-c", "import os; os.abort()"))
        with pytest.raises(InvalidRequestError, match="x is too complex"):
            compiler.compile(LETTERS, param="x")
        compiler.close()
    compiler.compile(OBJECT, param="x")


def test_closing_ends_the_processes(compiler: GrammarCompiler) -> None:
    compiler.compile(OBJECT, param="x")
    assert compiler._idle is not None
    pid = compiler._idle.pid
    assert pid is not None
    compiler.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    compiler.close()


def test_a_grammar_that_reached_a_limit_is_compiled_again(
    compiler: GrammarCompiler, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_process, "_MAX_LEXER_STATES", 40)
    first = compiler.compile("start: /[ab]{90}/", param="x")
    with pytest.raises(GrammarError, match="too complex"):
        all(first.matcher().allowed(_ids(processor, "a") * length) for length in range(90))
    assert compiler.compile("start: /[ab]{90}/", param="x") is not first


def test_a_process_without_such_requests_does_not_load_llguidance() -> None:
    code = "import sys, chiasm.engine.engine, chiasm.server.app, chiasm.server.completions; print('llguidance' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "False"


# ---- answers -------------------------------------------------------------------------------------------------------------


async def test_rows_beside_a_constrained_one_are_not_changed(start: Start) -> None:
    instance = start(Role.AGGREGATED)
    expected = await instance.ask("hello", A, max_tokens=24)
    options: dict[str, Any] = {"grammar": _grammar(instance), "max_tokens": 24}
    beside = await asyncio.gather(instance.ask("hello", A, max_tokens=24), instance.ask("well", **options))
    assert beside[0].token_ids == expected.token_ids
    assert beside[1].text.isalpha()


async def test_preemption_changes_no_constrained_answer(start: Start) -> None:
    roomy = start(Role.AGGREGATED)
    tight = start(Role.AGGREGATED, kv_cache_bytes=roomy.bytes_per_block * 9, max_model_len=144, block_size=4)
    compiled = _grammar(roomy)
    messages = [(name, A) for name in ("abc", "def", "ghi", "jkl")]
    expected = [(await roomy.ask(*parts, max_tokens=32, grammar=compiled)).text for parts in messages]
    answers = await asyncio.gather(*[tight.ask(*parts, max_tokens=32, grammar=compiled) for parts in messages])
    assert [answer.text for answer in answers] == expected
    assert all(len(text) == 30 and text.isalpha() for text in expected)
    assert tight.engine.stats().preemptions > 0
    assert tight.is_empty()


async def test_an_answer_goes_on_in_another_engine_from_its_tokens(start: Start) -> None:
    whole = await start(Role.AGGREGATED).ask("hello", max_tokens=32, grammar=_grammar(start(Role.AGGREGATED)))
    prefill = start(Role.PREFILL)
    for length in (0, 1, 7):
        given = KVTransferParams(do_remote_decode=True, continues=True, output_token_ids=whole.token_ids[:length])
        answer = await prefill.ask("hello", max_tokens=32, grammar=_grammar(prefill), kv=given)
        assert answer.handle.output_token_ids == whole.token_ids[: length + 1]


async def test_tokens_given_that_contradict_the_grammar_fail_their_request_only(start: Start) -> None:
    prefill = start(Role.PREFILL)
    given = KVTransferParams(do_remote_decode=True, continues=True, output_token_ids=prefill.prompt("?!").token_ids[:2])
    with pytest.raises(InvalidRequestError, match="doesn't follow"):
        await prefill.ask("hello", max_tokens=32, grammar=_grammar(prefill), kv=given)
    assert (await prefill.ask("hello", kv=KVTransferParams(do_remote_decode=True))).handle
