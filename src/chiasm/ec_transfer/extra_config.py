"""The settings that belong to one connector: what ``ECTransferConfig.connector_extra_config`` may hold for chiasm's own.

Importing this loads no connector and no torch, so the command line can make options of these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from chiasm.options import Option


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
