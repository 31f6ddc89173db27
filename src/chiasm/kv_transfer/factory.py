"""Makes the KV connector that a configuration names. Importing this loads no connector, no torch and no nixl."""

from __future__ import annotations

from typing import ClassVar

from chiasm.connectors import ClassPath, ConnectorFactory
from chiasm.kv_transfer.base import KVConnector, KVConnectorRole, KVTransferConfig


class KVConnectorFactory(ConnectorFactory[KVTransferConfig, KVConnectorRole, KVConnector]):
    """The KV connectors that are known by name."""

    _plane = "KV"
    _base = KVConnector
    _module_option = "--kv-connector-module-path"
    _registry: ClassVar = {
        "SharedMemoryConnector": ClassPath("chiasm.kv_transfer.shared_memory", "SharedMemoryConnector"),
        "NixlConnector": ClassPath("chiasm.kv_transfer.nixl", "NixlConnector"),
    }
