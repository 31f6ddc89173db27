"""Which fields of the configurations a person can set on the command line: the one source of all options.

A field becomes an option by its annotation::

    max_num_seqs: Annotated[int, Option("Sequences that compute at the same time.", min=1)] = 64

The option has the field's name, ``--max-num-seqs``, its type and its default. *Settings* are values of options by
name: what a person gave, and nothing else, so that the defaults stay the configurations' own.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from chiasm.errors import ConfigurationError


@dataclass(frozen=True)
class Option:
    """Makes a field of a configuration an option."""

    help: str
    """One sentence for --help."""
    name: str = ""
    """Name of the option, if the field's own would be ambiguous."""
    metavar: str = ""
    """What stands for the value in --help; by default it follows from the type."""
    unset: str = ""
    """What --help shows as the default of a field whose default is None or empty."""
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    separator: str = ""
    """Separates the values of a tuple; if empty, the option is repeated instead."""
    json: str = ""
    """An example of the JSON that a person writes: a list of strings for a tuple, an object for a mapping."""
    environment: str = ""
    """Environment variable that is read if the option is not given."""


class NamedOption(NamedTuple):
    """An option with what its field adds."""

    name: str
    field: str
    type: Any
    """The field's type without ``| None``."""
    default: Any
    """None if the field has none of its own."""
    option: Option

    @property
    def flag(self) -> str:
        """The option as a person writes it."""
        return flag(self.name)


def flag(name: str) -> str:
    """Return the option called ``name`` as a person writes it."""
    return f"--{name.replace('_', '-')}"


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigurationError unless these fields of a configuration are more than 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigurationError(f"{_written(config, name)} must be positive.")


def check_not_negative(config: object, *names: str) -> None:
    """Raise ConfigurationError unless these fields of a configuration are at least 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigurationError(f"{_written(config, name)} must not be negative.")


@functools.cache
def options_of(config: type) -> tuple[NamedOption, ...]:
    """Return the options among the fields of a dataclass, in order."""
    hints = get_type_hints(config, include_extras=True)
    found = []
    for field in dataclasses.fields(config):
        for option in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(option, Option):
                base = _without_none(hints[field.name].__origin__)
                default = None if field.default is MISSING else field.default
                found.append(NamedOption(option.name or field.name, field.name, base, default, option))
    return tuple(found)


def names_of(*configs: type) -> set[str]:
    """Return the names of the options of these dataclasses."""
    return {option.name for config in configs for option in options_of(config)}


def fields_from(settings: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Return the settings that are options of ``config``, by the names of its fields."""
    return {option.field: settings[option.name] for option in options_of(config) if option.name in settings}


def _written(config: object, field: str) -> str:
    """Return a field as a person writes it: as an option, if it is one."""
    kind: type = type(config)
    return next((one.flag for one in options_of(kind) if one.field == field), field)


def _without_none(hint: Any) -> Any:
    if not isinstance(hint, types.UnionType):
        return hint
    (chosen,) = (part for part in get_args(hint) if part is not types.NoneType)
    return chosen
