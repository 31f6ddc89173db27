"""Makes the connector that a configuration names. Importing this loads no connector, no torch and no nixl."""

from __future__ import annotations

import importlib
from typing import ClassVar, NamedTuple

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer.base import KVConnector, KVConnectorRole, KVTransferConfig


class _ClassPath(NamedTuple):
    module: str
    name: str


class KVConnectorFactory:
    """The connectors that are known by name, each imported only when it is asked for."""

    _registry: ClassVar[dict[str, _ClassPath]] = {}

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Make ``name`` stand for class ``class_name`` of module ``module_path``, which is not imported yet.

        Raises ConfigurationError when the name is taken.
        """
        if name in cls._registry:
            raise ConfigurationError(f"a KV connector named {name!r} is registered already; choose another name")
        cls._registry[name] = _ClassPath(module_path, class_name)

    @classmethod
    def get_connector_class(cls, config: KVTransferConfig) -> type[KVConnector]:
        """Import the class that ``config.connector`` names.

        With ``config.connector_module_path`` it is the class of that name in that module, registered or not.
        Raises ConfigurationError when the name is unknown, the import fails or the class is no KVConnector.
        """
        if config.connector_module_path is not None:
            path = _ClassPath(config.connector_module_path, config.connector)
        elif config.connector in cls._registry:
            path = cls._registry[config.connector]
        else:
            known = ", ".join(sorted(cls._registry))
            raise ConfigurationError(
                f"unknown KV connector {config.connector!r}; known are {known}, "
                "and --kv-connector-module-path names the module of any other"
            )
        try:
            module = importlib.import_module(path.module)
        except ImportError as error:
            raise ConfigurationError(
                f"KV connector {config.connector!r}: cannot import {path.module!r}: {error}"
            ) from error
        connector_class = getattr(module, path.name, None)
        if not (isinstance(connector_class, type) and issubclass(connector_class, KVConnector)):
            raise ConfigurationError(f"{path.module!r} has no class {path.name!r} that is a subclass of KVConnector")
        return connector_class

    @classmethod
    def create_connector(cls, config: KVTransferConfig, role: KVConnectorRole) -> KVConnector:
        """Make one half of the configured connector. Raises ConfigurationError, the connector's own included."""
        return cls.get_connector_class(config)(config, role)


KVConnectorFactory.register_connector(
    "SharedMemoryConnector", "chiasm.kv_transfer.shared_memory", "SharedMemoryConnector"
)
KVConnectorFactory.register_connector("NixlConnector", "chiasm.kv_transfer.nixl", "NixlConnector")
