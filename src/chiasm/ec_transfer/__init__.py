"""The EC plane: connectors that move encoder output between instances."""

from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorStats,
    ECTransferConfig,
    ECTransferRole,
)
from chiasm.ec_transfer.factory import ECConnectorFactory

__all__ = [
    "ECConnector",
    "ECConnectorFactory",
    "ECConnectorMetadata",
    "ECConnectorRole",
    "ECConnectorStats",
    "ECTransferConfig",
    "ECTransferRole",
]
