from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chiasm.ec_transfer import ECConnectorStats, ECTransferRole
from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm import check_version
from chiasm.integrations.vllm.items import Layout
from chiasm.integrations.vllm.messages import CounterPage, CounterWriter, StepReport
from chiasm.integrations.vllm.settings import Settings


def test_settings_are_read() -> None:
    extra = {"shared_storage_path": "/store", "max_bytes": 1 << 20, "wait_seconds": 2, "fingerprint": "ab"}
    folder = Path("/store")
    assert Settings.read(extra) == Settings(
        shared_storage_path=folder, max_bytes=1 << 20, wait_seconds=2.0, fingerprint="ab"
    )
    assert Settings.read({"shared_storage_path": "/store"}) == Settings(shared_storage_path=folder)
    other = {"connector": "TcpConnector", "host": "10.0.0.1", "port": 7000, "receive_bytes": 1 << 20}
    assert Settings.read(other) == Settings("TcpConnector", host="10.0.0.1", port=7000, receive_bytes=1 << 20)


def test_a_connector_gets_its_settings() -> None:
    own = Settings.read(
        {
            "connector": "MinimalConnector",
            "connector_module_path": "tests.integrations.vllm.minimal",
            "extra": {"depth": "3"},
        }
    )
    config = own.transfer_config(
        ECTransferRole.CONSUMER, fingerprint="ab", device="cpu", in_one_process=True, fleet_key=None
    )
    assert (config.connector, config.extra, config.separate_processes) == ("MinimalConnector", {"depth": "3"}, False)


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
        ({"shared_storage_path": "/s", "max_byte": 1}, "no setting 'max_byte'; its settings are connector, "),
        ({"shared_storage_path": "/s", "max_bytes": "1"}, "whole number"),
        ({"shared_storage_path": "/s", "max_bytes": True}, "whole number"),
        ({"shared_storage_path": "/s", "wait_seconds": -1}, "wait_seconds must be"),
        ({"shared_storage_path": "/s", "wait_seconds": float("nan")}, "wait_seconds must be"),
        ({"shared_storage_path": "/s", "fingerprint": 7}, "fingerprint must be"),
        ({"connector": 7}, "connector must be the name"),
        ({"connector": "TcpConnector", "port": 1 << 16}, "port must be a number from 0 to 65535"),
        ({"connector": "TcpConnector", "extra": {"depth": 3}}, "extra must be an object"),
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
    writer.write(ECConnectorStats(saves=2, save_seconds=0.5))
    added = page.added()
    assert (added["saves"], added["save_seconds"], added["loads"]) == (2, 0.5, 0)
    writer.write(ECConnectorStats(saves=3, save_seconds=0.5))
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
