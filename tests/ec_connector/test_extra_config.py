"""Each connector has settings of its own, which only it understands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiasm.connectors.extra_config import read_extra_config
from chiasm.ec_transfer import ECConnectorFactory, ECTransferConfig
from chiasm.ec_transfer.extra_config import PeerConfig, SharedStorageConfig
from chiasm.errors import ConfigurationError


def test_settings_come_as_json_has_them() -> None:
    assert read_extra_config("X", {"shared_storage_path": "/s"}, SharedStorageConfig) == SharedStorageConfig(Path("/s"))
    assert read_extra_config("X", {"port": 7000}, PeerConfig) == PeerConfig("127.0.0.1", 7000)


@pytest.mark.parametrize(
    ("connector", "extra", "said"),
    [
        ("SharedStorageConnector", {}, r"needs shared_storage_path \(--shared-storage-path\): Folder"),
        ("SharedStorageConnector", {"shared_storage_path": ""}, "needs shared_storage_path"),
        ("SharedStorageConnector", {"shared_storage_path": 7}, r"wrong type: .*shared_storage_path"),
        (
            "SharedStorageConnector",
            {"shared_storage_path": "/s", "host": "a"},
            "no setting 'host'; its settings are shared_storage_path",
        ),
        (
            "TcpConnector",
            {"shared_storage_path": "/s"},
            "no setting 'shared_storage_path'; its settings are host, port",
        ),
        ("NixlConnector", {"port": "80"}, r"NixlConnector has the wrong type: .*port"),
        ("SharedMemoryConnector", {"port": 1 << 16}, r"<= 65535.*port"),
    ],
)
def test_a_setting_that_a_connector_lacks_or_has_not_is_named(connector: str, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ECConnectorFactory.check(ECTransferConfig(connector, connector_extra_config=extra))


def test_a_connector_of_another_module_reads_settings_of_its_own() -> None:
    @dataclass(frozen=True)
    class Own:
        depth: int
        name: str = "x"

    config = ECTransferConfig(
        "Mine", connector_module_path="tests.engine.connectors", connector_extra_config={"depth": 3}
    )
    ECConnectorFactory.check(config)
    assert read_extra_config(config.connector, config.connector_extra_config, Own) == Own(3)
    with pytest.raises(ConfigurationError, match=r"^Mine needs depth\.$"):
        read_extra_config("Mine", {}, Own)
