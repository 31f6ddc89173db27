from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chiasm.ec_transfer import ECConnectorStats, ECTransferRole
from chiasm.ec_transfer.stores.writer import StoreWrites
from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm import check_version
from chiasm.integrations.vllm.items import Layout
from chiasm.integrations.vllm.messages import CounterPage, CounterWriter, StepReport
from chiasm.integrations.vllm.settings import Settings


def test_settings_are_read() -> None:
    extra = {"shared_storage_path": "/store", "max_bytes": 1 << 20, "wait_seconds": 2, "fingerprint": "ab"}
    folder = {"shared_storage_path": "/store"}
    read = Settings.read(extra)
    assert read == Settings(max_bytes=1 << 20, wait_seconds=2.0, fingerprint="ab", connector_extra_config=folder)
    assert read.folder == Path("/store")
    address = {"host": "10.0.0.1", "port": 7000}
    other = Settings.read({"connector": "TcpConnector", "receive_bytes": 1 << 20, **address})
    assert other == Settings("TcpConnector", receive_bytes=1 << 20, connector_extra_config=address)
    assert other.folder is None


def test_a_connector_gets_its_settings() -> None:
    own = Settings.read(
        {
            "connector": "MinimalConnector",
            "connector_module_path": "tests.integrations.vllm.minimal",
            "depth": 3,
        }
    )
    config = own.transfer_config(
        ECTransferRole.CONSUMER, fingerprint="ab", device="cpu", in_one_process=True, fleet_key=None
    )
    assert (config.connector, config.connector_extra_config) == ("MinimalConnector", {"depth": 3})
    assert not config.separate_processes


def test_files_of_a_folder_are_copied_even_in_one_process() -> None:
    """Truncating a file that is mapped would end vLLM's engine."""
    config = Settings.read({"shared_storage_path": "/store"}).transfer_config(
        ECTransferRole.CONSUMER, fingerprint="ab", device="cpu", in_one_process=True, fleet_key=None
    )
    assert config.separate_processes


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "needs shared_storage_path"),
        ({"shared_storage_path": ""}, "needs shared_storage_path"),
        (
            {"shared_storage_path": "/s", "max_byte": 1},
            "no setting 'max_byte'; its settings are connector, .*shared_storage_path",
        ),
        ({"shared_storage_path": "/s", "max_bytes": "1"}, "max_bytes"),
        ({"shared_storage_path": "/s", "max_bytes": True}, "max_bytes"),
        ({"shared_storage_path": "/s", "wait_seconds": -1}, "wait_seconds must be"),
        ({"shared_storage_path": "/s", "wait_seconds": float("nan")}, "wait_seconds must be"),
        ({"shared_storage_path": "/s", "fingerprint": 7}, "fingerprint"),
        ({"connector": 7}, "connector"),
        ({"connector": "TcpConnector", "port": 1 << 16}, r"TcpConnector .*<= 65535.*port"),
        (
            {"connector": "TcpConnector", "shared_storage_path": "/s"},
            "TcpConnector has no setting 'shared_storage_path'",
        ),
        ({"connector": "TcpConnector", "extra": {"host": "a"}}, "no setting 'extra'; write .* beside the others"),
    ],
)
def test_invalid_settings_are_refused_by_name(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Settings.read(extra)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0rc1+cpu", "0.32.0+cpu", "0.33"])
def test_supported_versions_are_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "0.3", "0.320.0", "1.32.0", "dev", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigurationError, match=r"works with vLLM 0\.32 and 0\.33"):
        check_version(version)


def test_counters_pass_from_worker_to_scheduler() -> None:
    page = CounterPage()
    writer = CounterWriter(page.path)
    assert set(page.added().values()) == {0.0}
    writer.write(ECConnectorStats(saves=2, save_seconds=0.5), StoreWrites(writes=4, queued_bytes=9))
    added = page.added()
    assert (added["saves"], added["save_seconds"], added["loads"], added["store_writes"]) == (2, 0.5, 0, 4)
    writer.write(ECConnectorStats(saves=3, save_seconds=0.5), None)
    assert page.added()["saves"] == 1
    page.close()
    page.close()
    assert (page.path, page.added()) == ("", {})


def test_the_layout_of_a_model_with_deepstack_levels() -> None:
    vision = SimpleNamespace(deepstack_visual_indexes=[0, 1])
    model = SimpleNamespace(
        hf_config=SimpleNamespace(vision_config=vision),
        dtype="torch.bfloat16",
        get_inputs_embeds_size=lambda: 192,
    )
    assert Layout.of(model) == Layout(192, 2, "bfloat16")
    assert Layout.of(model).width == 576


def test_what_failed_on_any_rank_has_failed() -> None:
    merged = StepReport(4, frozenset({"a"})).aggregate(StepReport(4, frozenset({"b"})))
    assert merged == StepReport(4, frozenset({"a", "b"}))
