"""Connectors by name, of either plane. Importing this loads no connector, no torch and no nixl."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, cast

from chiasm.errors import ConfigurationError


class ConnectorConfig(Protocol):
    """What names a connector."""

    @property
    def connector(self) -> str: ...

    @property
    def connector_module_path(self) -> str | None: ...


class ClassPath(NamedTuple):
    """Where a class is, without importing it."""

    module: str
    name: str


ConfigT = TypeVar("ConfigT", bound=ConnectorConfig)
RoleT = TypeVar("RoleT")
ConnectorT = TypeVar("ConnectorT")


class ConnectorFactory(Generic[ConfigT, RoleT, ConnectorT]):
    """The connectors of a plane that are known by name, each imported only when it is asked for."""

    _plane: ClassVar[str]
    _base: ClassVar[type[Any]]
    """The abstract class that all of them are made from."""
    _module_option: ClassVar[str]
    """How a person names the module of one that isn't known."""
    _registry: ClassVar[dict[str, ClassPath]]

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Make ``name`` stand for class ``class_name`` of module ``module_path``, which is not imported yet.

        Raises ConfigurationError when the name is taken.
        """
        if name in cls._registry:
            raise ConfigurationError(f"{cls._plane} connector {name!r} is registered already; choose another name")
        cls._registry[name] = ClassPath(module_path, class_name)

    @classmethod
    def get_connector_class(cls, config: ConfigT) -> type[ConnectorT]:
        """Import the class that ``config.connector`` names.

        With ``config.connector_module_path`` it is the class of that name in that module, registered or not.
        Raises ConfigurationError when the name is unknown, the import fails or the class is none of this plane.
        """
        if config.connector_module_path is not None:
            path = ClassPath(config.connector_module_path, config.connector)
        elif config.connector in cls._registry:
            path = cls._registry[config.connector]
        else:
            known = ", ".join(sorted(cls._registry))
            raise ConfigurationError(
                f"unknown {cls._plane} connector {config.connector!r}; known are {known}, "
                f"and {cls._module_option} names the module of any other"
            )
        try:
            module = importlib.import_module(path.module)
        except ImportError as error:
            raise ConfigurationError(
                f"{cls._plane} connector {config.connector!r}: cannot import {path.module!r}: {error}"
            ) from error
        found = getattr(module, path.name, None)
        if not (isinstance(found, type) and issubclass(found, cls._base)):
            raise ConfigurationError(
                f"{path.module!r} has no class {path.name!r} that is a subclass of {cls._base.__name__}"
            )
        return cast("type[ConnectorT]", found)

    @classmethod
    def create_connector(cls, config: ConfigT, role: RoleT) -> ConnectorT:
        """Make one half of the configured connector. Raises ConfigurationError, the connector's own included."""
        make = cast("Callable[[ConfigT, RoleT], ConnectorT]", cls.get_connector_class(config))
        return make(config, role)
