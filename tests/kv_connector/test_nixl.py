"""Specific to NIXL: it may be missing, or unable to work here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVConnectorFactory, KVConnectorRole, KVTransferRole
from chiasm.transfer.nixl import MODULES

from .conftest import NEEDS_NIXL, Make
from .instance import config_for

CONFIG = config_for("NixlConnector", KVTransferRole.PRODUCER)


def only(monkeypatch: pytest.MonkeyPatch, available: str | None) -> None:
    """Let NIXL be found under one of its names, or none."""
    for name in MODULES:
        for module in [loaded for loaded in sys.modules if loaded == name or loaded.startswith(f"{name}.")]:
            if name != available:
                monkeypatch.delitem(sys.modules, module)
    import_module = importlib.import_module

    def find(name: str, package: str | None = None) -> ModuleType:
        if name in MODULES and name != available:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", find)


def test_without_nixl_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[nixl\]'") as raised:
        KVConnectorFactory.create_connector(CONFIG, KVConnectorRole.WORKER)
    assert "\n" not in str(raised.value)


def test_the_scheduler_role_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, None)
    KVConnectorFactory.create_connector(CONFIG, KVConnectorRole.SCHEDULER)


@NEEDS_NIXL
def test_a_build_for_one_cuda_version_is_enough(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    available = next(name for name in MODULES[1:] if importlib.util.find_spec(name))
    only(monkeypatch, available)
    prefill = make("NixlConnector", KVTransferRole.PRODUCER)
    decode = make("NixlConnector", KVTransferRole.CONSUMER)
    decode.fetch("d", prefill.prefill("p", [1]), [2])
    assert decode.holds("p", [2])


@NEEDS_NIXL
def test_a_library_without_ucx_is_refused(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr("chiasm.transfer.nixl.BACKEND", "NO_SUCH_BACKEND")
    with pytest.raises(ConfigurationError, match="NO_SUCH_BACKEND backend, and this NIXL comes without it"):
        make("NixlConnector", KVTransferRole.PRODUCER)


@NEEDS_NIXL
@pytest.mark.parametrize("role", KVTransferRole)
def test_a_transport_that_does_not_exist_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, make: Make, role: KVTransferRole
) -> None:
    monkeypatch.setenv("UCX_TLS", "pigeon")
    with pytest.raises(ConfigurationError, match="UCX_TLS is pigeon"):
        make("NixlConnector", role)
