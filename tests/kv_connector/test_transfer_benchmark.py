"""The benchmark measures what it says. How long things take is no matter of a test."""

from __future__ import annotations

import pytest

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer.transfer_benchmark import TransferResult, measure_transfers

from .conftest import NEEDS_NIXL


@pytest.mark.parametrize("connector", ["SharedMemoryConnector", pytest.param("NixlConnector", marks=NEEDS_NIXL)])
def test_measures_every_size(connector: str) -> None:
    results = measure_transfers(connector, [1, 1_000_000], block_bytes=65536, repeats=2)
    assert [result.size_bytes for result in results] == [65536, 15 * 65536]
    for result in results:
        assert 0 < result.copy_seconds < result.transfer_seconds
        assert result.memcpy_ratio > 0
        assert (result.bare_nixl_ratio is not None) == (connector == "NixlConnector")


def test_ratios_are_of_speeds() -> None:
    result = TransferResult("NixlConnector", 4096, 4096, 9.0, 4.0, 1.0, 2.0)
    assert (result.memcpy_ratio, result.bare_nixl_ratio) == (0.25, 0.5)


def test_an_unknown_connector_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Pigeon"):
        measure_transfers("Pigeon", [1], block_bytes=4096, repeats=1)
