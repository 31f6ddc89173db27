"""What a chat may call: the fields ``tools``, ``tool_choice`` and ``parallel_tool_calls``, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from chiasm.errors import InvalidRequestError
from chiasm.models.tool_format import ToolFormat
from chiasm.server.json_schema import check_depth
from chiasm.server.protocol import ChatRequest

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SHOWN_CHARACTERS = 64
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Function:
    """One tool."""

    name: str
    parameters: dict[str, Any]
    """A JSON schema of an object."""
    strict: bool


@dataclass(frozen=True)
class Tools:
    """What an answer may call, and whether it has to."""

    shown: Sequence[dict[str, Any]]
    """All tools of the request, for the prompt."""
    callable: Sequence[Function]
    mode: Literal["auto", "required"]
    several: bool
    """Whether one answer may have several calls."""
    format: ToolFormat


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct):
    function: _Function


class _Named(msgspec.Struct):
    name: str


class _Choice(msgspec.Struct):
    type: str
    function: _Named | None = None
    allowed_tools: _Allowed | None = None


class _NamedTool(msgspec.Struct):
    function: _Named
    type: str = "function"


class _Allowed(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[_NamedTool]


def tools_of(request: ChatRequest, tool_format: ToolFormat | None) -> Tools | None:
    """Return what the answer may call; None if that is nothing. Raises InvalidRequestError."""
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(_bounded(request.tools or []))]
    names = [function.name for function in functions]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise InvalidRequestError(f"tools has several functions with the name {min(doubles)!r}.", param="tools")
    mode, chosen = _choice(request.tool_choice)
    if chosen == []:
        raise InvalidRequestError(
            "tool_choice allows no tool; name those that it allows, or send 'none'.", param="tool_choice"
        )
    if not functions and (mode == "required" or chosen is not None):
        raise InvalidRequestError("tool_choice names or requires a tool, but tools is empty.", param="tool_choice")
    if not functions or mode == "none":
        return None
    if unknown := [name for name in chosen or () if name not in names]:
        raise InvalidRequestError(
            f"tool_choice names {unknown[0][:_SHOWN_CHARACTERS]!r}, which is not in tools.", param="tool_choice"
        )
    if tool_format is None:
        raise InvalidRequestError(
            "The chat template of this model writes calls of tools in a form that the built-in engine doesn't know; leave "
            "tools out, or serve the model with --engine vllm.",
            param="tools",
        )
    is_named = isinstance(request.tool_choice, dict) and request.tool_choice.get("type") == "function"
    return Tools(
        shown=request.tools or [],
        callable=[function for function in functions if chosen is None or function.name in chosen],
        mode=mode,
        several=request.parallel_tool_calls is not False and not is_named,
        format=tool_format,
    )


def _bounded(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"There are {len(tools)} tools and {MAX_TOOLS} is the limit.", param="tools")
    return tools


def _function(tool: dict[str, Any], where: str) -> Function:
    kind = tool.get("type", "function")
    if kind != "function":
        raise InvalidRequestError(
            f"{where}.type must be 'function', got {str(kind)[:_SHOWN_CHARACTERS]!r}.", param="tools"
        )
    check_depth(tool, where, param="tools")
    try:
        function = msgspec.convert(tool, _Tool).function
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{where} is malformed: {error}.", param="tools") from None
    if not _NAME.fullmatch(function.name):
        raise InvalidRequestError(
            f"{where}.function.name must be 1 to 64 letters, digits, underscores or hyphens, got "
            f"{function.name[:_SHOWN_CHARACTERS]!r}.",
            param="tools",
        )
    parameters = function.parameters or _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(f"{where}.function.parameters must be a schema of type 'object'.", param="tools")
    return Function(function.name, {**parameters, "type": "object"}, bool(function.strict))


def _choice(value: object) -> tuple[Literal["none", "auto", "required"], list[str] | None]:
    """Return the mode, and the names to choose from if the request limits them."""
    match value:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return value, None
    try:
        choice = msgspec.convert(value, _Choice)
    except msgspec.ValidationError:
        choice = _Choice("")
    if choice.type == "function" and choice.function is not None:
        return "required", [choice.function.name]
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
    raise InvalidRequestError(
        'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": …}}, or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}.',
        param="tool_choice",
    )
