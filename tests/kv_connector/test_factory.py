"""The factory imports a connector only when it is created, and says what is wrong with a name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVConnector, KVConnectorFactory, KVConnectorRole, KVTransferConfig, KVTransferRole
from chiasm.kv_transfer.shared_memory import SharedMemoryConnector

from .conftest import Make
from .instance import config_for

GUIDE = Path(__file__).parents[2] / "docs" / "kv_connector.md"


@pytest.fixture
def out_of_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The connector that the guide gives as an example, as a module that Python finds."""
    example = GUIDE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "one_process_connector.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "one_process_connector"
    sys.modules.pop("one_process_connector", None)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))


def test_importing_the_package_loads_neither_torch_nor_a_connector() -> None:
    code = (
        "import sys, chiasm.kv_transfer\n"
        "loaded = {'torch', 'numpy', 'nixl', 'chiasm.transfer'}\n"
        "loaded |= {'chiasm.kv_transfer.shared_memory', 'chiasm.kv_transfer.nixl'}\n"
        "loaded &= set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", KVConnectorRole)
def test_makes_the_connector_for_shared_memory_by_name(role: KVConnectorRole) -> None:
    config = config_for("SharedMemoryConnector", KVTransferRole.CONSUMER)
    connector = KVConnectorFactory.create_connector(config, role)
    assert type(connector) is SharedMemoryConnector
    assert connector.role is role


def test_makes_a_connector_from_the_module_that_the_configuration_names(out_of_tree: str, make: Make) -> None:
    prefill = make("OneProcessConnector", KVTransferRole.PRODUCER, connector_module_path=out_of_tree)
    decode = make("OneProcessConnector", KVTransferRole.CONSUMER, connector_module_path=out_of_tree)
    decode.fetch("d", prefill.prefill("p", [4, 1]), [2, 3])
    assert decode.holds("p", [2, 3])
    prefill.wait_for(lambda seen: seen.sent == {"p"})


@dataclass(frozen=True)
class Own:
    depth: int
    name: str = "x"


def test_a_connector_reads_settings_of_its_own(out_of_tree: str) -> None:
    config = KVTransferConfig("OneProcessConnector", connector_module_path=out_of_tree)
    config = replace(config, connector_extra_config={"depth": 3})
    KVConnectorFactory.check(config)
    connector = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
    assert connector.read_extra_config(Own) == Own(3)
    lacking = replace(config, connector_extra_config={})
    with pytest.raises(ConfigurationError, match=r"^OneProcessConnector needs depth\.$"):
        KVConnectorFactory.create_connector(lacking, KVConnectorRole.SCHEDULER).read_extra_config(Own)


def test_a_named_module_is_preferred_to_a_registered_name(out_of_tree: str) -> None:
    config = KVTransferConfig(connector="SharedMemoryConnector", connector_module_path=out_of_tree)
    with pytest.raises(ConfigurationError, match="no class 'SharedMemoryConnector'"):
        KVConnectorFactory.get_connector_class(config)


def test_imports_a_registered_connector_only_when_asked_for(out_of_tree: str, registry: None) -> None:
    KVConnectorFactory.register_connector("Mine", out_of_tree, "OneProcessConnector")
    assert out_of_tree not in sys.modules
    assert issubclass(KVConnectorFactory.get_connector_class(KVTransferConfig(connector="Mine")), KVConnector)
    assert out_of_tree in sys.modules


def test_a_name_is_registered_once(registry: None) -> None:
    with pytest.raises(ConfigurationError, match="registered already"):
        KVConnectorFactory.register_connector("NixlConnector", "anything", "Anything")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'Pigeon'.*NixlConnector, SharedMemoryConnector, TcpConnector"):
        KVConnectorFactory.get_connector_class(KVTransferConfig(connector="Pigeon"))


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no_such_module"):
        KVConnectorFactory.get_connector_class(KVTransferConfig(connector_module_path="no_such_module"))


def test_a_class_that_is_no_connector_is_refused(out_of_tree: str) -> None:
    config = KVTransferConfig(connector="OfferedBytes", connector_module_path=out_of_tree)
    with pytest.raises(ConfigurationError, match="subclass of KVConnector"):
        KVConnectorFactory.get_connector_class(config)
