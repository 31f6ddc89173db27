"""The JSON schemas that clients send: checked, and written into a grammar."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import unquote

from chiasm.errors import Code, InvalidRequestError

MAX_DEPTH = 64
"""How deep JSON may be nested that is read level by level: in schemas, and in what is given to chat templates."""
MAX_LEVELS = 8192
"""How many levels a grammar may have in all, where one leads to the next by a reference: its compiler enters each from the one
before, and a thread whose stack is full ends the process."""
_WHITE_SPACE = " "
"""What may stand between the tokens of JSON. Small models otherwise spend their answers on lines and indentation."""
_MAX_TRIALS = 256
_MAX_TRIED_CHARACTERS = 1024
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PARTS = ("allOf", "anyOf", "oneOf")
_SCHEMA_LISTS = (*_PARTS, "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems", "contains")
_SAYS_WHAT_ELSE = (
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "allOf",
    "$ref",
    "anyOf",
    "oneOf",
)


def json_rule(schema: object, *, param: str, strict: bool = False, any_space: bool = True) -> str:
    """Return a schema as the right side of a rule of a grammar.

    Objects have no other properties than those that they name, unless the schema says more about them. With ``strict``, the
    grammar's compiler refuses keywords and patterns that it can't enforce; otherwise they are ignored. Without ``any_space``,
    the JSON has no white space outside of strings. Raises InvalidRequestError. It may take tenths of a second; don't call it
    on an event loop.
    """
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            f"{param} needs a JSON schema that is an object.", param=param, code=Code.INVALID_GRAMMAR
        )
    check_depth(schema, param, param=param)
    _check_levels(schema, param)
    # oneOf means anyOf here: a grammar can't count how many alternatives fit.
    options: dict[str, object] = {"lenient": not strict, "coerce_one_of": True}
    options |= {"whitespace_pattern": _WHITE_SPACE} if any_space else {"whitespace_flexible": False}
    return "%json " + json.dumps(
        {**_closed(schema, _shared(schema), _Trials(strict=strict)), "x-guidance": options}, ensure_ascii=False
    )


def check_depth(value: object, name: str, *, param: str) -> None:
    """Raise InvalidRequestError if JSON, which a client knows as ``name``, is nested too deeply."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return
        level = inner
    raise InvalidRequestError(f"{name} has JSON that is nested more than {MAX_DEPTH} levels deep.", param=param)


def _check_levels(schema: Mapping[str, Any], param: str) -> None:
    """Raise InvalidRequestError if a schema and all that its references name have too many levels together."""
    left: list[object] = [schema]
    seen: set[int] = set()
    levels = 0
    while left:
        level = [left.pop()]
        while level and levels <= MAX_LEVELS:
            levels += 1
            inner: list[object] = []
            for one in level:
                if isinstance(one, dict):
                    inner += one.values()
                    if isinstance(ref := one.get("$ref"), str) and id(target := _at(schema, ref)) not in seen:
                        seen.add(id(target))
                        left.append(target)
                elif isinstance(one, list):
                    inner += one
            level = inner
        if levels > MAX_LEVELS:
            raise InvalidRequestError(
                f"{param} has a schema of more than {MAX_LEVELS} levels, with those to which its references lead; send smaller "
                "schemas.",
                param=param,
                code=Code.INVALID_GRAMMAR,
            )


class _Trials:
    """Tries keywords of a schema by themselves, since its compiler refuses all of it for one of them. Each takes about 1 ms."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._left = _MAX_TRIALS

    def leave_out(self, schema: dict[str, Any]) -> None:
        """Take out of a schema what says nothing, and, unless it is strict, what can't be followed."""
        if "pattern" in schema:
            if self._fails("format", schema.get("format")):
                del schema["format"]  # the pattern says it: clients give patterns names of their own
            if not self._strict and self._fails("pattern", schema["pattern"]):
                del schema["pattern"]
        if schema.get("propertyNames") == {"type": "string"}:
            del schema["propertyNames"]

    def _fails(self, keyword: str, value: object) -> bool:
        """Whether a keyword can't be followed. One that isn't tried is left to the compiler."""
        if not isinstance(value, str) or len(value) > _MAX_TRIED_CHARACTERS or not self._left:
            return False
        self._left -= 1
        return not _can_be_followed(keyword, value)


@functools.lru_cache(maxsize=1024)
def _can_be_followed(keyword: str, value: str) -> bool:
    from llguidance import LLMatcher

    alone = "start: %json " + json.dumps({"type": "string", keyword: value})
    return not LLMatcher.validate_grammar(f"%llguidance {{}}\n{alone}")


def _closed(schema: Mapping[str, Any], shared: Collection[int], trials: _Trials) -> dict[str, Any]:
    """Return the schema with ``additionalProperties: false`` in each object that names its properties and says no more.

    Those in ``shared`` stay as they are, and so do negations.
    """
    closed: dict[str, Any] = dict(schema)
    trials.leave_out(closed)
    for key in _SCHEMAS_BY_NAME:
        if isinstance(named := closed.get(key), dict):
            closed[key] = {
                name: _closed(value, shared, trials) if isinstance(value, dict) else value
                for name, value in named.items()
            }
    for key in _SCHEMA_LISTS:
        if isinstance(several := closed.get(key), list):
            closed[key] = [_closed(value, shared, trials) if isinstance(value, dict) else value for value in several]
    for key in _SCHEMAS:
        if isinstance(one := closed.get(key), dict):
            closed[key] = _closed(one, shared, trials)
    if id(schema) not in shared and _names_all(schema) and not any(key in closed for key in _SAYS_WHAT_ELSE):
        closed["additionalProperties"] = False
    return closed


def _names_all(schema: Mapping[str, Any]) -> bool:
    """Whether the properties that the schema names can be all that an object has: those that it requires are among them."""
    properties, required = schema.get("properties"), schema.get("required")
    return isinstance(properties, dict) and not (
        isinstance(required, list) and any(isinstance(name, str) and name not in properties for name in required)
    )


def _shared(schema: Mapping[str, Any]) -> set[int]:
    """Return by ``id`` the parts of a schema that describe an object together with other parts, which have properties too.

    To forbid others in one of them would forbid those of the other parts. Such are the parts of ``allOf``, or alternatives or a
    ``$ref`` beside properties.
    """
    seen: set[tuple[int, bool]] = set()
    left: list[tuple[object, bool]] = [(schema, False)]
    while left:
        one, is_shared = left.pop()
        if isinstance(one, list):
            left += [(item, is_shared) for item in one]
        if not isinstance(one, dict) or (id(one), is_shared) in seen:
            continue
        seen.add((id(one), is_shared))
        shares = is_shared or _num_parts(one) > 1
        for key, value in one.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                left += [(item, False) for item in value.values()]
            elif key == "$ref" and isinstance(value, str) and shares:
                left.append((_at(schema, value), True))
            else:
                left.append((value, shares and key in _PARTS))
    return {one for one, is_shared in seen if is_shared}


def _num_parts(schema: Mapping[str, Any]) -> int:
    """Return how many parts of it may name properties of one object."""
    all_of = schema.get("allOf")
    others = sum(key in schema for key in ("properties", "patternProperties", "$ref", "anyOf", "oneOf"))
    return others + (len(all_of) if isinstance(all_of, list) else 0)


def _at(schema: object, ref: str) -> object:
    """Return what a ``$ref`` names within the schema; None if that is nothing."""
    for step in unquote(ref).removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema
