"""The factory imports a connector when it is first used, and says what is wrong with a name that it cannot find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorRole, ECTransferConfig
from chiasm.ec_transfer.shared_storage import SharedStorageConnector
from chiasm.errors import ConfigurationError

from .instance import Instance, config_for, embedding_of, identifier_of

GUIDE = Path(__file__).parents[2] / "docs" / "connector.md"


@pytest.fixture
def out_of_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example connector of the guide, as a module that can be imported."""
    example = GUIDE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "memory_connector.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "memory_connector"
    sys.modules.pop("memory_connector", None)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ECConnectorFactory, "_registry", dict(ECConnectorFactory._registry))


def test_importing_the_package_loads_neither_torch_nor_a_connector() -> None:
    code = (
        "import sys, chiasm.ec_transfer\n"
        "loaded = {'torch', 'numpy', 'chiasm.ec_transfer.shared_storage'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", ECConnectorRole)
def test_the_reference_connector_is_made_by_name(folder: Path, role: ECConnectorRole) -> None:
    connector = ECConnectorFactory.create_connector(config_for(folder), role)
    assert type(connector) is SharedStorageConnector
    assert connector.role is role


def test_a_connector_is_made_from_the_module_that_the_configuration_names(out_of_tree: str) -> None:
    config = ECTransferConfig(connector="MemoryConnector", connector_module_path=out_of_tree)
    instance = Instance(config)
    assert type(instance.worker).__name__ == "MemoryConnector"
    assert instance.worker.store_id() == ""
    assert instance.load(identifier_of("a")) is None
    loaded = instance.load(instance.encode("a"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))


def test_a_named_module_is_preferred_to_a_registered_name(out_of_tree: str) -> None:
    config = ECTransferConfig(connector="SharedStorageConnector", connector_module_path=out_of_tree)
    with pytest.raises(ConfigurationError, match="no class 'SharedStorageConnector'"):
        ECConnectorFactory.get_connector_class(config)


def test_a_registered_connector_is_imported_when_it_is_first_used(out_of_tree: str, registry: None) -> None:
    ECConnectorFactory.register_connector("Mine", out_of_tree, "MemoryConnector")
    assert out_of_tree not in sys.modules
    assert issubclass(ECConnectorFactory.get_connector_class(ECTransferConfig(connector="Mine")), ECConnector)
    assert out_of_tree in sys.modules


def test_a_name_can_be_registered_only_once(registry: None) -> None:
    with pytest.raises(ConfigurationError, match="registered already"):
        ECConnectorFactory.register_connector("SharedStorageConnector", "anything", "Anything")


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'Pigeon'.*SharedStorageConnector"):
        ECConnectorFactory.get_connector_class(ECTransferConfig(connector="Pigeon"))


def test_the_error_for_a_module_that_cannot_be_imported_names_it() -> None:
    with pytest.raises(ConfigurationError, match="no_such_module"):
        ECConnectorFactory.get_connector_class(ECTransferConfig(connector_module_path="no_such_module"))


def test_a_class_that_is_not_a_connector_is_refused(out_of_tree: str) -> None:
    config = ECTransferConfig(connector="RequestLike", connector_module_path=out_of_tree)
    with pytest.raises(ConfigurationError, match="subclass of ECConnector"):
        ECConnectorFactory.get_connector_class(config)
