"""Where options come from besides the command line: a YAML file (``--config``) and variables of the environment.

The command line counts before the environment, and the environment before the file; what none of them gives is the default.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigurationError
from chiasm.wire import UNREADABLE_YAML
from chiasm.yaml_text import read_yaml

VARIABLE_PREFIX = "CHIASM_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_OF_KUBERNETES = "tcp://"
"""Kubernetes itself sets CHIASM_PORT to such a URL in every pod beside a service that is called chiasm."""


def read_file(path: Path) -> dict[str, Any]:
    """Return what a YAML file says, by the names of options, in which dashes and underscores are the same.

    Raises ConfigurationError.
    """
    try:
        members = read_yaml(path.read_bytes(), dict[str, Any] | None) or {}
    except OSError as error:
        raise ConfigurationError(f"--config: {path} cannot be read: {error.strerror}.") from None
    except UNREADABLE_YAML as error:
        raise ConfigurationError(
            f"--config: {path} is not a YAML file of options: {' '.join(str(error).split())}."
        ) from None
    found: dict[str, Any] = {}
    for written, value in members.items():
        name = written.replace("-", "_")
        if name in found:
            raise ConfigurationError(f"--config: {path} has {written} twice.")
        found[name] = value
    return found


def value_in_file(
    action: argparse.Action, value: Any, join: Callable[[list[str]], str], *, is_json: bool = False
) -> Any:
    """Return the value of an option as the command line would give it.

    ``join`` makes one text of a list, as a person would write it; ``is_json`` says that the option takes a JSON object.
    Raises ValueError with what is wrong.
    """
    if is_json and isinstance(value, dict):
        return read(action, json.dumps(value, default=str))
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        return tuple(read(action, _text(one, action)) for one in (value if isinstance(value, list) else [value]))
    if isinstance(value, list):
        return read(action, join([_text(one, action) for one in value]))
    return read(action, _text(value, action))


def value_in_environment(action: argparse.Action, text: str) -> Any:
    """The same of a variable. Options that can be repeated take several values, with blanks between them."""
    if isinstance(action, argparse._StoreTrueAction):
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{text!r} is not one of {', '.join((*_TRUE, *_FALSE))}")
        return text.lower() in _TRUE
    if isinstance(action, argparse._AppendAction):
        return tuple(read(action, one) for one in text.split() or [text])
    return read(action, text)


def of_environment(names: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of those variables that are set, by the names of their options."""
    found = {name: environment[variable] for name, variable in names.items() if variable in environment}
    if found.get("port", "").startswith(_OF_KUBERNETES):
        del found["port"]
    return found


def read(action: argparse.Action, text: str) -> Any:
    """Return what an option makes of a text. Raises ValueError with what is wrong."""
    try:
        return action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def joined(separator: str, *, is_json: bool, is_command_line: bool) -> Callable[[list[str]], str]:
    """Return what makes one text of a list."""
    if is_command_line:
        return shlex.join
    return json.dumps if is_json else separator.join


def _text(value: Any, action: argparse.Action) -> str:
    if value is None or isinstance(value, (dict, list)):
        raise ValueError("has no value" if value is None else "must be one value")
    if isinstance(value, bool):  # YAML takes on and off, yes and no, for these
        words = action.metavar.split("|") if isinstance(action.metavar, str) else []
        return ("on" if value else "off") if "on" in words else ("true" if value else "false")
    return str(value)
