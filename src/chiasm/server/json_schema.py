"""The JSON schemas that clients send: checked, and written into a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chiasm.errors import Code, InvalidRequestError

MAX_DEPTH = 64
"""How deep JSON may be nested that is read level by level: in schemas, and in what is given to chat templates."""
_WHITE_SPACE = " "
"""What may stand between the tokens of JSON. Small models otherwise spend their answers on lines and indentation."""
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")
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
    grammar's compiler refuses keywords that it can't enforce; otherwise they are ignored. Without ``any_space``, the
    JSON has no white space outside of strings. Raises InvalidRequestError.
    """
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            f"{param} needs a JSON schema that is an object.", param=param, code=Code.INVALID_GRAMMAR
        )
    check_depth(schema, param, param=param)
    # oneOf means anyOf here: a grammar can't count how many alternatives fit.
    options: dict[str, object] = {"lenient": not strict, "coerce_one_of": True}
    options |= {"whitespace_pattern": _WHITE_SPACE} if any_space else {"whitespace_flexible": False}
    return "%json " + json.dumps({**_closed(schema), "x-guidance": options}, ensure_ascii=False)


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


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with ``additionalProperties: false`` in each object that names its properties and says no more.

    Parts of ``allOf`` and of negations stay as they are, since there it would forbid the properties of the other parts.
    """
    closed: dict[str, Any] = dict(schema)
    for key in _SCHEMAS_BY_NAME:
        if isinstance(named := closed.get(key), dict):
            closed[key] = {name: _closed(value) if isinstance(value, dict) else value for name, value in named.items()}
    for key in _SCHEMA_LISTS:
        if isinstance(several := closed.get(key), list):
            # Beside properties, alternatives add to them.
            closed[key] = [
                _closed(value) if isinstance(value, dict) and "properties" not in schema else value for value in several
            ]
    for key in _SCHEMAS:
        if isinstance(one := closed.get(key), dict):
            closed[key] = _closed(one)
    if isinstance(closed.get("properties"), dict) and not any(key in closed for key in _SAYS_WHAT_ELSE):
        closed["additionalProperties"] = False
    return closed
