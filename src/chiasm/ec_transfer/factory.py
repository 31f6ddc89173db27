"""Makes the EC connector that a configuration names. Importing this loads no connector and no torch."""

from __future__ import annotations

from typing import ClassVar

from chiasm.connectors import ClassPath, ConnectorFactory
from chiasm.ec_transfer.base import ECConnector, ECConnectorRole, ECTransferConfig


class ECConnectorFactory(ConnectorFactory[ECTransferConfig, ECConnectorRole, ECConnector]):
    """The EC connectors that are known by name."""

    _plane = "EC"
    _base = ECConnector
    _module_option = "--connector-module-path"
    _registry: ClassVar = {
        "SharedStorageConnector": ClassPath("chiasm.ec_transfer.shared_storage", "SharedStorageConnector"),
    }
