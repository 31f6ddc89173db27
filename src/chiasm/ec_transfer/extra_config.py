"""The settings that belong to one connector: what ``ECTransferConfig.connector_extra_config`` may hold for chiasm's own.

Importing this loads no connector and no torch, so the command line can make options of these classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.options import Option, flag, options_of


@dataclass(frozen=True)
class SharedStorageConfig:
    """What only SharedStorageConnector is configured with."""

    shared_storage_path: Annotated[Path, Option("Folder through which instances exchange embeddings.")]


@dataclass(frozen=True)
class PeerConfig:
    """What only the connectors from memory to memory are configured with. A consumer uses neither."""

    host: Annotated[
        str,
        Option("Address at which others reach the embeddings of this encoder (also its bind address).", name="ec_host"),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        msgspec.Meta(ge=0, le=65535),
        Option("Port at that address; 0 takes a free one.", name="ec_port", min=0, max=65535),
    ] = 0


EXTRA_CONFIGS: Mapping[str, type] = {
    "SharedMemoryConnector": PeerConfig,
    "TcpConnector": PeerConfig,
    "NixlConnector": PeerConfig,
    "SharedStorageConnector": SharedStorageConfig,
}
"""The class of each connector's own settings; connectors that aren't chiasm's have classes of their own, or none."""
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
