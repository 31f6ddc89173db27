"""Connectors that move embeddings from the encoders that make them to the instances that read them (EC: encoder cache).

``base`` holds the interface and the factory that makes a connector by its name, ``extra_config`` what can be set of chiasm's
own. ``wake`` tells an engine what has arrived, ``device`` copies that to a GPU, and ``losses`` says at once what is lost.
``faults`` says what an error costs, and ``size_check`` refuses what can never arrive. ``with_store`` puts a store beside a
connector, from the package ``stores``.

``shared_storage`` is the reference implementation: ``folder_check`` says whether a folder can be used, ``bounded_folder`` adds
and removes its files, and ``entry_file`` defines what is in a file. ``lookout`` looks for the files that are awaited.

``peers`` is the base of those that move embeddings from memory to memory: ``shared_memory``, ``tcp`` and ``nixl``. ``holder``
is the side that has embeddings, with ``offers`` (its table); ``reader`` is the side that wants them, with ``wants`` (its table)
and ``sources`` (how they come). ``peer_messages`` is what the two say to each other, and ``entry_memory`` one embedding in
memory.

``arrivals`` brings in what comes without a word, from a folder or a store, with ``intake`` (its table). ``pins`` says where
workers in other processes load what a scheduler role has brought in, and ``publishing`` where they write what it offers.

Importing this package loads no connector and no torch.
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
