"""The KV plane: connectors that move the attention cache of a prompt from P to D. Importing this loads no torch.

In the order in which a request passes: ``base.py`` is the interface that engines use, ``pull.py`` its implementation for
connectors whose consumers pull. ``messages.py`` has the messages between consumer and producer. ``puller.py`` is the consumer's
side of that conversation, ``lease_server.py`` the producer's, and ``leases.py`` the table of what it holds. ``blocks.py`` says
which bytes blocks are. ``shared_memory.py``, ``tcp.py`` and ``nixl.py`` are the connectors, each of which names a data plane.
``faults.py`` has what an error of a connector costs a request.
"""

from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVConnector,
    KVConnectorFactory,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorStats,
    KVLayout,
    KVTransferConfig,
    KVTransferRole,
)

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
