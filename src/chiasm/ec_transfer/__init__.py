"""Connectors that move embeddings from the encoders that make them to the instances that read them (EC: encoder cache).

``base`` holds the interface and the factory that makes a connector by its name. ``shared_storage`` is the reference
implementation: ``folder_check`` says whether a folder can be used, ``bounded_folder`` adds and removes its files, and
``entry_file`` defines what is in a file. ``peers`` is the base of those that move embeddings from memory to memory. ``pins``
says where workers in other processes load what a scheduler role has brought in. Importing this package loads no connector and
no torch.
"""

from chiasm.ec_transfer.base import (
    FROM_MEMORY,
    RECEIVING,
    ECConnector,
    ECConnectorFactory,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorStats,
    ECTransferConfig,
    ECTransferRole,
    ItemLike,
    RequestLike,
    check_identifier,
    moves_from_memory,
)
from chiasm.ec_transfer.wake import Wake

__all__ = [
    "FROM_MEMORY",
    "RECEIVING",
    "ECConnector",
    "ECConnectorFactory",
    "ECConnectorMetadata",
    "ECConnectorRole",
    "ECConnectorStats",
    "ECTransferConfig",
    "ECTransferRole",
    "ItemLike",
    "RequestLike",
    "Wake",
    "check_identifier",
    "moves_from_memory",
]
