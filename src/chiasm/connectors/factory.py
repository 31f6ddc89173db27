"""Finds connectors by name, for embeddings (EC) and for KV. Importing this loads no connector, no torch and no nixl."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, cast

from chiasm.errors import ConfigurationError
from chiasm.extras import explained


class ConnectorConfig(Protocol):
    """The part of a connector's configuration that names it."""

    @property
    def connector(self) -> str: ...

    @property
    def connector_module_path(self) -> str | None: ...


class ClassPath(NamedTuple):
    """The name of a class that has not been imported yet."""

    module: str
    name: str


ConfigT = TypeVar("ConfigT", bound=ConnectorConfig)
RoleT = TypeVar("RoleT")
ConnectorT = TypeVar("ConnectorT")


class ConnectorFactory(Generic[ConfigT, RoleT, ConnectorT]):
    """The registered connectors of one kind, each imported when it is first used."""

    _base: ClassVar[type[Any]]
    """The abstract class that all of them derive from."""
    _module_option: ClassVar[str]
    """The option that names the module of a connector that is not registered."""
    _registry: ClassVar[dict[str, ClassPath]]

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Register the class ``class_name`` of module ``module_path`` as ``name``, without importing it.

        Raises ConfigurationError if the name is taken.
        """
        if name in cls._registry:
            raise ConfigurationError(
                f"The {cls._base.plane} connector {name!r} is registered already; choose another name."
            )
        cls._registry[name] = ClassPath(module_path, class_name)

    @classmethod
    def check_name(cls, config: ConfigT) -> None:
        """Raise ConfigurationError for a connector that doesn't exist. Imports no connector, so it cannot tell everything."""
        module = config.connector_module_path
        if module is None:
            cls._path(config)
            return
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise ConfigurationError(
                f"There is no Python module {module!r} for the {cls._base.plane} connector {config.connector!r}; correct "
                f"{cls._module_option}, or install the module where chiasm is."
            )

    @classmethod
    def _path(cls, config: ConfigT) -> ClassPath:
        if config.connector_module_path is not None:
            return ClassPath(config.connector_module_path, config.connector)
        if config.connector in cls._registry:
            return cls._registry[config.connector]
        known = ", ".join(sorted(cls._registry))
        raise ConfigurationError(
            f"There is no {cls._base.plane} connector {config.connector!r}. Choose from {known}, or name the module of another "
            f"one with {cls._module_option}."
        )

    @classmethod
    def get_connector_class(cls, config: ConfigT) -> type[ConnectorT]:
        """Import and return the class that ``config.connector`` names.

        If ``config.connector_module_path`` is set, that is the class of this name in that module; otherwise it is the class
        that is registered under the name. Raises ConfigurationError if the name is unknown, if the module cannot be imported,
        or if it has no such connector.
        """
        path = cls._path(config)
        try:
            module = importlib.import_module(path.module)
        except ImportError as error:
            raise explained(error, config.connector) or ConfigurationError(
                f"Cannot import {path.module!r} for the {cls._base.plane} connector {config.connector!r}: {error}"
            ) from error
        found = getattr(module, path.name, None)
        if not (isinstance(found, type) and issubclass(found, cls._base)):
            raise ConfigurationError(
                f"The module {path.module!r} has no class {path.name!r} that is a subclass of {cls._base.__name__}."
            )
        return cast("type[ConnectorT]", found)

    @classmethod
    def create_connector(cls, config: ConfigT, role: RoleT) -> ConnectorT:
        """Make one half of the configured connector. Raises ConfigurationError, also for what the connector refuses."""
        make = cast("Callable[[ConfigT, RoleT], ConnectorT]", cls.get_connector_class(config))
        return make(config, role)
