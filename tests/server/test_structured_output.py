"""Answers that follow a schema or call tools, with the demo checkpoint, as client libraries ask for them.

The demo checkpoint knows nothing of JSON or tools. So whatever is right in these answers is the grammar's doing.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from chiasm.bounded_process import BoundedProcess
from chiasm.engine import grammar, grammar_process
from tests.server.conftest import Demo
from tests.server.images import image_part, png
from tests.server.serving import post

HI: list[Any] = [{"role": "user", "content": "what colour is it?"}]


class Shape(BaseModel):
    """A shape in an image."""

    colour: Literal["red", "green", "blue"]
    count: int = Field(ge=0, le=9)
    corners: list[Literal["sharp", "round"]] = Field(max_length=3)


SCHEMA = Shape.model_json_schema()
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "draw", "description": "Draws a shape.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clear"}},
]
DRAW: Any = {"type": "function", "function": {"name": "draw"}}


def json_schema(schema: object, **fields: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


# ---- structured output ---------------------------------------------------------------------------------------------------


def test_openais_parse_returns_a_model(demo: Demo) -> None:
    answer = demo.client.chat.completions.parse(model="demo", messages=HI, response_format=Shape)
    assert isinstance(answer.choices[0].message.parsed, Shape)
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_gives_the_same_json(demo: Demo) -> None:
    with demo.client.chat.completions.stream(model="demo", messages=HI, response_format=Shape) as stream:
        final = stream.get_final_completion()
    whole = demo.client.chat.completions.parse(model="demo", messages=HI, response_format=Shape)
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


def test_an_image_is_answered_in_json(demo: Demo) -> None:
    messages = [{"role": "user", "content": [image_part(png(64, 64, "red")), {"type": "text", "text": "what colour?"}]}]
    choice = demo.choice(messages=messages, response_format=json_schema(SCHEMA, strict=True))
    Shape.model_validate_json(choice["message"]["content"])


def test_a_sampled_answer_follows_the_schema_too(demo: Demo) -> None:
    for seed in range(3):
        choice = demo.choice(
            response_format=json_schema(SCHEMA),
            temperature=1.5,
            seed=seed,
            presence_penalty=2.0,
            logit_bias={"5": 100},
        )
        Shape.model_validate_json(choice["message"]["content"])


def test_json_object_is_any_object(demo: Demo) -> None:
    messages = [{"role": "system", "content": f"Answer in JSON of this schema: {json.dumps(SCHEMA)}"}, *HI]
    choice = demo.choice(messages=messages, response_format={"type": "json_object"}, seed=1, temperature=0)
    content = choice["message"]["content"]
    assert content.startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(content), dict)


def test_what_a_schema_does_not_name_stays_out_unless_it_allows_it(demo: Demo) -> None:
    inner = {"type": "object", "properties": {"b": {"enum": [1]}}, "required": ["b"]}
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/inner"}},
        "required": ["a"],
        "$defs": {"inner": inner},
    }
    choice = demo.choice(response_format=json_schema(schema))
    assert json.loads(choice["message"]["content"]) == {"a": {"b": 1}}


_X: dict[str, Any] = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]}
_Y: dict[str, Any] = {"type": "object", "properties": {"y": {"enum": [2]}}, "required": ["y"]}
_REF_X = {"$ref": "#/$defs/x"}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [_REF_X, _Y]},
        {**_Y, **_REF_X},
        {**_Y, "anyOf": [_REF_X]},
        {"allOf": [_Y], "oneOf": [_X]},
        {"allOf": [{"$ref": "#/$defs/alternatives"}, _Y]},
        {"type": "object", "properties": _Y["properties"], "required": ["y", "x"]},
    ],
    ids=["allOf", "$ref", "anyOf", "allOf and oneOf", "by way of another", "required, but not named"],
)
def test_an_object_has_all_properties_that_any_part_of_its_schema_requires(demo: Demo, schema: dict[str, Any]) -> None:
    choice = demo.choice(
        response_format=json_schema({**schema, "$defs": {"x": _X, "alternatives": {"anyOf": [_REF_X]}}})
    )
    answer = json.loads(choice["message"]["content"])
    assert answer["y"] == 2
    assert "x" in answer


@pytest.mark.parametrize("pattern", [r"^(?!no)[a-z]+$", r"^(a)\1$", r"^\bno\b$", "^[^]$"])
def test_a_pattern_that_no_grammar_can_follow_is_ignored_unless_the_schema_is_strict(demo: Demo, pattern: str) -> None:
    """Tools that programs find elsewhere have patterns of JavaScript, such as those of look-ahead."""
    schema = {"properties": {"a": {"type": "string", "pattern": pattern, "maxLength": 3}}, "required": ["a"]}
    tool = {"name": "f", "parameters": schema}
    choice = demo.choice(
        tools=[{"type": "function", "function": tool}], tool_choice="required", parallel_tool_calls=False
    )
    assert len(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["a"]) <= 3
    assert demo.post(tools=[{"type": "function", "function": {**tool, "strict": True}}]).status == 400


def test_a_strict_schema_may_name_its_patterns_and_say_that_names_are_strings(demo: Demo) -> None:
    """As zod writes ``startsWith``, which OpenAI's format doesn't know, and records."""
    text = {"type": "string", "format": "starts_with", "pattern": "^ab$"}
    record = {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"enum": [1]},
        "maxProperties": 1,
    }
    schema = {"type": "object", "properties": {"text": text, "record": record}, "required": ["text", "record"]}
    answer = json.loads(demo.choice(response_format=json_schema(schema, strict=True))["message"]["content"])
    assert answer["text"] == "ab"
    assert set(answer["record"].values()) <= {1}


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"choice": ["yes", 'no "or" é\n']}, r'yes|no "or" é\n'),
        ({"choice": ["\x7f\x01"]}, "\x7f\x01"),
        ({"regex": r"[a-f]{3}-\d{2}/x"}, r"[a-f]{3}-[0-9]{2}/x"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 7}}, "[3-7]"),
        ({"json": '{"type": "boolean"}'}, "true|false"),
        (
            {
                "json": {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2},
                "disable_any_whitespace": True,
            },
            r"\[1,1\]",
        ),
        ({"grammar": 'root ::= "a" ("b" | "c")'}, "a[bc]"),
        ({"grammar": 'start: "a" B\nB: /[bc]/'}, "a[bc]"),
    ],
)
def test_vllms_structured_outputs_are_followed_at_both_endpoints(demo: Demo, outputs: Any, pattern: str) -> None:
    body = {"prompt": "red", "max_tokens": 50, "structured_outputs": outputs, "n": 2, "temperature": 1.0, "seed": 3}
    texts = [choice["text"] for choice in post(demo.completions, body).json["choices"]]
    texts.append(demo.choice(structured_outputs=outputs)["message"]["content"])
    assert all(re.fullmatch(pattern, text) for text in texts), texts


# ---- together with other fields ------------------------------------------------------------------------------------------


def test_a_complete_answer_ends_or_repeats_its_end(demo: Demo) -> None:
    short = {"choice": ["ab"]}
    early = demo.choice(structured_outputs=short, min_tokens=20, max_tokens=30)
    endless = demo.choice(structured_outputs=short, ignore_eos=True, max_tokens=30)
    assert (early["message"]["content"], early["finish_reason"]) == ("ab", "stop")
    assert (endless["message"]["content"], endless["finish_reason"]) == ("ab", "length")


def test_min_tokens_make_an_answer_longer_where_the_grammar_has_more(demo: Demo) -> None:
    choice = demo.choice(structured_outputs={"regex": "a{1,40}"}, min_tokens=20)
    assert len(choice["message"]["content"]) >= 19


def test_a_stop_string_ends_a_structured_answer(demo: Demo) -> None:
    choice = demo.choice(structured_outputs={"choice": ["abcdef"]}, stop=["cd"])
    assert (choice["message"]["content"], choice["stop_reason"]) == ("ab", "cd")


def test_log_probabilities_are_finite_and_those_of_the_tokens(demo: Demo) -> None:
    choice = demo.choice(response_format=json_schema(SCHEMA), logprobs=True, top_logprobs=2)
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).removesuffix("<|im_end|>") == choice["message"]["content"]
    assert all(entry["logprob"] <= 0 for entry in entries)


def test_choices_follow_the_schema_each(demo: Demo) -> None:
    reply = demo.post(response_format=json_schema(SCHEMA), n=3, temperature=1.0, seed=2)
    for choice in reply.json["choices"]:
        Shape.model_validate_json(choice["message"]["content"])


# ---- what client libraries send ------------------------------------------------------------------------------------------

_CLIENTS: dict[str, dict[str, Any]] = {
    "langchain with_structured_output, json_schema": {
        "response_format": json_schema(SCHEMA, strict=True, description="A shape."),
        "temperature": 0.7,
        "stream": False,
    },
    "langchain with_structured_output, function_calling": {
        "tools": TOOLS[:1],
        "tool_choice": DRAW,
        "parallel_tool_calls": False,
        "ls_structured_output_format": {"kwargs": {}, "schema": SCHEMA},
    },
    "AI SDK generateObject": {
        "response_format": json_schema({**SCHEMA, "$schema": "http://json-schema.org/draft-07/schema#"}, strict=True),
        "temperature": 0,
    },
    "AI SDK generateObject of a provider without schemas": {
        "messages": [{"role": "system", "content": "JSON schema:\n" + json.dumps(SCHEMA) + "\nAnswer in JSON."}, *HI],
        "response_format": {"type": "json_object"},
    },
    "litellm": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "draw"}}, "extra_body": {}},
    "instructor": {
        "tools": [{"type": "function", "function": {"name": "Shape", "description": "", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "Shape"}},
    },
    "instructor in JSON mode": {
        "messages": [{"role": "system", "content": "As JSON: " + json.dumps(SCHEMA)}, *HI],
        "response_format": {"type": "json_object", "schema": SCHEMA},
    },
}


@pytest.mark.parametrize("body", _CLIENTS.values(), ids=_CLIENTS.keys())
def test_what_clients_send_is_answered(demo: Demo, body: dict[str, Any]) -> None:
    choice = demo.choice(**body)
    if "tools" in body:
        Shape.model_validate_json(choice["message"]["tool_calls"][0]["function"]["arguments"])
    elif body["response_format"]["type"] == "json_schema":
        Shape.model_validate_json(choice["message"]["content"])
    else:
        assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize("streams", [False, True])
async def test_pydantic_ai_gets_its_model(demo: Demo, streams: bool) -> None:
    provider = OpenAIProvider(base_url=f"{demo.url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("demo", provider=provider), output_type=Shape, instructions="Be brief.")
    if streams:
        async with agent.run_stream("what colour is it?") as result:
            output = await result.get_output()
    else:
        output = (await agent.run("what colour is it?")).output
    assert isinstance(output, Shape)


# ---- what is refused -----------------------------------------------------------------------------------------------------

_DEEP: dict[str, Any] = {}
for _ in range(100):
    _DEEP = {"type": "array", "items": _DEEP}
_MANY = {"type": "object", "properties": {f"a-rather-long-name-{number}": SCHEMA for number in range(2000)}}


def _chain(links: int) -> dict[str, Any]:
    """A schema that is as deep as it has references."""
    links_by_name = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**links_by_name, f"d{links}": {"enum": [1]}}}


def _rules(links: int) -> str:
    return "\n".join(["start: r0", *(f"r{number}: r{number + 1}" for number in range(links)), f'r{links}: "a"'])


def _tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def _call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs"),
        ({"response_format": json_schema({"type": "strin"})}, "response_format", "strin"),
        ({"response_format": json_schema([1])}, "response_format", "object"),
        ({"response_format": json_schema({"$ref": "http://127.0.0.1/x"})}, "response_format", "127.0.0.1"),
        ({"response_format": json_schema({"enum": []})}, "response_format", "Unsatisfiable"),
        ({"response_format": json_schema(_DEEP)}, "response_format", "64 levels"),
        ({"response_format": json_schema(_MANY)}, "response_format", "limit"),
        ({"response_format": json_schema(_chain(9000))}, "response_format", "8192 levels"),
        ({"structured_outputs": {"json": _chain(9000)}}, "structured_outputs", "8192 levels"),
        ({"structured_outputs": {"grammar": _rules(9000)}}, "structured_outputs", "8192 rules"),
        (
            {"tools": [_tool(parameters={"properties": {"x": {"$ref": "#/$defs/d0"}}, **_chain(9000)})]},
            "tools",
            "8192 levels",
        ),
        (
            {"response_format": json_schema({"type": "array", "uniqueItems": True}, strict=True)},
            "response_format",
            "uniqueItems",
        ),
        (
            {"response_format": json_schema({"type": "string", "format": "nanoid"}, strict=True)},
            "response_format",
            "nanoid",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "1 to"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not valid JSON"),
        ({"structured_outputs": {"grammar": "nope"}}, "structured_outputs", "malformed"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "not supported"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "combined",
        ),
        ({"structured_outputs": {"grammar": 'start: "a"'}, "tools": TOOLS}, "structured_outputs", "combined"),
        ({"tools": [_tool("a b")]}, "tools", "letters"),
        ({"tools": [_tool("a" * 65)]}, "tools", "64"),
        ({"tools": [_tool(f"f{number}") for number in range(129)]}, "tools", "128"),
        ({"tools": [_tool(), _tool()]}, "tools", "'f'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "'function'"),
        ({"tools": [_tool(parameters={"type": "string"})]}, "tools", "'object'"),
        ({"tools": [_tool(parameters={"properties": {"x": {"type": "strin"}}})]}, "tools", "'f'"),
        ({"tools": [_tool(parameters=_DEEP)]}, "tools", "64 levels"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "paint"}}}, "tool_choice", "paint"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice", "required"),
        ({"tool_choice": "required"}, "tool_choice", "empty"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
            },
            "tool_choice",
            "no tool",
        ),
        ({"tools": [_tool(description="long " * 60_000)]}, "tools", "context"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"guided_json": {"type": "object"}}, "guided_json", "structured_outputs"),
        ({"chat_template_kwargs": {"x": _DEEP}}, "chat_template_kwargs", "64 levels"),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [_call(json.dumps(_DEEP))]}]},
            "messages",
            "64 levels",
        ),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "function"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    demo: Demo, fields: dict[str, Any], param: str, says: str
) -> None:
    reply = demo.post(**fields)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert says in reply.error["message"]
    assert reply.error["message"].endswith(".")
    assert "\n" not in reply.error["message"]


@pytest.mark.parametrize("outputs", [{"json": _chain(2600)}, {"grammar": _rules(8000)}], ids=["schema", "grammar"])
def test_a_grammar_as_deep_as_one_may_be_leaves_the_instance_alive(demo: Demo, outputs: dict[str, Any]) -> None:
    assert demo.post(structured_outputs=outputs, max_tokens=1).status in (200, 400)
    assert demo.post(max_tokens=1).status == 200


def test_tools_that_take_too_long_to_compile_are_not_tried_one_by_one(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bytes] = []
    ask = BoundedProcess.ask

    def counted(process: BoundedProcess, *order: bytes, cpu_seconds: float) -> bytes:
        tried.append(b"".join(order))
        return ask(process, *order, cpu_seconds=cpu_seconds)

    monkeypatch.setattr(BoundedProcess, "ask", counted)
    monkeypatch.setattr(grammar, "MAX_COMPILE_SECONDS", 0.5)
    slow = {"allOf": [{"type": "string", "pattern": f"^.*a{{{number}}}b.*$"} for number in range(1, 50)]}
    reply = demo.post(tools=[_tool("f"), _tool("g", parameters={"properties": {"x": slow}})])
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "grammar_too_expensive", "tools")
    assert len(tried) == 1


def test_a_pattern_that_grows_too_complex_costs_its_own_request_only(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"structured_outputs": {"regex": "[ab]{90}"}}
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "_MAX_LEXER_STATES", 40)
        reply = demo.post(**body)
    assert reply.status == 400
    assert reply.error["code"] == "invalid_grammar"
    assert "too complex" in reply.error["message"]
    assert len(demo.choice(**body)["message"]["content"]) == 90
