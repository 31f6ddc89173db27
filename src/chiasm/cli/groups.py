"""Options that several commands share, written down once.

A group is a dataclass; each field is an option of the same name, and None means: not given, so that the default is the
configuration's own. A command takes a group as one parameter, and :func:`grouped` turns it into the group's options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints


class OptionGroup:
    """Base of the dataclasses that are groups of options."""

    def given(self) -> dict[str, Any]:
        """The options that were given, by the name of the configuration's field."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the options that were given, as a person writes them."""
        return tuple(_flag(name) for name in self.given())

    @property
    def changed(self) -> tuple[str, ...]:
        """Of the options whose value is not the default, as a person writes them."""
        return tuple(_flag(option.name) for option in fields(self) if getattr(self, option.name) != option.default)  # type: ignore[arg-type]

    def arguments(self) -> tuple[str, ...]:
        """The options that were given, as arguments for another command of chiasm."""
        arguments: list[str] = []
        for name, value in self.given().items():
            for one in value if isinstance(value, tuple | list) else (value,):
                shown = one.resolve() if isinstance(one, Path) else one
                arguments += [_flag(name), str(shown)]
        return tuple(arguments)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of its groups in place of each parameter that is an :class:`OptionGroup`."""
    parameters: list[inspect.Parameter] = []
    shared: list[inspect.Parameter] = []
    groups: dict[str, type[OptionGroup]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, OptionGroup):
            groups[parameter.name] = parameter.annotation
            shared += _options_of(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    parameters += shared  # --help shows what is the command's own first

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            chosen = {option.name: values.pop(option.name) for option in fields(group)}  # type: ignore[arg-type]
            values[name] = group(**{key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items()})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: type[OptionGroup]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields(group)  # type: ignore[arg-type]
    ]
