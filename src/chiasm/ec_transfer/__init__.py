"""The EC plane: connectors that move encoder output between instances."""

from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorStats,
    ECTransferConfig,
    ECTransferRole,
    ItemLike,
    RequestLike,
)
from chiasm.ec_transfer.factory import ECConnectorFactory
from chiasm.ec_transfer.identifiers import check_identifier

__all__ = [
    "ECConnector",
    "ECConnectorFactory",
    "ECConnectorMetadata",
    "ECConnectorRole",
    "ECConnectorStats",
    "ECTransferConfig",
    "ECTransferRole",
    "ItemLike",
    "RequestLike",
    "check_identifier",
]
