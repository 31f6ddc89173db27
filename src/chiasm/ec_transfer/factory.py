"""Makes the connector that a configuration names. Importing this loads no connector and no torch."""

from __future__ import annotations

import importlib
from typing import ClassVar, NamedTuple

from chiasm.ec_transfer.base import ECConnector, ECConnectorRole, ECTransferConfig
from chiasm.errors import ConfigurationError


class _ClassPath(NamedTuple):
    module: str
    name: str


class ECConnectorFactory:
    """The connectors that are known by name, each imported only when it is asked for."""

    _registry: ClassVar[dict[str, _ClassPath]] = {}

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Make ``name`` stand for class ``class_name`` of module ``module_path``, which is not imported yet.

        Raises ConfigurationError when the name is taken.
        """
        if name in cls._registry:
            raise ConfigurationError(f"an EC connector named {name!r} is registered already; choose another name")
        cls._registry[name] = _ClassPath(module_path, class_name)

    @classmethod
    def get_connector_class(cls, config: ECTransferConfig) -> type[ECConnector]:
        """Import the class that ``config.connector`` names.

        With ``config.connector_module_path`` it is the class of that name in that module, registered or not.
        Raises ConfigurationError when the name is unknown, the import fails or the class is no ECConnector.
        """
        if config.connector_module_path is not None:
            path = _ClassPath(config.connector_module_path, config.connector)
        elif config.connector in cls._registry:
            path = cls._registry[config.connector]
        else:
            known = ", ".join(sorted(cls._registry))
            raise ConfigurationError(
                f"unknown EC connector {config.connector!r}; known are {known}, "
                "and connector_module_path names the module of any other"
            )
        try:
            module = importlib.import_module(path.module)
        except ImportError as error:
            raise ConfigurationError(
                f"EC connector {config.connector!r}: cannot import {path.module!r}: {error}"
            ) from error
        connector_class = getattr(module, path.name, None)
        if not (isinstance(connector_class, type) and issubclass(connector_class, ECConnector)):
            raise ConfigurationError(f"{path.module!r} has no class {path.name!r} that is a subclass of ECConnector")
        return connector_class

    @classmethod
    def create_connector(cls, config: ECTransferConfig, role: ECConnectorRole) -> ECConnector:
        """Make one half of the configured connector. Raises ConfigurationError, the connector's own included."""
        return cls.get_connector_class(config)(config, role)


ECConnectorFactory.register_connector(
    "SharedStorageConnector", "chiasm.ec_transfer.shared_storage", "SharedStorageConnector"
)
