from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from chiasm.kv_transfer import KVTransferRole
from chiasm.transfer.nixl import MODULES

from ..transfer.holder import be_patient
from .gated_connector import GATE
from .instance import Instance, config_for

HAS_NIXL = any(importlib.util.find_spec(name) for name in MODULES)
NEEDS_NIXL = pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed")

Make = Callable[..., Instance]


@pytest.fixture(autouse=True, scope="package")
def _patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        be_patient(patch)
        yield


@pytest.fixture(
    params=[
        "SharedMemoryConnector",
        "TcpConnector",
        pytest.param("NixlConnector", marks=NEEDS_NIXL),
        pytest.param("NixlConnector over TCP", marks=NEEDS_NIXL),
    ]
)
def connector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each connector; NIXL over its best transport, and over TCP, which needs the producer's part."""
    name, _, way = request.param.partition(" over ")
    if way:
        monkeypatch.setenv("UCX_TLS", way.lower())
    return str(name)


@pytest.fixture
def make() -> Iterator[Make]:
    """Create instances, and shut them down at the end."""
    with ExitStack() as stack:

        def make(connector: str, role: KVTransferRole, *arguments: Any, **changes: Any) -> Instance:
            instance = Instance(config_for(connector, role, **changes), *arguments)
            stack.callback(instance.shutdown)
            return instance

        yield make


@pytest.fixture
def prefill(make: Make, connector: str) -> Instance:
    return make(connector, KVTransferRole.PRODUCER)


@pytest.fixture
def decode(make: Make, connector: str) -> Instance:
    return make(connector, KVTransferRole.CONSUMER)


@pytest.fixture
def gated(make: Make) -> Iterator[tuple[Instance, Instance]]:
    """A producer and a consumer whose copies wait until the test lets them go on."""
    GATE.close()
    module = "tests.kv_connector.gated_connector"
    yield (
        make("GatedConnector", KVTransferRole.PRODUCER, connector_module_path=module),
        make("GatedConnector", KVTransferRole.CONSUMER, connector_module_path=module),
    )
    GATE.open()
