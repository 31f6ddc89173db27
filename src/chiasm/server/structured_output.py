"""From the fields that say what an answer looks like to a grammar: structured output, and calls of tools.

Grammars are in llguidance's variant of Lark. Whatever of them is wrong is known before a request reaches the engine.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from chiasm.errors import Code, InvalidRequestError
from chiasm.http import Exchange
from chiasm.server.context import GeneratingEngine, ServerContext
from chiasm.server.json_schema import MAX_LEVELS, json_rule
from chiasm.server.protocol import GenerationFields, ResponseFormat, StructuredOutputs
from chiasm.server.tools import Function, Tools

if TYPE_CHECKING:
    from chiasm.engine.grammar import Grammar, GrammarCompiler

MAX_CHOICES_OF_TEXT = 1024
_OUTPUTS = "structured_outputs"
_FORMAT = "response_format"
_SHOWN_CHARACTERS = 50
_ANY_OBJECT = {"type": "object"}


class _Answer(NamedTuple):
    """What an answer without calls looks like."""

    param: str
    rule: str
    """The right side of a rule; empty if ``grammar`` is given."""
    grammar: str = ""
    """A whole grammar of the client's."""


def is_free(request: GenerationFields) -> bool:
    """Whether an answer without calls may be any text."""
    wants_text = request.response_format is None or request.response_format.type == "text"
    return wants_text and request.structured_outputs is None


async def grammar_of(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine,
    request: GenerationFields,
    tools: Tools | None = None,
) -> Grammar | None:
    """Return the grammar of the answer, or None if anything may be answered.

    Raises InvalidRequestError for a schema or a grammar that is malformed or too complex, and DeadlineExceededError.
    """
    if is_free(request) and tools is None:
        return None
    async with exchange.until_deadline():
        return await context.with_grammars(engine.processor, lambda compiler: _compiled(compiler, request, tools))


def _compiled(compiler: GrammarCompiler, request: GenerationFields, tools: Tools | None) -> Grammar | None:
    answer = _answer(request)
    if tools is None:
        if answer is None:
            return None
        return compiler.compile(answer.grammar or f"start: {answer.rule}", param=answer.param)
    if answer is not None and answer.grammar:
        raise InvalidRequestError(
            f"{_OUTPUTS}.grammar and tools cannot be combined; leave one of them out.", param=_OUTPUTS
        )
    arguments = [json_rule(one.parameters, param="tools", strict=one.strict) for one in tools.callable]
    try:
        return compiler.compile(_with_calls(tools, arguments, answer), param="tools")
    except InvalidRequestError as error:
        if error.code == Code.GRAMMAR_TOO_EXPENSIVE:
            raise
        # Which part is it? Each is tried alone, so that the error can say.
        for one, rule in zip(tools.callable, arguments, strict=True):
            _check_alone(compiler, f"start: {rule}", f"The parameters of the tool {one.name!r}", "tools")
        if answer is not None:
            _check_alone(compiler, f"start: {answer.rule}", answer.param, answer.param)
        raise


def _check_alone(compiler: GrammarCompiler, source: str, name: str, param: str) -> None:
    try:
        compiler.compile(source, param=name)
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param=param, code=error.code) from None


# ---- answers without calls -----------------------------------------------------------------------------------------------


def _answer(request: GenerationFields) -> _Answer | None:
    by_format = _by_format(request.response_format)
    if request.structured_outputs is None:
        return by_format
    if by_format is not None:
        raise InvalidRequestError(
            f"{_FORMAT} and {_OUTPUTS} cannot be combined; leave one of them out.", param=_OUTPUTS
        )
    return _by_outputs(request.structured_outputs)


def _by_format(given: ResponseFormat | None) -> _Answer | None:
    match given:
        case None | ResponseFormat(type="text"):
            return None
        case ResponseFormat(type="json_object"):
            return _Answer(_FORMAT, json_rule(_ANY_OBJECT, param=_FORMAT))
        case ResponseFormat(type="json_schema", json_schema=wanted):
            if wanted is None:
                raise InvalidRequestError(f"{_FORMAT} of type json_schema needs the field json_schema.", param=_FORMAT)
            schema = _ANY_OBJECT if wanted.schema is None else wanted.schema
            return _Answer(_FORMAT, json_rule(schema, param=_FORMAT, strict=bool(wanted.strict)))
    raise InvalidRequestError(
        f"{_FORMAT}.type must be text, json_object or json_schema, got {given.type[:_SHOWN_CHARACTERS]!r}.",
        param=_FORMAT,
    )


def _by_outputs(given: StructuredOutputs) -> _Answer:
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(given, name):
            raise InvalidRequestError(
                f"{_OUTPUTS}.{name} is not supported by the built-in engine; leave it out.", param=_OUTPUTS
            )
    kinds = ("json", "regex", "choice", "grammar", "json_object")
    wanted = [name for name in kinds if getattr(given, name) not in (None, False)]
    if len(wanted) != 1:
        raise InvalidRequestError(f"{_OUTPUTS} must have exactly one of {', '.join(kinds)}.", param=_OUTPUTS)
    if given.choice is not None:
        return _Answer(_OUTPUTS, _choices(given.choice))
    if given.regex is not None:
        return _Answer(_OUTPUTS, _pattern(given.regex))
    if given.grammar is not None:
        return _Answer(_OUTPUTS, "", _client_grammar(given.grammar))
    schema = _ANY_OBJECT if given.json is None else _decoded(given.json)
    return _Answer(_OUTPUTS, json_rule(schema, param=_OUTPUTS, any_space=not given.disable_any_whitespace))


def _decoded(schema: object) -> object:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"{_OUTPUTS}.json is not valid JSON: {error}.") from None


def _choices(choices: list[str]) -> str:
    if not 0 < len(choices) <= MAX_CHOICES_OF_TEXT or not all(choices):
        raise _malformed(f"{_OUTPUTS}.choice must have 1 to {MAX_CHOICES_OF_TEXT} texts, none of them empty.")
    return " | ".join(_quoted(choice) for choice in choices)


def _pattern(regex: str) -> str:
    from llguidance import regex_to_lark

    if not regex:
        raise _malformed(f"{_OUTPUTS}.regex is empty.")
    return f"/{regex_to_lark(regex)}/"


def _client_grammar(text: str) -> str:
    from llguidance import grammar_from

    if not text.strip():
        raise _malformed(f"{_OUTPUTS}.grammar is empty.")
    try:
        source = grammar_from("grammar", text)
    except ValueError as error:
        raise _malformed(f"{_OUTPUTS}.grammar is malformed: {error}.") from None
    if source.count(":") > MAX_LEVELS:  # each rule has one, and so has each level of a schema in it
        raise _malformed(
            f"{_OUTPUTS}.grammar has more than {MAX_LEVELS} rules and members of schemas; send a smaller one."
        )
    return source


def _malformed(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=_OUTPUTS, code=Code.INVALID_GRAMMAR)


# ---- answers with calls --------------------------------------------------------------------------------------------------


def _with_calls(tools: Tools, arguments: list[str], answer: _Answer | None) -> str:
    """Return the grammar of answers that call tools, or may.

    If an answer may also be text, its calls begin where the text has the trigger of the format.
    """
    form = tools.format
    tail = form.begin.split(form.trigger, maxsplit=1)[1]
    more = f"({_quoted(form.between) if form.between else ''} call)*" if tools.several else ""
    if tools.mode == "required":
        start = f"call {more}"
    elif answer is not None:
        start = f"answer | call {more}"
    else:
        start = f"TEXT | first {more}"
    rules = [
        "%llguidance {}",
        f"start: {start}",
        f"call: {_quoted(form.begin)} called {_quoted(form.end)}",
        "called: " + " | ".join(f"tool_{index}" for index in range(len(arguments))),
    ]
    for index, (one, rule) in enumerate(zip(tools.callable, arguments, strict=True)):
        rules += [
            f"tool_{index}: {_opening(tools, one)} arguments_{index} {_quoted('}')}",
            f"arguments_{index}: {rule}",
        ]
    if answer is not None:
        rules.append(f"answer: {answer.rule}")
    elif tools.mode == "auto":
        rules += [
            r"TEXT: /(.|\n)*/",
            f"trigger[lazy]: TEXT {_quoted(form.trigger)}",
            f"first: trigger {_quoted(tail) if tail else ''} called {_quoted(form.end)}",
        ]
    return "\n".join(rules) + "\n"


def _opening(tools: Tools, function: Function) -> str:
    return _quoted(tools.format.opening(function.name).removeprefix(tools.format.begin))


def _quoted(text: str) -> str:
    """Return a string of the grammar's language: JSON's, but for one character that may not stand there as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
