"""Specific to TCP: a consumer reads what it has claimed, while it has claimed it, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVConnectorRole, KVTransferConfig, KVTransferRole
from chiasm.kv_transfer.messages import Claim, Granted, Release
from chiasm.kv_transfer.tcp import TcpConnector
from chiasm.transfer.memory import Memory, Peer, Run
from chiasm.transfer.tcp import TcpPlane

from .conftest import Make
from .instance import LAYOUT
from .raw_peers import RawConsumer

BLOCK = LAYOUT.bytes_per_block


def test_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="NixlConnector"):
        TcpConnector(KVTransferConfig(device="cuda:0"), KVConnectorRole.WORKER)


def test_blocks_are_readable_from_the_grant_to_its_end(make: Make) -> None:
    prefill = make("TcpConnector", KVTransferRole.PRODUCER)
    prefill.prefill("p", [3, 4])
    prefill.prefill("q", [6])
    target = np.zeros(BLOCK, np.uint8)
    with RawConsumer(prefill) as consumer:
        welcome = consumer.welcome()
        host, port = (prefill.worker.get_handshake_metadata()[name] for name in ("host", "port"))
        plane, memory = TcpPlane(), Memory(target.ctypes.data, BLOCK, owner=target)
        reached = plane.reach(Peer(str(host), int(port)), welcome.memory, memory)

        def is_readable(block: int) -> bool:
            return reached.read([Run(0, block * BLOCK, BLOCK)], lambda: False)

        assert not is_readable(3)
        assert consumer.ask(Claim(1, "p", [3, 4], 60.0)) == Granted(1)
        assert is_readable(4)
        assert np.array_equal(target, prefill.blocks[4].numpy())
        assert not is_readable(2)
        assert not is_readable(6)
        consumer.say(Release(1))
        assert consumer.ask(Claim(2, "q", [6], 0.01)) == Granted(2)
        prefill.wait_for(lambda seen: seen.sent == {"p", "q"})
        assert not is_readable(3)
        assert not is_readable(6)
        reached.close()
