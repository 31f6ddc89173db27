"""The KV plane: connectors that move a prompt's attention cache from P to D. Importing this loads no torch."""

from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVConnector,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorStats,
    KVLayout,
    KVTransferConfig,
    KVTransferRole,
)
from chiasm.kv_transfer.factory import KVConnectorFactory

__all__ = [
    "FinishedTransfers",
    "KVConnector",
    "KVConnectorFactory",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVLayout",
    "KVTransferConfig",
    "KVTransferRole",
]
