"""Reads the settings that belong to one connector, which only it understands."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.options import flag, options_of

_ConfigT = TypeVar("_ConfigT")


def read_extra_config(
    connector: str, extra: Mapping[str, Any], kind: type[_ConfigT], *, others: Collection[str] = ()
) -> _ConfigT:
    """Return the settings of a connector as ``kind``, a dataclass.

    Raises ConfigurationError, by name, for one that is missing, unknown or of the wrong type. ``others`` are the names of
    settings that may stand beside them, for the message about an unknown one.
    """
    config: type = kind
    fields = dataclasses.fields(config)
    names = [field.name for field in fields]
    if unknown := sorted(extra.keys() - set(names)):
        raise ConfigurationError(
            f"{connector} has no setting {', '.join(map(repr, unknown))}; its settings are {', '.join([*others, *names])}."
        )
    told = {option.field: f" ({flag(option.name)}): {option.option.help}" for option in options_of(config)}
    for field in fields:
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and extra.get(field.name) in (None, ""):
            raise ConfigurationError(f"{connector} needs {field.name}{told.get(field.name, '.')}")
    try:
        return msgspec.convert(extra, kind, dec_hook=lambda wanted, value: wanted(value))  # a path is a string in JSON
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"A setting of {connector} has the wrong type: {error}.") from None
